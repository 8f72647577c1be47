"""FastV: drop the visual tokens that the last token looks at least, in an early layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens


@dataclass(frozen=True)
class FastV(KeepRatio):
    """At layer K keep the round(keep * n) tokens with the highest attention of the last token in layer K - 1.

    ``score_j = mean over heads h of softmax_j(q_last^h . k_j^h / sqrt(d))``, the softmax over all earlier tokens
    (arXiv 2403.06764, section 4.1; the paper's setting is K = 2, keep = 0.5: ``"2:fastv:0.5"``). Only that one row
    of layer K - 1's attention is computed. With a cache the choice is made once, at prefill; without one it is made
    again for every new token, which is another method: generate with a cache.
    """

    name: ClassVar[str] = "fastv"
    needs: ClassVar[frozenset[str]] = frozenset({"previous_layer"})

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens.attention("last", previous=True)
