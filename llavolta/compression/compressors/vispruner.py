"""VisPruner: half of the tokens by class attention, the other half by thinning out what is alike."""

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
    """Keep int(important * K) tokens by class attention (per head, of the layer whose output the model selects), and of
    the others, in falling order of it, those that repeated thinning leaves (arXiv 2412.01818, and its public code).

    A round splits them into those at even and at odd places; an even one scores its largest cosine to an odd one; the
    ``batch`` even ones of the largest scores go (fewer in the last round). The next round's order: the even ones left,
    by falling score, then the odd ones. Kept tokens stand in raster order. Where the number in a round is odd, which
    the public code cannot do, the last even one has no partner of its own. Where the tower has no class token: the
    attention that each patch receives.
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
        total = self.num_tokens(tokens.mask.shape[1])
        order = salience.argsort(dim=1, descending=True, stable=True)
        first = int(total * self.important)
        chosen = torch.cat(
            [order[:, :first], self._thinned(tokens.hidden, order[:, first:], total - first)], dim=1
        )
        return keep_tokens(tokens, torch.zeros_like(tokens.mask).scatter(1, chosen, True))

    @torch.no_grad()
    def _thinned(self, hidden: Tensor, rest: Tensor, wanted: int) -> Tensor:
        """(I, wanted) of rest (I, R)."""
        unit = F.normalize(hidden.float(), dim=-1)
        while wanted and rest.shape[1] > wanted:
            even, odd = rest[:, ::2], rest[:, 1::2]
            go = min(self.batch, rest.shape[1] - wanted, even.shape[1])
            score = matmul_float32(take(unit, even), take(unit, odd).transpose(1, 2)).amax(-1)
            rest = torch.cat(
                [even.gather(1, score.argsort(dim=1, descending=True, stable=True)[:, go:]), odd],
                dim=1,
            )
        return rest[:, :wanted]
