"""Average pooling over blocks of a clip: frames x rows x columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    require_int,
    sum_groups,
)
from llavolta.errors import UnsupportedModel

CLIP = 8  # frames of a clip, where only its number of tokens is known


@dataclass(frozen=True)
class AveragePool3d(Compressor):
    """Spatio-temporal average pooling of each clip: windows of T frames of k x k tokens; an image is one frame.

    Windows at the end of the clip and at the right and lower edge are smaller where T or k does not divide, and average
    what they hold. A class token before each frame's patches (Video-LLaVA) is pooled with those of the window's frames.
    A pooled token takes the place of the one nearest its centre in the middle frame of its window, and the mean of its
    positions, cut to an integer. Raises UnsupportedModel for tokens that are no rectangle, as after another compressor.
    """

    frames: int
    kernel: int
    name: ClassVar[str] = "avgpool3d"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})
    over_clips: ClassVar[bool] = True

    def __post_init__(self):
        require_int("avgpool3d", "frames", self.frames, at_least=1)
        require_int("avgpool3d", "kernel", self.kernel, at_least=1)

    @property
    def is_identity(self) -> bool:
        return self.frames == self.kernel == 1

    def num_tokens(self, num_tokens: int) -> int:
        """Of a square image or 8 square frames, with class tokens or without; else of one row."""
        for frames in (1, CLIP):
            for lead in (0, 1):
                side = round(max(num_tokens / frames - lead, 0) ** 0.5)
                if side and (side * side + lead) * frames == num_tokens:
                    return -(-frames // self.frames) * ((-(-side // self.kernel)) ** 2 + lead)
        return -(-num_tokens // self.kernel)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return pool_blocks(tokens, self.frames, self.kernel, str(self))


def pool_blocks(tokens: VisualTokens, frames: int, k: int, owner: str) -> CompressedTokens:
    """The mean of each window of ``frames`` frames of k x k tokens; see AveragePool3d. owner: for error messages."""
    mask, grid = tokens.mask, tokens.grid
    each = mask.sum(1) // tokens.frames  # (V,) tokens of a frame
    lead = each - grid.prod(1)  # 1 where a class token comes first
    if bool(((grid[:, 0] == 1) & (grid[:, 1] > 1)).any()):
        raise UnsupportedModel(
            f"{owner} needs pictures that are a rectangle of tokens; use avgpool at this place"
        )
    each, lead, length, height, width = (
        v[:, None] for v in (each, lead, tokens.frames, *grid.unbind(1))
    )
    rows, columns, blocks = (
        (height + k - 1) // k,
        (width + k - 1) // k,
        (length + frames - 1) // frames,
    )
    per_block = rows * columns + lead
    windows = int((blocks * per_block).max())

    place = torch.arange(mask.shape[1], device=mask.device)
    frame, patch = place // each, place % each - lead  # (V, L)
    inside = torch.where(patch < 0, 0, lead + patch // width // k * columns + patch % width // k)
    group = (frame // frames * per_block + inside).masked_fill(
        ~mask, windows
    )  # padding: a window to spare

    count = sum_groups(mask.long()[..., None], group, windows)[..., 0]
    at_least_one = count.clamp(min=1)[..., None]
    hidden = (sum_groups(tokens.hidden.float(), group, windows) / at_least_one).to(
        tokens.hidden.dtype
    )
    positions = sum_groups(tokens.positions, group, windows) // at_least_one

    window = torch.arange(windows, device=mask.device)
    block, cell = window // per_block, window % per_block - lead

    def middle(first, most, size):
        return first + (torch.minimum(most - first, torch.full_like(first, size)) - 1) // 2

    row, column = middle(cell // columns * k, height, k), middle(cell % columns * k, width, k)
    anchor = middle(block * frames, length, frames) * each + torch.where(
        cell < 0, 0, lead + row * width + column
    )
    left = torch.cat([rows, columns], dim=1)
    return CompressedTokens(hidden, count > 0, anchor, positions, group, left, blocks[:, 0])
