"""Average blocks of a clip: frames x rows x columns."""

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

CLIP = 8  # frames that a clip is taken to have, where only its number of tokens is known


@dataclass(frozen=True)
class AveragePool3d(Compressor):
    """Spatio-temporal average pooling of each clip, in windows of T frames of k x k tokens.

    An image is a clip of one frame. Windows at the end of the clip and at the right and lower edge
    are smaller where T or k does not divide; they average the tokens that they have. Class tokens
    before the patches of each frame (Video-LLaVA) are averaged over the window's frames. A pooled
    token takes the place of the token nearest to its window's centre, in its middle frame, and the
    window's mean position, cut to an integer.

    Raises UnsupportedModel for tokens that are no rectangle, as after another compressor. At
    decoder layers only.

    Attributes:
        frames: T, at least 1.
        kernel: k, at least 1.
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
        """Return the number for a square image or 8 square frames, with or without class tokens.

        Any other number counts as one row of tokens.
        """
        for frames in (1, CLIP):
            for lead in (0, 1):
                side = round(max(num_tokens / frames - lead, 0) ** 0.5)
                if side and (side * side + lead) * frames == num_tokens:
                    return -(-frames // self.frames) * ((-(-side // self.kernel)) ** 2 + lead)
        return -(-num_tokens // self.kernel)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return pool_blocks(tokens, self.frames, self.kernel, str(self))


def pool_blocks(tokens: VisualTokens, frames: int, k: int, owner: str) -> CompressedTokens:
    """Average each window of ``frames`` frames of k x k tokens: see AveragePool3d.

    Args:
        tokens: Rows (V, L, C) of images or clips.
        frames: Frames of a window.
        k: Rows and columns of a window.
        owner: The compressor, for error messages.

    Returns:
        The windows in the order of the tokens: block of frames by block, class token, rows,
        columns.

    Raises:
        UnsupportedModel: The tokens of a row are no known rectangle.
    """
    mask, grid = tokens.mask, tokens.grid
    each = mask.sum(1) // tokens.frames  # (V,) tokens of a frame
    lead = each - grid.prod(1)  # (V,) 1 where a class token stands before the patches
    if bool(((grid[:, 0] == 1) & (grid[:, 1] > 1)).any()):
        raise UnsupportedModel(
            f"{owner} needs pictures that are a rectangle of tokens; use avgpool at this place"
        )
    # (V,) -> (V, 1), to combine with the tokens or the windows of each row.
    each, lead, length, height, width = (
        v[:, None] for v in (each, lead, tokens.frames, *grid.unbind(1))
    )
    rows, columns, blocks = (
        (height + k - 1) // k,
        (width + k - 1) // k,
        (length + frames - 1) // frames,
    )
    per_block = rows * columns + lead  # windows of one block of frames
    windows = int((blocks * per_block).max())

    # The window of each token: its block of frames, then its row and column of windows.
    place = torch.arange(mask.shape[1], device=mask.device)
    frame, patch = place // each, place % each - lead  # (V, L)
    inside = torch.where(patch < 0, 0, lead + patch // width // k * columns + patch % width // k)
    # Padding goes to one window more, which sum_groups leaves out.
    group = (frame // frames * per_block + inside).masked_fill(~mask, windows)

    count = sum_groups(mask.long()[..., None], group, windows)[..., 0]
    at_least_one = count.clamp(min=1)[..., None]
    hidden = (sum_groups(tokens.hidden.float(), group, windows) / at_least_one).to(
        tokens.hidden.dtype
    )
    positions = sum_groups(tokens.positions, group, windows) // at_least_one

    # The inverse for each window: its block, and its cell (-1 for the class token).
    window = torch.arange(windows, device=mask.device)
    block, cell = window // per_block, window % per_block - lead

    def middle(first, most, size):
        """Return the middle token of a window of ``size`` from ``first``, cut off at ``most``."""
        return first + (torch.minimum(most - first, torch.full_like(first, size)) - 1) // 2

    row, column = middle(cell // columns * k, height, k), middle(cell % columns * k, width, k)
    anchor = middle(block * frames, length, frames) * each + torch.where(
        cell < 0, 0, lead + row * width + column
    )
    left = torch.cat([rows, columns], dim=1)
    return CompressedTokens(hidden, count > 0, anchor, positions, group, left, blocks[:, 0])
