"""Average pooling over squares of the image grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llavolta.compressors.base import CompressedTokens, Compressor, VisualTokens, require_int, sum_groups


@dataclass(frozen=True)
class AveragePool2d(Compressor):
    """2-D average pooling, kernel = stride = k, on each picture's (H, W) grid: L -> ceil(H / k) * ceil(W / k) tokens.

    Windows at the right and lower edge are smaller where k does not divide the grid, and average what they hold. A
    pooled token takes the place of the window's token nearest its centre and the mean of its positions, cut to an
    integer. A baseline of LLaVA-STF's tables (arXiv 2506.07138); see Downsample for shares other than 1 / k^2.
    Raises ValueError for tokens that are no rectangle, as after another compressor or with a class token among them.
    """

    kernel: int
    name: ClassVar[str] = "avgpool2d"

    def __post_init__(self):
        require_int("avgpool2d", "kernel", self.kernel, at_least=1)

    @property
    def is_identity(self) -> bool:
        return self.kernel == 1

    def num_tokens(self, num_tokens: int) -> int:
        """For a square grid of ``num_tokens``; anything else is counted as one row."""
        side = round(num_tokens**0.5)
        height = side if side * side == num_tokens else 1
        return -(-height // self.kernel) * -(-(num_tokens // height) // self.kernel)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        k, mask = self.kernel, tokens.mask
        height, width = tokens.grid.unbind(1)
        if bool(((height == 1) & (width > 1)).any()):
            raise ValueError(f"{self} needs pictures that are a rectangle of tokens; use avgpool at this place")
        rows, columns = (height + k - 1) // k, (width + k - 1) // k  # (I,) windows down and across
        windows = int((rows * columns).max())

        place = torch.arange(mask.shape[1], device=mask.device)
        row, column = place // width[:, None], place % width[:, None]  # (I, L)
        group = ((row // k) * columns[:, None] + column // k).masked_fill(~mask, windows)  # padding: a window to spare

        count = sum_groups(mask.long()[..., None], group, windows)[..., 0]
        at_least_one = count.clamp(min=1)[..., None]
        hidden = (sum_groups(tokens.hidden.float(), group, windows) / at_least_one).to(tokens.hidden.dtype)
        positions = sum_groups(tokens.positions, group, windows) // at_least_one

        window = torch.arange(windows, device=mask.device)
        top, left = (window // columns[:, None]) * k, (window % columns[:, None]) * k
        down = torch.minimum(height[:, None] - top, torch.full_like(top, k))
        across = torch.minimum(width[:, None] - left, torch.full_like(left, k))
        anchor = (top + (down - 1) // 2) * width[:, None] + left + (across - 1) // 2
        return CompressedTokens(hidden, count > 0, anchor, positions, group, torch.stack([rows, columns], dim=1))
