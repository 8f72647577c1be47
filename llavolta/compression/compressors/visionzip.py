"""VisionZip: the patches that the class token looks at most, and a few sums over all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    by_size,
    largest_of,
    require_choice,
    require_share,
    sum_groups,
    take,
)
from llavolta.compression.probe import matmul_float32

Weights = Literal["sum", "mean"]


@dataclass(frozen=True)
class VisionZip(KeepBudget):
    """Of K = ``keep`` tokens, round(contextual * K) are contextual ones, the rest dominant (arXiv 2412.04467, section
    3, and its public code; published for LLaVA-1.5: 162 + 30, 108 + 20, 54 + 10).

    Dominant: those of the largest class attention, per head, of the layer whose output the model selects. Of the other
    L' in raster order every ``L' // contextual``-th, from the first, is a target; each of the rest goes to the target
    whose key (that layer's, mean over heads) is most alike (cosine). A contextual token is its target's feature plus
    the mean of those that went to it, as published: about twice as long as any other; ``weights="mean"``: the mean of
    target and these. Contextual tokens stand behind the dominant ones and take the picture's last places.

    The published code also keeps the tower's class token itself as one of the dominant ones; a model that selects
    patches does not hand it on, so there is one more dominant patch in its place. Where the tower has no class token:
    the attention that each patch receives.
    """

    contextual: float = 0.15625
    weights: Weights = "sum"
    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[str | int, ...]] = ("selected",)

    def __post_init__(self):
        super().__post_init__()
        require_share(self.name, "contextual", self.contextual)
        require_choice(self.name, "weights", self.weights, Weights)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        return by_size(
            tokens, self._zipped, tokens.salience(), tokens.keys("selected", per_head=True)
        )

    def _zipped(self, tokens: VisualTokens, salience: Tensor, keys: Tensor) -> CompressedTokens:
        images, length = tokens.mask.shape
        total = self.num_tokens(length)
        targets = min(round(self.contextual * total), total)
        dominant = largest_of(salience, self.budget(tokens.mask) - targets, tokens.mask)
        order = torch.argsort(
            dominant.long(), dim=1, descending=True, stable=True
        )  # dominant first, in raster order
        count = total - targets
        first, rest = order[:, :count], order[:, count:]
        dropped = torch.full_like(order, total)  # what there is no target for
        group = dropped.scatter_(
            1, first, torch.arange(count, device=order.device).expand_as(first)
        )
        kept = take(tokens.hidden, first)
        if targets:
            step = max(1, rest.shape[1] // targets)
            target = rest[:, : step * targets : step]
            chosen = self._nearest(keys, rest, target)  # (I, L') of 0..targets - 1
            group.scatter_(1, rest, count + chosen)
            kept = torch.cat([kept, self._contextual(tokens.hidden, rest, target, chosen)], dim=1)
        slot = torch.arange(total, device=order.device)
        place = torch.cat([first, first.new_full((images, targets), length - 1)], dim=1)
        anchor = torch.minimum(place, length - total + slot)
        return CompressedTokens(
            kept, torch.ones_like(anchor, dtype=torch.bool), anchor, group=group
        )

    @staticmethod
    @torch.no_grad()
    def _nearest(keys: Tensor, rest: Tensor, target: Tensor) -> Tensor:
        """(I, L') the number of the target that each of the rest goes to; a target goes to itself."""
        unit = F.normalize(keys.float(), dim=-1)
        chosen = matmul_float32(take(unit, rest), take(unit, target).transpose(1, 2)).argmax(-1)
        itself = rest[:, :, None] == target[:, None]
        return torch.where(itself.any(-1), itself.long().argmax(-1), chosen)

    def _contextual(self, hidden: Tensor, rest: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
        """(I, targets, C)."""
        features, own = take(hidden, rest).float(), take(hidden, target).float()
        total = sum_groups(features, chosen, target.shape[1])
        count = sum_groups(torch.ones_like(features[..., :1]), chosen, target.shape[1])
        if self.weights == "mean":
            return (total / count).to(hidden.dtype)
        return (own + (total - own) / (count - 1).clamp(min=1)).to(hidden.dtype)
