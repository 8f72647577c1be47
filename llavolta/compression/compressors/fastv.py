"""Keep the visual tokens with the largest attention from the last token (FastV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens


@dataclass(frozen=True)
class FastV(KeepRatio):
    """Keep the round(keep * n) tokens with the largest attention from the row's last token.

    At layer K, the score of token j is taken from layer K - 1:

        score_j = mean over heads h of softmax_j(q_last^h . k_j^h / sqrt(d))

    The softmax covers all earlier tokens (arXiv 2403.06764, section 4.1). The paper's setting is K
    = 2, keep = 0.5: ``"2:fastv:0.5"``. Only this one row of layer K - 1's attention is computed.
    From layer 1 on.

    With a cache, the choice is made once, at prefill. Without a cache it is made again for each new
    token, which is a different method, so generate with a cache.

    Attributes:
        keep: Share of the tokens to keep, above 0 and at most 1.
    """

    name: ClassVar[str] = "fastv"
    needs: ClassVar[frozenset[str]] = frozenset({"previous_layer"})

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens.attention("last", previous=True)
