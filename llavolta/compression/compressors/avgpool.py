"""Average runs of visual tokens: LLaVolta's Visual Context Compressor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    require_int,
    require_switch,
)


@dataclass(frozen=True)
class AveragePool(Compressor):
    """1-D average pooling in raster order: (I, L, C) -> (I, ceil(L / S), C).

    Kernel and stride are S.

    The last window of a row is shorter where S does not divide L; it averages the tokens that it
    has. A pooled token takes the mean position of its window, cut to an integer. Source: LLaVolta,
    arXiv 2406.20092, section 4.1.

    As published, a clip is one row of tokens, so windows cross from frame to frame. At "vision"
    each frame is a row, so there they never do.

    Attributes:
        stride: S, at least 1.
        per_frame: Let no window cross from one frame into the next.
    """

    stride: int
    per_frame: bool = False
    name: ClassVar[str] = "avgpool"

    def __post_init__(self):
        require_int("avgpool", "stride", self.stride, at_least=1)
        require_switch("avgpool", "per_frame", self.per_frame)

    @property
    def over_clips(self) -> bool:
        return not self.per_frame

    @property
    def is_identity(self) -> bool:
        return self.stride == 1

    def num_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.stride)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        images, length, _ = tokens.hidden.shape
        stride = min(self.stride, length)  # else padding would fill a window longer than any row
        windows = self.num_tokens(length)
        pad = windows * stride - length

        mask = F.pad(tokens.mask, (0, pad)).view(images, windows, stride)  # (I, L) -> (I, M, S)
        count = mask.sum(-1)  # (I, M) tokens in each window
        at_least_one = count.clamp(min=1)[..., None]

        # Padding is 0, so that a sum over a window is one over its real tokens.
        hidden = F.pad(
            tokens.hidden * tokens.mask[..., None].to(tokens.hidden.dtype), (0, 0, 0, pad)
        )
        total = hidden.view(images, windows, stride, -1).sum(2, dtype=torch.float32)
        positions = F.pad(tokens.positions * tokens.mask[..., None], (0, 0, 0, pad))
        positions = positions.view(images, windows, stride, -1).sum(2) // at_least_one

        # The anchor is the token at the mean position, the earlier of two middle ones.
        start = torch.arange(windows, device=mask.device) * stride
        anchor = start + (count - 1).clamp(min=0) // 2  # (I, M)
        group = (torch.arange(length, device=mask.device) // stride).expand(images, -1)
        return CompressedTokens(
            (total / at_least_one).to(tokens.hidden.dtype), count > 0, anchor, positions, group
        )
