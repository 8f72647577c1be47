"""DivPrune: keep the tokens that differ most from one another."""

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
    """Keep tokens whose smallest distance to one another is as large as a greedy choice makes it.

    Distance: 1 - cosine of the hidden states. First comes the token whose nearest other one is farthest away, then,
    again and again, the one whose nearest chosen one is (arXiv 2503.02175, section 3.2). Raster order; no score of
    attention, no question. A share ``keep`` is rounded, as published for LLaVA (0.098 of 576: 56). A token is chosen
    once, also where several are equal; the public code may take it again.
    """

    name: ClassVar[str] = "divprune"

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(
            tokens, self._diverse(tokens.hidden.detach(), tokens.mask, self.budget(tokens.mask))
        )

    @staticmethod
    def _diverse(hidden: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        distance = (1 - cosines(hidden)).masked_fill(~mask[:, None], torch.inf)
        picture = torch.arange(len(hidden), device=hidden.device)

        def nearest_chosen(step: int, chosen: Tensor, gain: Tensor) -> Tensor:
            own = distance[picture, chosen]
            return own if step == 0 else torch.minimum(gain, own)

        nearest = distance.diagonal_scatter(
            distance.new_full(mask.shape, torch.inf), dim1=1, dim2=2
        ).amin(2)
        return choose_greedily(count, mask, nearest, nearest_chosen)
