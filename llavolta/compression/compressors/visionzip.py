"""Keep the patches with high class attention, and merge the others into a few (VisionZip)."""

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
    """Keep dominant tokens, and merge all others into contextual tokens.

    Of K = ``keep`` output tokens, round(contextual * K) are contextual, the others dominant.

    1. Dominant tokens have the largest class attention, softmax per head, in the tower layer whose
       output the model selects.
    2. Of the other L' tokens in raster order, every ``L' // contextual``-th, from the first on, is
       a target. Each remaining token joins the target with the largest cosine of their keys (of the
       same layer, mean over heads).
    3. A contextual token is its target's feature plus the mean of the features that joined it. It
       has about twice the norm of other tokens, as published.

    Contextual tokens follow the dominant ones and take the image's last places. The public code
    also keeps the tower's class token as one dominant token. A model that selects patches does not
    pass it on, so one more patch takes its place. In a tower without a class token, tokens are
    ranked by the mean attention that a patch receives.

    Source: arXiv 2412.04467, section 3, and its public code. Published for LLaVA-1.5 are 162 + 30,
    108 + 20 and 54 + 10 tokens. At "vision" or layer 0.

    Attributes:
        contextual: Share of contextual tokens, above 0 and at most 1.
        weights: "sum" as published; or "mean", the mean over the target and the tokens that joined
            it.
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
        """Compress rows of one size."""
        images, length = tokens.mask.shape
        total = self.num_tokens(length)
        targets = min(round(self.contextual * total), total)
        dominant = largest_of(salience, self.budget(tokens.mask) - targets, tokens.mask)
        # Dominant tokens first, each part in raster order: (I, L).
        order = torch.argsort(dominant.long(), dim=1, descending=True, stable=True)
        count = total - targets
        first, rest = order[:, :count], order[:, count:]
        dropped = torch.full_like(order, total)  # without targets, the rest goes into no token
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
        # Contextual tokens stand at the last places; dominant ones make room, so that anchors rise.
        anchor = torch.minimum(place, length - total + slot)
        return CompressedTokens(
            kept, torch.ones_like(anchor, dtype=torch.bool), anchor, group=group
        )

    @staticmethod
    @torch.no_grad()
    def _nearest(keys: Tensor, rest: Tensor, target: Tensor) -> Tensor:
        """Return the target (I, L') of each remaining token, as an index 0..targets - 1.

        A target goes to itself. ``rest`` (I, L') and ``target`` (I, targets) are indices of tokens.
        """
        unit = F.normalize(keys.float(), dim=-1)
        chosen = matmul_float32(take(unit, rest), take(unit, target).transpose(1, 2)).argmax(-1)
        itself = rest[:, :, None] == target[:, None]  # (I, L', targets)
        return torch.where(itself.any(-1), itself.long().argmax(-1), chosen)

    def _contextual(self, hidden: Tensor, rest: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
        """Return the contextual tokens (I, targets, C)."""
        features, own = take(hidden, rest).float(), take(hidden, target).float()
        total = sum_groups(features, chosen, target.shape[1])
        count = sum_groups(torch.ones_like(features[..., :1]), chosen, target.shape[1])
        if self.weights == "mean":
            return (total / count).to(hidden.dtype)
        return (own + (total - own) / (count - 1).clamp(min=1)).to(hidden.dtype)
