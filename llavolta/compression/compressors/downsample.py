"""Resize the grid of visual tokens by area, as if the image were smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    require_share,
)
from llavolta.compression.probe import matmul_float32
from llavolta.errors import UnsupportedModel


@dataclass(frozen=True)
class Downsample(Compressor):
    """Resize each grid (H, W) to round(H sqrt(keep)) x round(W sqrt(keep)) by area, at least 1 x 1.

    Each new token is the mean of the old tokens under its cell, weighted by the area that it covers
    of each. It takes the place and position of the token at its cell's centre.

    It stands for the image downsampling of VTC-Bench (arXiv 2510.07143), but it resizes tokens
    after a tower of fixed input size, not pixels before a tower that takes any. Raises
    UnsupportedModel for tokens that are no rectangle, also for a class token before the patches.

    Attributes:
        keep: Share of the tokens to keep, above 0 and at most 1.
    """

    keep: float = 0.25
    name: ClassVar[str] = "downsample"

    def __post_init__(self):
        require_share("downsample", "keep", self.keep)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def num_tokens(self, num_tokens: int) -> int:
        """Return the number for a square grid; a number that is no square counts as one row."""
        side = round(num_tokens**0.5)
        height = side if side * side == num_tokens else 1
        return self._size(height) * self._size(num_tokens // height)

    def _size(self, side: int) -> int:
        return max(1, round(side * self.keep**0.5))

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        rectangle = tokens.grid.prod(1) == tokens.mask.sum(1)
        if bool((~rectangle | (tokens.grid[:, 0] == 1) & (tokens.grid[:, 1] > 1)).any()):
            raise UnsupportedModel(
                f"{self} needs pictures that are a rectangle of tokens; use avgpool or kmeans here"
            )
        mask, grid = tokens.mask, tokens.grid
        size = (grid.double() * self.keep**0.5).round().clamp(min=1).long()  # (I, 2) the new grid
        count = size.prod(1, keepdim=True)
        old = _rows_and_columns(torch.arange(mask.shape[1], device=mask.device), grid)  # (I, L, 2)
        # Row and column of each new cell: (I, M, 2).
        new = _rows_and_columns(torch.arange(int(count.max()), device=mask.device), size)

        scale = (grid / size)[:, None]  # (I, 1, 2) old tokens per new one
        first, last = new * scale, (new + 1) * scale  # (I, M, 2) edges of each new cell
        # The overlap of cell and token along rows and columns: (I, M, L, 2), below 0 where apart.
        covered = torch.minimum(last[:, :, None], old[:, None] + 1) - torch.maximum(
            first[:, :, None], old[:, None]
        )
        weight = covered.clamp(min=0).prod(-1) * mask[:, None]  # (I, M, L)
        # A cell covers an area of at least 1, so the clamp acts at padding alone.
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        hidden = matmul_float32(weight, tokens.hidden).to(tokens.hidden.dtype)

        # In whole numbers, so that rounding cannot move a centre: the token at each new cell's
        # centre (I, M, 2), and the cell over each old token's centre (I, L, 2).
        centre = ((2 * new + 1) * grid[:, None]) // (2 * size[:, None])
        cell = ((2 * old + 1) * size[:, None]) // (2 * grid[:, None])
        left = torch.arange(new.shape[1], device=mask.device) < count
        return CompressedTokens(
            hidden, left, _number(centre, grid), group=_number(cell, size), grid=size
        )


def _rows_and_columns(number: Tensor, grid: Tensor) -> Tensor:
    """Return row and column (I, n, 2) of token ``number`` (n,) in each grid (I, 2)."""
    width = grid[:, 1:]
    return torch.stack([number // width, number % width], dim=-1)


def _number(place: Tensor, grid: Tensor) -> Tensor:
    """Invert _rows_and_columns: (I, n, 2) -> (I, n)."""
    return place[..., 0] * grid[:, 1:] + place[..., 1]
