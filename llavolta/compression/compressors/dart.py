"""Keep a few pivot tokens, and the visual tokens that duplicate them least (DART)."""

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
    """Keep image pivots, and for each pivot the tokens least similar to it.

    Source: arXiv 2502.11494, with K = 2.

    1. Keys are those of layer K - 1 after rotation, all heads side by side. Image pivots are the
       ``image_pivots`` visual tokens with the largest L1 norm of the key. Text pivots are the
       ``text_pivots`` tokens with the largest norm in the text after the image.
    2. t = budget // (number of pivots), rounded down. Image pivots come first, then text pivots,
       both in order of place. Each adds the t tokens not yet taken with the smallest cosine to it.
       The cosine is that of layer K's inputs under the language model's final norm.

    image_pivots + t * (number of pivots) tokens remain: 132 for a budget of 128. Text pivots are
    references only. No attention is computed, so every attention backend works. From layer 1 on.

    The public code takes the pivots in the order of a Python set of integers, which depends on
    their values.

    Attributes:
        image_pivots: Visual pivots, at least 1.
        text_pivots: Text pivots, at least 0.
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
        """Return a (I, L) bool mask of the tokens to keep."""
        hidden, behind = tokens.rows()  # (I, T, C), (I, T)
        norms, column = tokens.row_keys().float().abs().sum(-1), tokens.column
        counts = [
            norms.new_full((len(norms),), count) for count in (self.image_pivots, self.text_pivots)
        ]
        kept = largest_of(norms.gather(1, column), counts[0], tokens.mask)
        text = largest_of(norms, counts[1], behind)

        # Pivots as indices (I, P) into the row's T tokens; there is False where a row has too few.
        pivots, there = first_of(torch.zeros_like(text).scatter(1, column, kept), self.image_pivots)
        more = first_of(text, self.text_pivots)
        pivots, there = torch.cat([pivots, more[0]], dim=1), torch.cat([there, more[1]], dim=1)
        unit = F.normalize(tokens.final_norm(hidden).float(), dim=-1)
        visual, references = take(unit, column), take(unit, pivots)
        similarity = matmul_float32(visual, references.transpose(1, 2))  # (I, L, P)
        each = self.budget(tokens.mask) // (self.image_pivots + self.text_pivots)
        for pivot in range(pivots.shape[1]):  # in turn: what one takes, later ones cannot
            added = largest_of(-similarity[..., pivot], each, tokens.mask & ~kept)
            kept = kept | added & there[:, pivot, None]
        return kept

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return keep_tokens(tokens, self.kept(tokens))
