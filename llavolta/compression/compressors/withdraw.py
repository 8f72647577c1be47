"""Visual tokens that leave the decoder for good at a layer, and such as enter it at one only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llavolta.compression.compressors.base import CompressedTokens, Compressor, VisualTokens, keep_tokens


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


@dataclass(frozen=True)
class Enter(Compressor):
    """Visual tokens enter at layer K: the layers before work on text alone, and K on the projector's output (HiDrop,
    arXiv 2602.23699, whose K is 9 of 32). Positions are the original ones. Deeper compressors may follow it."""

    name: ClassVar[str] = "enter"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(tokens, tokens.mask)

    def num_tokens(self, num_tokens: int) -> int:
        return num_tokens


@dataclass(frozen=True)
class Wait(Withdraw):
    """What a plan with ``enter`` does at layer 0. It has no name of its own in plans."""

    name: ClassVar[str] = ""
