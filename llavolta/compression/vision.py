"""The plan's "vision" entry: a compressor before the projector, whose gaps layer 0 closes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llavolta.compression.compressors import CompressedTokens, Compressor, VisualTokens, keep_tokens
from llavolta.compression.compressors.base import check_output
from llavolta.compression.families import Parts, tower_attentions, tower_heads, without_class_token
from llavolta.compression.plan import VISION
from llavolta.compression.probe import TowerLayer, TowerProbe
from llavolta.errors import UnsupportedModel

BLENDED = (
    "this model blends neighbouring tokens behind the projector, so 'vision' cannot drop any before it; use layer 0"
)
DROPPED = torch.nan  # marks the features of tokens that a compressor before the projector removed


@dataclass(frozen=True)
class DropMarked(Compressor):
    """Drops the tokens that the compressor before the projector removed; ``close``: and closes the gaps."""

    close: bool

    @property
    def contiguous(self) -> bool:
        return self.close

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        left = keep_tokens(tokens, ~tokens.hidden[..., 0].isnan())
        if not left.mask.any(1).all():
            raise UnsupportedModel(BLENDED)
        return left

    def num_tokens(self, num_tokens: int) -> int:
        return num_tokens


class _Now(threading.local):
    """Between the tower and what is behind the projector, in this thread."""

    kept: tuple[CompressedTokens, int] | None = None  # what the projector works on, and how many tokens it was

    def __init__(self):
        self.tower: dict[tuple, Tensor] = {}  # what the last tower gave, until the projector takes it


class VisionStep:
    """What happens around the projector; attentions: those of the towers that are watched, if ``compressor`` asks."""

    def __init__(self, compressor: Compressor, parts: Parts, plan: str, observe: Callable | None):
        if parts.projector is None:
            raise UnsupportedModel(
                f"plan {plan!r}: the projector of {type(parts.base).__name__} merges tokens "
                "itself, so nothing can be compressed before it; use layer 0, which is behind it"
            )
        self.compressor, self.observe = compressor, observe
        asks = "tower" in compressor.needs
        self.attentions = tower_attentions(parts, compressor.tower_layers) if asks else {}
        lacking = without_class_token(parts)
        self.class_token = not lacking
        if "class_token" in compressor.needs and lacking:
            raise UnsupportedModel(
                f"{', '.join(lacking)} has no class token whose attention could rank patches; use a compressor that "
                "needs none, such as cls, visionzip or kmeans"
            )
        self._now = _Now()

    def hooks(self, add: Callable) -> None:
        """Watch the projections of queries and keys in the layers that the compressor lists."""
        for layer, attentions in self.attentions.items():
            for attention in attentions:
                for name in ("query", "key"):
                    note = partial(self._note_tower, (layer, name))
                    add(getattr(attention, f"{name[0]}_proj").register_forward_hook(note))

    def _note_tower(self, where: tuple, module, args, output) -> None:
        self._now.tower[where] = output.detach()

    def shorten(self, hidden: Tensor, training: bool) -> Tensor:
        """hidden (I, L, D) of the tower -> (I, M, D), which the projector works on."""
        if hidden.dim() != 3:
            raise UnsupportedModel(f"'vision' needs the projector to get (pictures, tokens, width), not {hidden.shape}")
        images, length, _ = hidden.shape
        mask = torch.ones(images, length, dtype=torch.bool, device=hidden.device)
        positions = torch.arange(length, device=hidden.device)[None, :, None].expand(images, -1, -1)
        side = round(length**0.5)
        grid = torch.tensor((side, side) if side * side == length else (1, length), device=hidden.device)
        probe = self._probe(images, length)
        tokens = VisualTokens(hidden, mask, positions, grid.expand(images, -1), training, probe)
        out, _ = check_output(self.compressor(tokens), tokens, f"compressor {self.compressor} at 'vision'")
        if self.observe is not None:
            self.observe(VISION, tokens, out)
        self._now.kept = out, length
        return out.hidden

    def spread(self, output: Tensor) -> Tensor:
        """The projector's output (I, M, C) -> (I, L, C) with each token at its anchor, DROPPED elsewhere."""
        (out, length), self._now.kept = self._now.kept, None
        if output.shape[:2] != out.mask.shape:
            raise UnsupportedModel("'vision' needs a projector that maps token by token; use layer 0, behind it")
        if (output.isnan() & out.mask[..., None]).any():  # else taken for DROPPED
            raise FloatingPointError("the projector gave NaN; check its weights and the learning rate")
        # Padding goes to a row to spare.
        index = out.anchor.masked_fill(~out.mask, length)[..., None].expand_as(output)
        rows = output.new_full((output.shape[0], length + 1, output.shape[2]), DROPPED)
        return rows.scatter(1, index, output)[:, :length]

    def _probe(self, images: int, length: int) -> TowerProbe | None:
        if not self.attentions:
            return None
        noted, self._now.tower = self._now.tower, {}
        layers = {
            layer: TowerLayer(noted[layer, "query"], noted[layer, "key"], tower_heads(attentions[0]))
            for layer, attentions in self.attentions.items()
        }
        probe = TowerProbe(layers, length, self.class_token)
        given = next(iter(layers.values())).key.shape[:2]
        if given[0] != images or not probe.fits:
            raise UnsupportedModel(
                f"the vision tower made {given[0]} x {given[1]} tokens, but {images} x {length} reach the projector: "
                f"it is unknown which became which, so {self.compressor} cannot rank them; use a compressor that needs "
                "no attention of the tower, such as downsample or kmeans"
            )
        return probe
