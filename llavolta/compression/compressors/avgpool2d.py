"""Average squares of the image grid."""

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
    """2-D average pooling of each grid (H, W), with kernel = stride = k.

    L tokens become ceil(H / k) * ceil(W / k). Windows at the right and lower edge are smaller where
    k does not divide the grid; they average the tokens that they have. A pooled token takes the
    place of the token nearest to its window's centre, and the window's mean position, cut to an
    integer. Each frame of a clip has a grid of its own, and a class token before its patches stays.

    It is a baseline in the tables of LLaVA-STF (arXiv 2506.07138). See Downsample for shares other
    than 1 / k^2, and AveragePool3d for windows over several frames. Raises UnsupportedModel for
    tokens that are no rectangle, as after another compressor.

    Attributes:
        kernel: k, at least 1.
    """

    kernel: int
    name: ClassVar[str] = "avgpool2d"

    def __post_init__(self):
        require_int("avgpool2d", "kernel", self.kernel, at_least=1)

    @property
    def is_identity(self) -> bool:
        return self.kernel == 1

    def num_tokens(self, num_tokens: int) -> int:
        """Return the number for a square grid; a number that is no square counts as one row."""
        side = round(num_tokens**0.5)
        height = side if side * side == num_tokens else 1
        return -(-height // self.kernel) * -(-(num_tokens // height) // self.kernel)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return pool_blocks(tokens, 1, self.kernel, str(self))
