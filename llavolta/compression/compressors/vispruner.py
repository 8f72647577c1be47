"""Keep tokens by class attention, and thin out duplicates among the others (VisPruner)."""

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
    by_size,
    keep_tokens,
    require_int,
    require_share,
    take,
)
from llavolta.compression.probe import matmul_float32


@dataclass(frozen=True)
class VisPruner(KeepBudget):
    """Keep int(important * K) tokens by class attention, and the others by removing duplicates.

    1. The class attention is a softmax per head, in the tower layer whose output the model selects.
    2. All other tokens are thinned in order of falling attention, until K tokens remain in all. A
       round splits them into those at even and at odd places. The score of an even one is its
       largest cosine to an odd one. The ``batch`` even ones of largest score are removed (fewer in
       the last round). The order of the next round is the remaining even ones by falling score,
       then the odd ones.

    Tokens stay in raster order. Where a round has an odd number of tokens, for which the public
    code fails, the even half is the larger. In a tower without a class token, tokens are ranked by
    the mean attention that a patch receives. Source: arXiv 2412.01818 and its public code. At
    "vision" or layer 0.

    Attributes:
        important: Share of tokens that step 1 keeps, above 0 and at most 1.
        batch: Tokens removed per round, at least 1.
    """

    important: float = 0.5
    batch: int = 8
    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("selected",)

    def __post_init__(self):
        super().__post_init__()
        require_share(self.name, "important", self.important)
        require_int(self.name, "batch", self.batch, at_least=1)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return by_size(tokens, self._pruned, tokens.salience())

    def _pruned(self, tokens: VisualTokens, salience: Tensor) -> CompressedTokens:
        """Compress rows of one size."""
        total = self.num_tokens(tokens.mask.shape[1])
        order = salience.argsort(dim=1, descending=True, stable=True)
        first = int(total * self.important)
        chosen = torch.cat(
            [order[:, :first], self._thinned(tokens.hidden, order[:, first:], total - first)], dim=1
        )
        return keep_tokens(tokens, torch.zeros_like(tokens.mask).scatter(1, chosen, True))

    @torch.no_grad()
    def _thinned(self, hidden: Tensor, rest: Tensor, wanted: int) -> Tensor:
        """Thin the indices ``rest`` (I, R), in order of attention, down to (I, wanted)."""
        unit = F.normalize(hidden.float(), dim=-1)
        while wanted and rest.shape[1] > wanted:
            even, odd = rest[:, ::2], rest[:, 1::2]
            go = min(self.batch, rest.shape[1] - wanted, even.shape[1])
            score = matmul_float32(take(unit, even), take(unit, odd).transpose(1, 2)).amax(-1)
            # This order decides which tokens meet in the next round.
            rest = torch.cat(
                [even.gather(1, score.argsort(dim=1, descending=True, stable=True)[:, go:]), odd],
                dim=1,
            )
        return rest[:, :wanted]
