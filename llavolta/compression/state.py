"""The state of a forward pass under compression: its visual tokens and what its rows stand for.

``Now`` is the state of a thread. It has a ``Pass`` from the base model's entry to its exit.
``CachedRows`` describes the rows of a key-value cache from one pass to the next.
"""

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
    """What the rows (B, n) of one layer's key-value cache stand for.

    Attributes:
        later: (B, n) column of each row's token in the stock masks of later passes; see Rows.
        original: (B, n) column that the token would have without compression.
        valid: (B, n) bool, False at padding.
        seen: Number of tokens that this cache has processed, before compression.
        size: (B, n) number of tokens that each row counts for as a key. None: all 1.
        calibration: (B, n), see CompressedTokens. None: all 0.
        positions: (B, n) rotary positions, stored only together with ``calibration``.
        moved: (B, 1) by how much closed gaps have decreased the positions of later tokens, or 0.
    """

    later: Tensor
    original: Tensor
    valid: Tensor
    seen: int
    size: Tensor | None = None
    calibration: Tensor | None = None
    positions: Tensor | None = None
    moved: Tensor | int = 0


@dataclass
class Pass:
    """The state of one forward pass.

    Attributes:
        by_kind: By modality ("image", "video"), (B, T) bool on the CPU, True at its placeholders.
        encoded: By modality, the encoder's output.
        real: (B, T) bool, False at padding.
        unmasked: Whether no attention mask was given.
        cache: The key-value cache, if any.
        past: Number of tokens before this pass as the stock masks count them: the length of the
            cache's first layer, or ``seen`` if ``whole``.
        seen: Number of tokens that the cache has processed before this pass.
        whole: Whether the stock masks were made for a cache that contains every token; see
            ``CacheBook.begin``.
        deepstack: By decoder layer, features (n, C) of the n visual tokens that are added to them
            after that layer.
        rotary: Arguments and output of each call of the model's rotary embedding.
        previous: Input of the layer before a compressor that asks for it.
        rows: What the rows stand for; None before the first compressor.
        masks: Attention masks of these rows, by layer of the plan and id of the stock mask.
        cached: By layer of the plan, what the cache rows stand for after this pass.
        moved: (B, 1) by how much this pass has decreased the position of its last token, or 0.
        image_sizes: (images, 2) heights and widths, for models that cut images into tiles.
        start: Input and rows of layer 0, for a compressor that asks for them.
    """

    by_kind: dict[str, Tensor]
    encoded: dict
    real: Tensor
    unmasked: bool
    cache: object | None = None
    past: int = 0
    seen: int = 0
    whole: bool = False
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    rotary: list[tuple[tuple, dict, object]] = field(default_factory=list)
    previous: LayerInput | None = None
    rows: Rows | None = None
    masks: dict[tuple[int, int], object] = field(default_factory=dict)
    held: dict[int, CachedRows] = field(default_factory=dict)
    cached: dict[int, CachedRows] = field(default_factory=dict)
    moved: Tensor | int = 0
    image_sizes: Tensor | None = None
    start: tuple[LayerInput, Rows] | None = None

    @classmethod
    def of_inputs(cls, inputs: dict, by_kind: dict[str, Tensor]) -> Pass:
        """Create the state from the arguments of the base model.

        Args:
            inputs: The base model's arguments by name, with encoded images.
            by_kind: By modality, (B, T) bool on the CPU, True at its placeholders.

        Returns:
            The state before any decoder layer.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -ids.shape[1] :].bool()  # (B, past + T) -> (B, T)
        encoded, cache = inputs.get("mm_encoder_outputs") or {}, inputs.get("past_key_values")
        return cls(
            by_kind, encoded, real, mask is None, cache, image_sizes=inputs.get("image_sizes")
        )

    @property
    def has_pictures(self) -> bool:
        """Whether any token of this pass is visual."""
        return any(bool(where.any()) for where in self.by_kind.values())

    @property
    def position_ids(self) -> Tensor:
        """Positions that the rotary embeddings were made of: (1 or B, T), or (A, 1 or B, T)."""
        return _position_ids(*self.rotary[0][:2])

    def first_rows(self, parts: Parts) -> Rows:
        """Describe the rows before any compressor.

        Args:
            parts: The model's parts.

        Returns:
            The rows of the input tokens.

        Raises:
            UnsupportedModel: Packed samples under flash attention, or placeholders that the encoded
                images do not fill.
        """
        ids = self.position_ids
        if (
            ids.dim() == 2
            and is_flat(parts.decoder)
            and self.unmasked
            and bool((ids.diff(dim=1) < 0).any())
        ):
            raise UnsupportedModel(
                "flash attention tells packed samples apart by position_ids, which have gaps under "
                "compress(); use sdpa or eager attention, or one sample a row"
            )
        positions = positions_by_row(ids, len(self.real))
        pictures = find_pictures(parts.base, self.by_kind, self.encoded, positions)
        return Rows.of_inputs(self.real, positions, pictures, self.deepstack)

    def rotary_of_rows(self, stock, rotary_emb: nn.Module):
        """Compute the rotary embeddings of the present rows.

        Args:
            stock: The embeddings that the model gave to a layer, for all input tokens.
            rotary_emb: The model's rotary embedding.

        Returns:
            The embeddings of the rows' positions, in the form of ``stock``; ``stock`` itself before
            the first compressor.

        Raises:
            UnsupportedModel: ``rotary_emb`` did not make ``stock`` in this pass.
        """
        rows = self.rows
        if rows is None:
            return stock
        # Models with several kinds of layers call rotary_emb once per kind with other arguments.
        # The call that made ``stock`` is repeated with the rows' positions.
        if id(stock) not in rows.rotary:
            call = next((call for call in self.rotary if call[2] is stock), None)
            if call is None:
                raise UnsupportedModel(
                    "a decoder layer got rotary embeddings that its rotary_emb did not make"
                )
            args, kwargs, _ = call
            positions = rows.positions.permute(2, 0, 1)  # (B, T, A) -> (A, B, T)
            # (A, B, T) -> (B, T), if the model passes one-dimensional positions
            positions = positions if _position_ids(args, kwargs).dim() == 3 else positions[0]
            if "position_ids" in kwargs:
                kwargs = {**kwargs, "position_ids": positions}
            else:
                args = (args[0], positions, *args[2:])
            rows.rotary[id(stock)] = rotary_emb.forward(*args, **kwargs)
        return rows.rotary[id(stock)]


class Now(threading.local):
    """The state of this thread; other threads may run other passes on the same model.

    Attributes:
        state: The pass in progress, from the base model's entry to its exit.
        labels: (B, T) labels of the pass in progress, if they were given to the model.
        labelled: Batch rows and columns (M,) of the tokens that predict a label, if only their
            logits are computed.
        due: Which of "base" and "decoder" the pass has yet to reach; see ``enter``.
        prompt: Number of prompt tokens in ``generate``. Tokens after them in the same pass are
            guesses of assisted generation.
        rows: Number of batch rows of the prompt, which ``generate`` repeats for beams.
        image_sizes: (images, 2) heights and widths that ``generate`` was called with.
    """

    state: Pass | None = None
    labels: Tensor | None = None
    labelled: tuple[Tensor, Tensor] | None = None
    due: tuple[str, ...] = ()
    prompt: int | None = None
    rows: int | None = None
    image_sizes: Tensor | None = None

    def forget(self) -> None:
        """Drop the state of the pass in progress."""
        self.state = self.labels = self.labelled = None

    def enter(self, part: str, fits: bool = True) -> None:
        """Note that a pass reaches a part of the model, and drop the state of an interrupted pass.

        A pass reaches the model with its head, the base model and the decoder in this order. If
        ``part`` is reached in another way, it was called by itself, and any state belongs to an
        earlier pass. Such state exists after a KeyboardInterrupt: torch runs the hooks that clean
        up (``always_call``) only for subclasses of Exception.

        Args:
            part: "base" or "decoder".
            fits: Whether the inputs of ``part`` have the shape of the pass in progress.
        """
        if part not in self.due or not fits:
            self.forget()
        self.due = ("decoder",) if part == "base" else ()

    def probe(self, at: LayerInput, rows: Rows, norm: nn.Module | None) -> LayerProbe:
        """Create the probe through which a compressor reads attention, keys and text of a layer.

        Args:
            at: The input of the layer.
            rows: What the rows of ``at.hidden`` stand for.
            norm: The decoder's final norm, if it has one.

        Returns:
            The probe. It does not see tokens after the prompt, which assisted generation guesses.
        """
        state, index, valid, pictures = self.state, rows.index, rows.valid, rows.pictures
        positions = state.position_ids
        if positions.dim() > 2:
            # (A, B, T) -> (B, T): of 3-D positions the first, time, never falls within a sample.
            positions = positions[0]
        # The number of each input token's packed sample, then that of each row: (B, T0) -> (B, T)
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
