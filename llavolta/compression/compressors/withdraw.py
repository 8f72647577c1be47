"""Withdraw: all visual tokens leave the decoder at a layer (VTW)."""

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
    """All visual tokens leave: from layer K on the decoder works on text alone (VTW, arXiv 2405.05803; K = 16 of 32).

    Nothing can follow it in a plan. Text keeps its positions. The row of a visual token in the logits is that of the
    last token of text before it.
    """

    name: ClassVar[str] = "withdraw"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})
    may_empty: ClassVar[bool] = True

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(tokens, torch.zeros_like(tokens.mask))

    def num_tokens(self, num_tokens: int) -> int:
        return 0
