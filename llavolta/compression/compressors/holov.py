"""Keep some visual tokens of every part of the image, more of the salient parts (HoloV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    by_size,
    cosines,
    keep_tokens,
    require_choice,
    require_int,
    require_number,
)

Shape = Literal["square", "rows"]


@dataclass(frozen=True)
class HoloV(KeepBudget):
    """Divide ``keep`` tokens among ``crops`` parts of the image, and keep the best of each.

    1. a is the class attention times 1000. v is the variance of a token's cosines to the tokens of
       its crop, its own counted as 0, scaled per image to the mean of a.
    2. The score of a crop is the mean of ``a + alpha * v`` over its tokens. Its budget is
       ``floor(K * score / sum of scores)``. The remainder goes to the best crops, one token each.
    3. Each crop keeps the tokens of largest a, up to its budget.

    Where a crop has fewer tokens than its budget, the surplus goes to the best crops with room. The
    public code loses it and appends zeros. Tokens stay in raster order; those of the public code
    are in order of attention within each crop. In a tower without a class token, a is the mean
    attention that a patch receives. Source: arXiv 2510.02912, section 3, and its public code, which
    works at layer 0.

    Attributes:
        crops: Number of crops. A square number if they are square.
        alpha: Weight of the variance.
        shape: "square", a grid of sqrt(crops) x sqrt(crops); or "rows", runs of tokens in raster
            order of equal length, as published. Tokens that are no rectangle are cut into runs.
    """

    crops: int = 16
    alpha: float = 0.09
    shape: Shape = "square"
    name: ClassVar[str] = "holov"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("selected",)

    def __post_init__(self):
        super().__post_init__()
        require_int(self.name, "crops", self.crops, at_least=1, at_most=10_000)
        require_choice(self.name, "shape", self.shape, Shape)
        if self.shape == "square" and round(self.crops**0.5) ** 2 != self.crops:
            raise ValueError(
                f"{self.name}: square crops are a square number, such as 16, not {self.crops}"
            )
        require_number(self.name, "alpha", self.alpha)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return by_size(tokens, self._shared, tokens.salience())

    @torch.no_grad()
    def crop(self, tokens: VisualTokens) -> Tensor:
        """Return the crop (L,) of each token, for rows of one size."""
        length = tokens.mask.shape[1]
        height, width = tokens.grid[0].tolist()
        place = torch.arange(length, device=tokens.mask.device)
        if self.shape == "rows" or 1 in (height, width) or height * width != length:
            return place * self.crops // length
        side = round(self.crops**0.5)
        return (place // width * side // height) * side + place % width * side // width

    def _shared(self, tokens: VisualTokens, salience: Tensor) -> CompressedTokens:
        """Keep the tokens of each crop's budget, for rows of one size."""
        crop, count = self.crop(tokens), self.num_tokens(tokens.mask.shape[1])
        member = torch.nn.functional.one_hot(crop, self.crops).float()  # (L, crops)
        size = member.sum(0)
        budget = _shares(self.scores(tokens, salience, crop), size, count)
        # Sort by attention, then stably by crop: crop by crop, the best token first. (I, L)
        order = salience.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, crop[order].argsort(dim=1, stable=True))
        # The rank of each slot within its crop (L,): the slot less the crop's first slot.
        rank = (
            torch.arange(len(crop), device=crop.device)
            - (size.cumsum(0) - size)[crop.sort().values]
        )
        # From slots back to tokens: (I, L).
        rank = torch.empty_like(order).scatter_(1, order, rank.long().expand_as(order).contiguous())
        return keep_tokens(tokens, rank < budget.long()[:, crop])

    @torch.no_grad()
    def scores(self, tokens: VisualTokens, salience: Tensor, crop: Tensor) -> Tensor:
        """Return the score (I, crops) of each crop, 0 for one without tokens.

        Args:
            tokens: The visual tokens, of rows of one size.
            salience: (I, L) class attention.
            crop: (L,) index of each token's crop.
        """
        inside = (crop[:, None] == crop).float()  # (L, L), 1 for two tokens of one crop
        size = inside.sum(1)
        alike = cosines(tokens.hidden) * inside * (1 - torch.eye(len(crop), device=crop.device))
        # The mean is over the crop, the zeroed diagonal included, as in the public code.
        away = (alike - (alike.sum(-1) / size)[..., None]) * inside
        variance = away.square().sum(-1) / (size - 1).clamp(min=1)
        attention = 1000 * salience
        scale = attention.abs().mean(1, keepdim=True) / variance.abs().mean(1, keepdim=True).clamp(
            min=1e-12
        )
        member = torch.nn.functional.one_hot(crop, self.crops).float()
        return (attention + self.alpha * scale * variance) @ member / member.sum(0).clamp(min=1)


def _shares(scores: Tensor, size: Tensor, count: int) -> Tensor:
    """Divide ``count`` tokens among the crops (I, crops), at most ``size`` (crops,) to each."""
    total = scores.sum(1, keepdim=True).clamp(min=1e-12)
    share = (count * scores.double() / total).floor()
    order = scores.masked_fill(size == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    share = torch.minimum(share + (rank < count - share.sum(1, keepdim=True)), size)
    # Fill the crops up in order of score until the surplus is used.
    room = (size - share).gather(1, order)
    lost = count - share.sum(1, keepdim=True)
    more = torch.minimum(room, (lost - (room.cumsum(1) - room)).clamp(min=0))
    return share + torch.zeros_like(share).scatter(1, order, more)
