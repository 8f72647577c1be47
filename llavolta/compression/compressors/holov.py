"""HoloV: every part of the picture keeps some tokens, the more telling ones more."""

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
    """Share ``keep`` tokens out among ``crops`` parts of the picture, and take the best of each by class attention
    (arXiv 2510.02912, section 3, and its public code; published at layer 0).

    With a the class attention times 1000 and v the variance of a token's cosines to its crop (its own counted as 0),
    scaled to the mean of a: a crop's score is the mean of ``a + alpha * v``, its share ``floor(K * score / sum)``, and
    what is left over goes, one each, to the best crops. shape: "square", a grid of sqrt(crops) x sqrt(crops); "rows",
    runs of equally many tokens in raster order, as published. Where a crop has fewer tokens than its share, the rest
    goes to the best crops with room; the public code loses it, and fills up with zeros. Raster order; the public code's
    is by attention within a crop. Where the tower has no class token: the attention that each patch receives.
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
        """(L,) the crop of each token of pictures of one size."""
        length = tokens.mask.shape[1]
        height, width = tokens.grid[0].tolist()
        place = torch.arange(length, device=tokens.mask.device)
        if self.shape == "rows" or 1 in (height, width) or height * width != length:
            return place * self.crops // length
        side = round(self.crops**0.5)
        return (place // width * side // height) * side + place % width * side // width

    def _shared(self, tokens: VisualTokens, salience: Tensor) -> CompressedTokens:
        crop, count = self.crop(tokens), self.num_tokens(tokens.mask.shape[1])
        member = torch.nn.functional.one_hot(crop, self.crops).float()  # (L, crops)
        size = member.sum(0)
        budget = _shares(self.scores(tokens, salience, crop), size, count)
        order = salience.argsort(dim=1, descending=True, stable=True)
        order = order.gather(
            1, crop[order].argsort(dim=1, stable=True)
        )  # crop by crop, the best first
        rank = (
            torch.arange(len(crop), device=crop.device)
            - (size.cumsum(0) - size)[crop.sort().values]
        )
        rank = torch.empty_like(order).scatter_(1, order, rank.long().expand_as(order).contiguous())
        return keep_tokens(tokens, rank < budget.long()[:, crop])

    @torch.no_grad()
    def scores(self, tokens: VisualTokens, salience: Tensor, crop: Tensor) -> Tensor:
        """(I, crops), 0 of one without tokens."""
        inside = (crop[:, None] == crop).float()
        size = inside.sum(1)
        alike = cosines(tokens.hidden) * inside * (1 - torch.eye(len(crop), device=crop.device))
        away = (alike - (alike.sum(-1) / size)[..., None]) * inside
        variance = away.square().sum(-1) / (size - 1).clamp(min=1)
        attention = 1000 * salience
        scale = attention.abs().mean(1, keepdim=True) / variance.abs().mean(1, keepdim=True).clamp(
            min=1e-12
        )
        member = torch.nn.functional.one_hot(crop, self.crops).float()
        return (attention + self.alpha * scale * variance) @ member / member.sum(0).clamp(min=1)


def _shares(scores: Tensor, size: Tensor, count: int) -> Tensor:
    """(I, crops) how many of ``count`` tokens each crop keeps, of those it has: size (crops,)."""
    total = scores.sum(1, keepdim=True).clamp(min=1e-12)
    share = (count * scores.double() / total).floor()
    order = scores.masked_fill(size == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    share = torch.minimum(share + (rank < count - share.sum(1, keepdim=True)), size)
    room = (size - share).gather(1, order)
    lost = count - share.sum(1, keepdim=True)
    more = torch.minimum(room, (lost - (room.cumsum(1) - room)).clamp(min=0))
    return share + torch.zeros_like(share).scatter(1, order, more)
