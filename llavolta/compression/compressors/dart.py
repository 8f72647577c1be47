"""DART: keep a few pivots and the tokens that repeat them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    first_of,
    keep_tokens,
    largest_of,
    require_int,
    take,
)
from llavolta.compression.probe import matmul_float32


@dataclass(frozen=True)
class DART(KeepBudget):
    """At layer K keep image pivots and, for each pivot, the tokens that are least like it (arXiv 2502.11494; K = 2).

    Pivots: the ``image_pivots`` visual tokens and the ``text_pivots`` tokens of text behind the picture whose keys in
    layer K - 1, rotated, have the largest L1 norm, all heads side by side. With t = budget // (number of pivots), each
    pivot in turn, image pivots first, both in order of place, adds the t tokens not taken yet of the smallest cosine to
    it, of layer K's input under the language model's final norm. Left are image_pivots + t * (number of pivots) tokens:
    132 for a budget of 128. Text pivots are references only. No attention is computed, so every backend will do.

    The public code takes pivots in the order of a Python set of integers, which depends on their values; here it is
    that of their places.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    name: ClassVar[str] = "dart"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder", "previous_layer"})

    def __post_init__(self):
        super().__post_init__()
        require_int(self.name, "image_pivots", self.image_pivots, at_least=1)
        require_int(self.name, "text_pivots", self.text_pivots, at_least=0)

    def num_tokens(self, num_tokens: int) -> int:
        each = super().num_tokens(num_tokens) // (self.image_pivots + self.text_pivots)
        return min(num_tokens, self.image_pivots + each * (self.image_pivots + self.text_pivots))

    @torch.no_grad()
    def kept(self, tokens: VisualTokens) -> Tensor:
        """(I, L) bool."""
        hidden, behind = tokens.rows()  # (I, T, C), (I, T)
        norms, column = tokens.row_keys().float().abs().sum(-1), tokens.column
        counts = [
            norms.new_full((len(norms),), count) for count in (self.image_pivots, self.text_pivots)
        ]
        kept = largest_of(norms.gather(1, column), counts[0], tokens.mask)
        text = largest_of(norms, counts[1], behind)

        pivots, there = first_of(torch.zeros_like(text).scatter(1, column, kept), self.image_pivots)
        more = first_of(text, self.text_pivots)
        pivots, there = (
            torch.cat([pivots, more[0]], dim=1),
            torch.cat([there, more[1]], dim=1),
        )  # (I, P)
        unit = F.normalize(tokens.final_norm(hidden).float(), dim=-1)
        visual, references = take(unit, column), take(unit, pivots)
        similarity = matmul_float32(visual, references.transpose(1, 2))  # (I, L, P)
        each = self.budget(tokens.mask) // (self.image_pivots + self.text_pivots)
        for pivot in range(pivots.shape[1]):
            added = largest_of(-similarity[..., pivot], each, tokens.mask & ~kept)
            kept = kept | added & there[:, pivot, None]
        return kept

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(tokens, self.kept(tokens))
