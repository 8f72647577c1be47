"""Where each thread is in a forward pass: which of its tokens are visual, and what its rows stand for by now."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llavolta.compression.families import Parts, find_pictures
from llavolta.compression.labelled import answer_marks
from llavolta.compression.masks import is_flat
from llavolta.compression.probe import LayerInput, LayerProbe
from llavolta.compression.rows import Rows, begins, positions_by_row
from llavolta.errors import UnsupportedModel


@dataclass
class CachedRows:
    """What the rows (B, n) of a key-value cache stand for: see Rows. original: the column without compression."""

    later: Tensor
    original: Tensor
    valid: Tensor
    seen: int  # how many tokens, compressed or not, this cache was shown
    size: Tensor | None = None
    calibration: Tensor | None = None
    positions: Tensor | None = None  # (B, n), kept beside calibration
    moved: Tensor | int = 0  # (B, 1) how far the positions of later tokens move up


@dataclass
class Pass:
    """The state of one forward pass."""

    by_kind: dict[str, Tensor]  # (B, T) bool on the CPU, where the pictures of each modality go
    encoded: dict  # their features
    real: Tensor  # (B, T) bool, False at padding
    unmasked: bool  # no attention mask was given
    cache: object | None = None
    past: int = 0  # tokens that the cache's first layer holds, as the stock masks count them
    seen: int = 0  # tokens that the cache was shown
    whole: bool = False  # whether the masks were made for a cache that holds every token
    deepstack: dict[int, Tensor] = field(
        default_factory=dict
    )  # (visual tokens, C), due after a layer
    rotary: list[tuple[tuple, dict, object]] = field(default_factory=list)
    previous: LayerInput | None = None
    rows: Rows | None = None
    masks: dict[tuple[int, int], object] = field(
        default_factory=dict
    )  # by layer of the plan and stock mask
    cached: dict[int, CachedRows] = field(
        default_factory=dict
    )  # what the cache will hold, by layer of the plan
    moved: Tensor | int = (
        0  # (B, 1) how far closing the gaps of this pass has moved its last token up
    )
    image_sizes: Tensor | None = None  # (images, 2), where the model cuts them in tiles
    start: tuple[LayerInput, Rows] | None = (
        None  # what layer 0 works on, where a compressor will ask for it
    )

    @classmethod
    def of_inputs(cls, inputs: dict, by_kind: dict[str, Tensor]) -> Pass:
        """A pass that the base model begins with ``inputs``."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -ids.shape[1] :].bool()
        encoded, cache = inputs.get("mm_encoder_outputs") or {}, inputs.get("past_key_values")
        return cls(
            by_kind, encoded, real, mask is None, cache, image_sizes=inputs.get("image_sizes")
        )

    @property
    def has_pictures(self) -> bool:
        return any(bool(where.any()) for where in self.by_kind.values())

    @property
    def position_ids(self) -> Tensor:
        """(1 or B, T), or (A, 1 or B, T) of A-dimensional ones: what the model's rotary embeddings were made of."""
        return _position_ids(*self.rotary[0][:2])

    def first_rows(self, parts: Parts) -> Rows:
        """What the rows stand for before any compressor."""
        ids = self.position_ids
        if (
            ids.dim() == 2
            and is_flat(parts.decoder)
            and self.unmasked
            and bool((ids.diff(dim=1) < 0).any())
        ):
            raise UnsupportedModel(
                "flash attention tells packed samples apart by position_ids, which have gaps under compress(); use "
                "sdpa or eager attention, or one sample a row"
            )
        positions = positions_by_row(ids, len(self.real))
        pictures = find_pictures(parts.base, self.by_kind, self.encoded, positions)
        return Rows.of_inputs(self.real, positions, pictures, self.deepstack)

    def rotary_of_rows(self, stock, rotary_emb: nn.Module):
        """The rotary embeddings of the present rows in place of the model's ``stock`` ones."""
        rows = self.rows
        if rows is None:
            return stock
        if id(stock) not in rows.rotary:
            call = next((call for call in self.rotary if call[2] is stock), None)
            if call is None:
                raise UnsupportedModel(
                    "a decoder layer got rotary embeddings that its rotary_emb did not make"
                )
            args, kwargs, _ = call
            positions = rows.positions.permute(2, 0, 1)
            positions = positions if _position_ids(args, kwargs).dim() == 3 else positions[0]
            if "position_ids" in kwargs:
                kwargs = {**kwargs, "position_ids": positions}
            else:
                args = (args[0], positions, *args[2:])
            rows.rotary[id(stock)] = rotary_emb.forward(*args, **kwargs)
        return rows.rotary[id(stock)]


class Now(threading.local):
    """Where this thread is in a pass; other threads may be in passes of their own on the same model."""

    state: Pass | None = None
    labels: Tensor | None = None
    labelled: tuple[Tensor, Tensor] | None = None  # rows and columns that predict a label
    due: tuple[str, ...] = ()  # which of "base" and "decoder" this pass has yet to reach; see enter
    prompt: int | None = None  # tokens of the prompt, behind which generate may try out guesses
    rows: int | None = None  # rows of the prompt, which generate repeats for beams
    image_sizes: Tensor | None = None  # (images, 2) that generate was given

    def forget(self) -> None:
        self.state = self.labels = self.labelled = None

    def enter(self, part: str, fits: bool = True) -> None:
        """Note that a pass reaches ``part``. If it does not come from the part before, it was called by itself, and
        what an interrupted pass left is stale: an interrupt is no Exception and skips the hooks that clean up."""
        if part not in self.due or not fits:
            self.forget()
        self.due = ("decoder",) if part == "base" else ()

    def probe(self, at: LayerInput, rows: Rows, norm: nn.Module | None) -> LayerProbe:
        """What a compressor may ask at the layer ``at``, of ``rows``."""
        state, index, valid, pictures = self.state, rows.index, rows.valid, rows.pictures
        positions = state.position_ids
        if positions.dim() > 2:  # (A, B, T): of tokens with three, the first, time, never falls
            positions = positions[0]
        sample = begins(positions.expand(len(index), -1), state.real).long().cumsum(1)
        sample = sample.gather(1, index)
        if self.prompt is not None:
            valid = valid & (index + state.seen < self.prompt)
        marks = (None, None) if self.labels is None else answer_marks(self.labels, index)
        return LayerProbe(
            at, state.previous, valid, pictures.rows, pictures.mask, sample, *marks, norm, index
        )


def _position_ids(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]
