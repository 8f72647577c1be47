"""Class attention: keep the patches that the vision tower's class token looks at most (FasterVLM, HiRED)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    keep_tokens,
    largest_of,
    require_share,
)


@dataclass(frozen=True)
class ClassAttention(KeepBudget):
    """Keep the ``keep`` tokens of the largest class attention, in raster order.

    ``a = mean over heads h of softmax(q_cls^h k^h / sqrt(d))`` in the layer whose output the model selects (FasterVLM,
    arXiv 2412.01818v1). Where the tower has no class token: the attention that each patch receives.

    overview: HiRED's (arXiv 2408.10945; 0.5 there) budget over all tiles of an image, at "vision". Of the ``keep`` of
    all its t tiles, ``B = int(t L keep)``, its overview gets ``int(B overview)``, and each tile a part of the rest in
    proportion to how many of the overview's ``int(L (1 - overview))`` patches of the largest class attention in the
    tower's *first* layer lie where the tile is, rounded down: it may be none. 0: each tile is a picture of its own.
    As in the paper a tile's place is spatial (the public code cuts the raster in runs); the margin around an image
    that does not fill its tiles is not taken out.
    """

    overview: float = 0.0
    name: ClassVar[str] = "cls"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("selected",)

    def __post_init__(self):
        super().__post_init__()
        if self.overview != 0 or self.overview is False:
            require_share(self.name, "overview", self.overview)
            object.__setattr__(self, "needs", self.needs | {"tiles"})
            object.__setattr__(self, "tower_layers", ("selected", 0))

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        count = self.budget(tokens.mask)
        if self.overview and tokens.tiles is not None:
            count = self._shares(tokens, count)
        return keep_tokens(tokens, largest_of(tokens.salience(), count, tokens.mask))

    def _shares(self, tokens: VisualTokens, each: Tensor) -> Tensor:
        """(I,) the tokens of each tile, of images whose tiles alone would have ``each`` (I,)."""
        image, row, column, rows, columns = tokens.tiles.unbind(1)
        length, side = tokens.mask.shape[1], int(tokens.grid[0, 0])
        first, tiles = row < 0, image.bincount()  # (images,)
        total = tiles * each[0] if self.keep > 1 else (tiles.double() * length * self.keep).int().clamp(min=1)
        given = torch.where(tiles > 1, (total.double() * self.overview).int().clamp(min=1), total).clamp(max=length)

        marked = tokens.salience(0)[first].topk(int(length * (1 - self.overview)), dim=1).indices
        marks = torch.zeros(len(tiles), length, device=marked.device).scatter(1, marked, 1.0).view(-1, side, side)
        at = torch.arange(side, device=marked.device)
        down = at * rows[:, None] // side == row[:, None]  # (I, side): where the tile lies in its overview
        across = at * columns[:, None] // side == column[:, None]
        inside = (marks[image] * down[:, :, None] * across[:, None, :]).sum((1, 2)).long()
        rest = (total - given)[image] * inside // marks.sum((1, 2)).long().clamp(min=1)[image]
        return torch.where(first, given[image], rest.clamp(max=length))
