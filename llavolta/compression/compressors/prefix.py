"""Insert extra tokens before the visual tokens that a compressor keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llavolta.compression.compressors.base import CompressedTokens, Compressor, VisualTokens


@dataclass(frozen=True, eq=False)
class Prefixed(Compressor):
    """Put extra tokens before the output of ``compressor`` for each image.

    They take the places of dropped tokens, so each image must lose at least P. The sequence closes
    up: positions are those of a prompt that holds the prefix and the kept tokens in place of the
    image.

    Attributes:
        compressor: The compressor whose output follows the prefix.
        prefix: Called with the number of rows I, returns embeddings (I, P, C).
    """

    compressor: Compressor
    prefix: nn.Module

    @property
    def needs(self) -> frozenset[str]:
        return self.compressor.needs

    @property
    def tower_layers(self) -> tuple[str | int, ...]:
        return self.compressor.tower_layers

    @property
    def over_clips(self) -> bool:
        return self.compressor.over_clips

    @property
    def contiguous(self) -> bool:
        return True

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        left = self.compressor(tokens)
        prefix: Tensor = self.prefix(len(left.hidden)).to(left.hidden.dtype)
        more, count = prefix.shape[1], tokens.mask.sum(1)
        if (left.mask.sum(1) + more > count).any():
            raise ValueError(
                f"no room for {more} tokens before each picture: {self.compressor} must drop "
                f"at least as many of its {int(count.min())}"
            )
        # Any rising anchors will do, since the sequence closes up: P from the first place on, then
        # those of the kept tokens, moved back where they would not rise.
        place = torch.arange(more + left.mask.shape[1], device=prefix.device)
        anchor = pad(left.anchor.expand(left.mask.shape), (more, 0)).maximum(place)
        return CompressedTokens(
            torch.cat([prefix, left.hidden], 1),
            pad(left.mask, (more, 0), value=True),
            anchor,
            group=None if left.group is None else left.group + more,
            size=None if left.size is None else pad(left.size, (more, 0), value=1),
            calibration=None if left.calibration is None else pad(left.calibration, (more, 0)),
        )

    def num_tokens(self, num_tokens: int) -> float:
        return self.compressor.num_tokens(num_tokens) + self.prefix(1).shape[1]
