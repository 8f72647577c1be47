"""VScan: half of the tokens from early, window by window, half from late attention; the others merge into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    by_size,
    cosines,
    first_of,
    largest_of,
    require_int,
    sum_groups,
)


@dataclass(frozen=True)
class VScan(KeepBudget):
    """The first stage of VScan (arXiv 2505.22654, section 3.2, and its public code), at layer 0: behind the projector.

    Of K = ``keep`` tokens int(K / 2) are the best of each ``window`` x ``window`` part of the picture by the class
    attention of an early layer of the tower (5 of 24), equally many in each, the rest of them by that attention alone
    (the public code leaves them out); the others are the best of the rest by the layer whose output the model selects.
    Each dropped token goes to the kept one of highest cosine, which becomes the plain mean. Its second stage, at layer
    16 of 32, is PyramidDrop's: "64 tokens" are ``0:vscan:96;16:pyramiddrop:0.334``. Where the tower has no class token:
    the attention that each patch receives.
    """

    window: int = 6
    name: ClassVar[str] = "vscan"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("early", "selected")

    def __post_init__(self):
        super().__post_init__()
        require_int(self.name, "window", self.window, at_least=1)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return by_size(tokens, self._scanned, tokens.salience("early"), tokens.salience("selected"))

    @torch.no_grad()
    def kept(self, tokens: VisualTokens, local: Tensor, salience: Tensor) -> Tensor:
        """(I, L) bool, of pictures of one size."""
        (images, length), total = tokens.mask.shape, self.num_tokens(tokens.mask.shape[1])
        height, width = tokens.grid[0].tolist()
        place = torch.arange(length, device=local.device)
        if height * width != length:
            height, width = 1, length
        across = -(-width // self.window)
        part = place // width // self.window * across + place % width // self.window
        rank = torch.zeros_like(local, dtype=torch.long)
        for number in range(int(part[-1]) + 1):  # the windows of one size, for all pictures at once
            inside = (part == number).nonzero()[:, 0]
            rank[:, inside] = (
                local[:, inside].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            )
        half, windows = total // 2, int(part[-1]) + 1
        kept = rank < half // windows
        rest = torch.full((images,), half, device=local.device) - kept.sum(1)
        kept = kept | largest_of(local, rest, ~kept)
        return kept | largest_of(salience, torch.full_like(rest, total) - kept.sum(1), ~kept)

    def _scanned(self, tokens: VisualTokens, local: Tensor, salience: Tensor) -> CompressedTokens:
        kept = self.kept(tokens, local, salience)
        total = int(kept[0].sum())
        anchor, mask = first_of(kept, total)
        group = nearest_kept(tokens.hidden, kept, anchor)
        size = sum_groups(torch.ones_like(group, dtype=torch.float)[..., None], group, total)
        hidden = sum_groups(tokens.hidden.float(), group, total) / size
        return CompressedTokens(hidden.to(tokens.hidden.dtype), mask, anchor, group=group)


@torch.no_grad()
def nearest_kept(
    hidden: Tensor, kept: Tensor, anchor: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(I, L) for each token of hidden (I, L, C) the number of the anchor (I, M), one of those ``kept`` (I, L), to which
    it has the highest cosine; a kept one its own. mask (I, M): False at padding of ``anchor``."""
    alike = cosines(hidden).gather(2, anchor[:, None].expand(-1, hidden.shape[1], -1))
    alike = alike if mask is None else alike.masked_fill(~mask[:, None], -torch.inf)
    return torch.where(kept, kept.cumsum(1) - 1, alike.argmax(-1))
