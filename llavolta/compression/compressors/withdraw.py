"""Drop all visual tokens at a decoder layer (VTW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    keep_tokens,
)


@dataclass(frozen=True)
class Withdraw(Compressor):
    """Drop all visual tokens: from layer K on the decoder works on text alone.

    Source: VTW, arXiv 2405.05803, with K = 16 of 32 layers. Nothing can follow it in a plan. Text
    keeps its positions. In ``logits`` the row of a visual token is that of the last text token
    before it.
    """

    name: ClassVar[str] = "withdraw"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})
    may_empty: ClassVar[bool] = True

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(tokens, torch.zeros_like(tokens.mask))

    def num_tokens(self, num_tokens: int) -> int:
        return 0
