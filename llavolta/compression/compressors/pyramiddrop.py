"""Drop visual tokens at several layers, ranked by the instruction's last token (PyramidDrop)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens


@dataclass(frozen=True)
class PyramidDrop(KeepRatio):
    """Keep the round(keep * n) tokens with the largest attention from the instruction's last token.

    The score of token j is

        score_j = mean over heads h of softmax_j(q_last^h . k_j^h / sqrt(d))

    with layer K's own input norm, query and key projections on its input (arXiv 2410.17247, section
    3.2). If labels are given, the queries are the tokens just before each answer, and their
    attention is averaged. Else the query is the last token. With a cache, the choice is made once,
    at prefill: see FastV.

    ``keep`` is a share of the tokens that reach the layer. The paper keeps 50, 25 and 12.5% from
    layers 8, 16 and 24: ``"8:pyramiddrop:0.5;16:pyramiddrop:0.5;24:pyramiddrop:0.5"``.

    Attributes:
        keep: Share of the tokens to keep, above 0 and at most 1.
    """

    name: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens.attention("instruction")
