"""Average pooling over squares of the image grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llavolta.compression.compressors.avgpool3d import pool_blocks
from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    require_int,
)


@dataclass(frozen=True)
class AveragePool2d(Compressor):
    """2-D average pooling, kernel = stride = k, on each picture's (H, W) grid: L -> ceil(H / k) * ceil(W / k) tokens.

    Windows at the right and lower edge are smaller where k does not divide the grid, and average what they hold. A
    pooled token takes the place of the window's token nearest its centre and the mean of its positions, cut to an
    integer. A baseline of LLaVA-STF's tables (arXiv 2506.07138); see Downsample for shares other than 1 / k^2.
    Each frame of a clip is a picture; a class token before its patches stays. Raises ValueError for tokens that are no
    rectangle, as after another compressor. See AveragePool3d for windows over several frames.
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
        return pool_blocks(tokens, 1, self.kernel, str(self))
