"""Keep tokens by early and late attention of the tower, and merge the others (VScan)."""

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
    """Keep tokens by local and global attention, and merge all others: the first stage of VScan.

    1. int(K / 2) of K = ``keep`` tokens are local: the best of each ``window`` x ``window`` part of
       the image, equally many in each, by the class attention of an early tower layer (index 5 of
       24). The remainder of this division is taken by that attention alone; the public code drops
       it.
    2. The others are global: the best remaining tokens by the class attention of the layer whose
       output the model selects.
    3. Each dropped token joins the kept token of highest cosine, which becomes the plain mean.

    The second stage, at layer 16 of 32, is PyramidDrop's: "64 tokens" are
    ``0:vscan:96;16:pyramiddrop:0.334``. In a tower without a class token, tokens are ranked by the
    mean attention that a patch receives. Source: arXiv 2505.22654, section 3.2, and its public
    code, which merges after the projector, so at layer 0 of a plan.

    Attributes:
        window: Side of a window in tokens, at least 1.
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
        """Return a (I, L) bool mask of the tokens to keep, for rows of one size.

        Args:
            tokens: The visual tokens.
            local: (I, L) class attention of the early layer.
            salience: (I, L) class attention of the selected layer.
        """
        (images, length), total = tokens.mask.shape, self.num_tokens(tokens.mask.shape[1])
        height, width = tokens.grid[0].tolist()
        place = torch.arange(length, device=local.device)
        if height * width != length:  # no rectangle, such as patches after a class token: one row
            height, width = 1, length
        across = -(-width // self.window)
        # The window (L,) of each token, and its rank within it by local attention (I, L).
        part = place // width // self.window * across + place % width // self.window
        rank = torch.zeros_like(local, dtype=torch.long)
        for number in range(int(part[-1]) + 1):  # each window, in all rows at once
            inside = (part == number).nonzero()[:, 0]
            rank[:, inside] = (
                local[:, inside].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            )
        half, windows = total // 2, int(part[-1]) + 1
        kept = rank < half // windows
        # The remainder of the division, and windows with fewer tokens than that, leave some over.
        rest = torch.full((images,), half, device=local.device) - kept.sum(1)
        kept = kept | largest_of(local, rest, ~kept)
        return kept | largest_of(salience, torch.full_like(rest, total) - kept.sum(1), ~kept)

    def _scanned(self, tokens: VisualTokens, local: Tensor, salience: Tensor) -> CompressedTokens:
        """Compress rows of one size."""
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
    """Find the most similar kept token of each token.

    Args:
        hidden: (I, L, C) tokens.
        kept: (I, L) bool, the kept tokens.
        anchor: (I, M) indices of the kept tokens, rising.
        mask: (I, M) bool, False at padding of ``anchor``. None: there is no padding.

    Returns:
        (I, L) index 0..M - 1 of the kept token of highest cosine; a kept token has its own.
    """
    alike = cosines(hidden).gather(2, anchor[:, None].expand(-1, hidden.shape[1], -1))
    alike = alike if mask is None else alike.masked_fill(~mask[:, None], -torch.inf)
    return torch.where(kept, kept.cumsum(1) - 1, alike.argmax(-1))
