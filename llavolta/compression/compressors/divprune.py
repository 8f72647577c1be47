"""Keep the visual tokens that differ most from one another (DivPrune)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    choose_greedily,
    cosines,
    keep_tokens,
)


@dataclass(frozen=True)
class DivPrune(KeepBudget):
    """Choose tokens greedily so that the smallest distance between any two is large.

    The distance is 1 - cosine of the hidden states. The first token is the one whose nearest other
    token is farthest. Each next one is the token with the largest minimum distance to those chosen
    (arXiv 2503.02175, section 3.2). Neither attention nor the question is read. Tokens stay in
    raster order.

    A share ``keep`` is rounded, as published for LLaVA: 0.098 of 576 is 56. Each token is chosen
    once; the public code may choose one of several equal tokens twice.
    """

    name: ClassVar[str] = "divprune"

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(
            tokens, self._diverse(tokens.hidden.detach(), tokens.mask, self.budget(tokens.mask))
        )

    @staticmethod
    def _diverse(hidden: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        """Return the chosen tokens as a (I, L) bool mask; ``count`` (I,) of each row."""
        distance = (1 - cosines(hidden)).masked_fill(~mask[:, None], torch.inf)
        picture = torch.arange(len(hidden), device=hidden.device)  # indices of the rows

        def nearest_chosen(step: int, chosen: Tensor, gain: Tensor) -> Tensor:
            # The first choice starts the minimum anew: the first gain was over all tokens.
            own = distance[picture, chosen]  # (I, L)
            return own if step == 0 else torch.minimum(gain, own)

        # The distance (I, L) of each token to its nearest other one; its own, 0, does not count.
        nearest = distance.diagonal_scatter(
            distance.new_full(mask.shape, torch.inf), dim1=1, dim2=2
        ).amin(2)
        return choose_greedily(count, mask, nearest, nearest_chosen)
