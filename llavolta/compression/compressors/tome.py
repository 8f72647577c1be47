"""Merge the most similar pairs of visual tokens, round by round (ToMe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    first_of,
    require_switch,
    sum_groups,
    take,
)
from llavolta.compression.probe import matmul_float32


@dataclass(frozen=True)
class ToMe(KeepBudget):
    """Merge the most similar pairs of tokens until ``keep`` remain (arXiv 2210.09461, section 3).

    Each round puts the n remaining tokens alternately into A and B. Each token of A is paired with
    the most similar one of B. The ``r = min(n - K, n // 2)`` most similar pairs merge: the mean of
    all tokens that came together stands at the place of the one in B. Tokens stay in raster order.

    Similarity is the cosine of the hidden states; the paper takes a layer's keys. The paper merges
    16 pairs in every layer of the tower and adds the log of the sizes to its attention. Here all
    merging is at one place.

    Attributes:
        proportional: Add the log of each token's size to the attention logits of its key, from this
            layer on (eq. 1). At decoder layers only.
    """

    proportional: bool = False
    name: ClassVar[str] = "tome"

    def __post_init__(self):
        super().__post_init__()
        require_switch(self.name, "proportional", self.proportional)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        left, into = self._merged(
            tokens.hidden.detach().float(), tokens.mask, self.budget(tokens.mask)
        )
        anchor, mask = first_of(left, int(left.sum(1).max()))
        groups = anchor.shape[1]
        group = (left.cumsum(1) - 1).gather(1, into).masked_fill(~tokens.mask, groups)
        size = sum_groups(tokens.mask.float()[..., None], group, groups)
        hidden = sum_groups(tokens.hidden.float(), group, groups) / size.clamp(min=1)
        size = (
            sum_groups(tokens.size[..., None], group, groups)[..., 0].clamp(min=1)
            if self.proportional
            else None
        )
        return CompressedTokens(
            hidden.to(tokens.hidden.dtype), mask, anchor, group=group, size=size
        )

    @staticmethod
    @torch.no_grad()
    def _merged(features: Tensor, mask: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Merge ``features`` (I, L, C) down to ``wanted`` (I,) tokens per row.

        Returns:
            A (I, L) bool mask of the tokens that remain, and the index (I, L) of the token that
            each one is part of.
        """
        left, size = mask.clone(), mask.float()[..., None]
        own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        into = own
        while True:
            count = left.sum(1)
            pairs = torch.minimum(count - wanted, count // 2)  # (I,), r of this round
            if not bool((pairs > 0).any()):
                return left, into
            order, real = first_of(left, int(count.max()))
            a, b = order[:, ::2], order[:, 1::2]  # (I, A), (I, B): indices among the L tokens
            unit = F.normalize(features, dim=-1)
            alike = matmul_float32(take(unit, a), take(unit, b).transpose(1, 2))
            best, partner = alike.masked_fill(~real[:, None, 1::2], -torch.inf).max(-1)
            # Rank the tokens of A by the similarity to their partner, the best first.
            rank = (
                best.masked_fill(~real[:, ::2], -torch.inf)
                .argsort(dim=1, descending=True, stable=True)
                .argsort(dim=1)
            )
            goes = rank < pairs[:, None]  # (I, A)
            place = torch.where(goes, b.gather(1, partner), a)
            moves = own.scatter(1, a, place)  # (I, L), the token that each one becomes part of
            # Means weighted by size, so that a merged token is the mean of all it is made of.
            weighted = torch.zeros_like(features).scatter_add_(
                1, moves[..., None].expand_as(features), features * size * left[..., None]
            )
            size = torch.zeros_like(size).scatter_add_(1, moves[..., None], size * left[..., None])
            features = weighted / size.clamp(min=1)
            left = left & ~torch.zeros_like(left).scatter(1, a, goes)
            into = moves.gather(1, into)
