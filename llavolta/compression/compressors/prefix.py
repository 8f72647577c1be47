"""Tokens of another kind before what a compressor leaves of each picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llavolta.compression.compressors.base import CompressedTokens, Compressor, VisualTokens


@dataclass(frozen=True, eq=False)
class Prefixed(Compressor):
    """What ``compressor`` leaves of each picture, behind the embeddings that ``prefix(I)`` gives, (I, P, C).

    They take the places of dropped tokens, of which there must be P in each picture, and the sequence closes up: the
    positions are those of a text into which the prefix and the tokens that are left had been written.
    """

    compressor: Compressor
    prefix: nn.Module

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
                f"no room for {more} tokens before each picture: {self.compressor} must drop at least as many of its "
                f"{int(count.min())}"
            )
        # Places that rise, from the first on; which ones they are plays no part where the sequence closes up.
        place = torch.arange(more + left.mask.shape[1], device=prefix.device)
        anchor = pad(left.anchor.expand(left.mask.shape), (more, 0)).maximum(place)
        return CompressedTokens(
            torch.cat([prefix, left.hidden], 1), pad(left.mask, (more, 0), value=True), anchor
        )

    def num_tokens(self, num_tokens: int) -> float:
        return self.compressor.num_tokens(num_tokens) + self.prefix(1).shape[1]
