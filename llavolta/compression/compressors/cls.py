"""Keep the patches with the largest attention from the class token (FasterVLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    keep_tokens,
    largest_of,
)


@dataclass(frozen=True)
class ClassAttention(KeepBudget):
    """Keep the ``keep`` tokens of the largest class attention, in raster order.

    The score is

        a = mean over heads h of softmax(q_cls^h k^h / sqrt(d))

    in the tower layer whose output the model selects (FasterVLM, arXiv 2412.01818v1). In a tower
    without a class token it is the mean attention that a patch receives. At "vision" or layer 0.
    """

    name: ClassVar[str] = "cls"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("selected",)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(
            tokens, largest_of(tokens.salience(), self.budget(tokens.mask), tokens.mask)
        )
