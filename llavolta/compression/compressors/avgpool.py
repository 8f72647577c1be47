"""Average pooling over runs of visual tokens: LLaVolta's Visual Context Compressor."""

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
    """1-D average pooling, kernel = stride = S, in raster order: ``H_K (I, L, C) -> (I, ceil(L / S), C)``.

    The last window of an image is shorter where S does not divide L, and averages what it holds. A pooled token
    takes the mean of its window's positions, cut to an integer. Source: arXiv 2406.20092, section 4.1. As published, a
    clip is one row of tokens, and windows cross from frame to frame; per_frame: they do not. At "vision", where frames
    come one by one, they never do.
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
        stride = min(self.stride, length)  # no padding to a window longer than any image
        windows = self.num_tokens(length)
        pad = windows * stride - length

        mask = F.pad(tokens.mask, (0, pad)).view(images, windows, stride)
        count = mask.sum(-1)  # (I, M) tokens in each window
        at_least_one = count.clamp(min=1)[..., None]

        hidden = F.pad(
            tokens.hidden * tokens.mask[..., None].to(tokens.hidden.dtype), (0, 0, 0, pad)
        )
        total = hidden.view(images, windows, stride, -1).sum(2, dtype=torch.float32)
        positions = F.pad(tokens.positions * tokens.mask[..., None], (0, 0, 0, pad))
        positions = positions.view(images, windows, stride, -1).sum(2) // at_least_one

        start = torch.arange(windows, device=mask.device) * stride
        anchor = start + (count - 1).clamp(min=0) // 2  # the token that stands at the mean position
        group = (torch.arange(length, device=mask.device) // stride).expand(images, -1)
        return CompressedTokens(
            (total / at_least_one).to(tokens.hidden.dtype), count > 0, anchor, positions, group
        )
