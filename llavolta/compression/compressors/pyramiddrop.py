"""PyramidDrop: drop a share of the visual tokens at several layers, ranked by the instruction's last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens


@dataclass(frozen=True)
class PyramidDrop(KeepRatio):
    """At layer K keep the round(keep * n) tokens with the highest attention of the instruction's last token.

    ``score_j = mean over heads h of softmax_j(q_last^h . k_j^h / sqrt(d))`` with layer K's own input norm, query and
    key projections on its input (arXiv 2410.17247, section 3.2). ``keep`` is a share of what reaches the layer: the
    paper's 50, 25 and 12.5% at layers 8, 16 and 24 is ``"8:pyramiddrop:0.5;16:pyramiddrop:0.5;24:pyramiddrop:0.5"``.
    Where labels are given the queries are the tokens just before each answer, and their attention is averaged; else
    the last token. With a cache the choice is made once, at prefill; see FastV.
    """

    name: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens.attention("instruction")
