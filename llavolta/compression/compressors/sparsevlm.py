"""Rank visual tokens by the words most relevant to the image (SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from llavolta.compression.compressors.base import (
    CompressedTokens,
    KeepBudget,
    VisualTokens,
    first_of,
    keep_tokens,
    largest_of,
    require_switch,
    sum_groups,
    take,
)
from llavolta.compression.probe import matmul_float32


@dataclass(frozen=True)
class SparseVLM(KeepBudget):
    """Keep ``keep`` tokens by their attention from rater words, and recycle some others.

    1. Raters, from the inputs of layer 0, visual V and text X after the image:
       ``W = softmax over X of V X^T``. The raters are the words whose mean weight over V is above
       the mean of all words (arXiv 2410.04417, eq. 5 and 6).
    2. The score of a token is this layer's attention from the raters, the mean over heads and
       raters.
    3. Recycling (section 3.3; not in SparseVLM+): of m dropped tokens, the int(0.3 m) + 1 best are
       clustered by density peaks into a tenth as many groups plus one. The groups' plain means take
       the image's last places.

    One call works at one layer. The public code prunes after layers 2, 6 and 15, which is
    ``3:sparsevlm:300;7:sparsevlm:200;16:sparsevlm:110`` for its "192" tokens (303, 110, 36 for
    "128"; 66, 30, 17 for "64"). Recycled tokens are added to these counts. It closes up positions
    and adds random noise to densities. Here positions stay, as in SparseVLM+, and there is no
    noise. The paper's adaptive count, by the rank of the attention, is not in the public code. From
    layer 0 on.

    Attributes:
        recycle: Whether to do step 3.
    """

    recycle: bool = True
    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder", "start"})

    def __post_init__(self):
        super().__post_init__()
        require_switch(self.name, "recycle", self.recycle)
        if self.positions == "contiguous":
            raise ValueError("sparsevlm: positions are original; leave positions=contiguous out")

    @property
    def contiguous(self) -> bool:
        return False

    def num_tokens(self, num_tokens: int) -> int:
        kept = super().num_tokens(num_tokens)
        return (
            kept + _groups(_recycled(num_tokens - kept))
            if self.recycle and kept < num_tokens
            else kept
        )

    @torch.no_grad()
    def raters(self, tokens: VisualTokens) -> Tensor:
        """Return the raters (I, T0), a bool mask of each row's tokens at layer 0."""
        start = tokens.start
        hidden, behind = start.rows()
        logits = matmul_float32(start.hidden, hidden.transpose(1, 2)).masked_fill(
            ~behind[:, None], -torch.inf
        )
        weights = logits.softmax(-1) * start.mask[..., None]
        mean = weights.sum(1) / start.mask.sum(1, keepdim=True)
        return behind & (mean > mean.sum(1, keepdim=True) / behind.sum(1, keepdim=True))

    @torch.no_grad()
    def scores(self, tokens: VisualTokens) -> Tensor:
        """Return the score (I, L) of each token."""
        raters = self.raters(tokens)
        behind = tokens.start.rows()[1]  # all words, where none is above the mean
        return tokens.attention(
            query=tokens.from_start(torch.where(raters.any(1, keepdim=True), raters, behind))
        )

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        scores, mask = self.scores(tokens), tokens.mask
        kept = largest_of(scores, self.budget(mask), mask)
        dropped = (mask & ~kept).sum(1)
        if not self.recycle or not int(dropped.max()):
            return keep_tokens(tokens, kept)
        again = torch.where(dropped > 0, (dropped.double() * 0.3).long() + 1, 0).minimum(dropped)
        again = largest_of(scores, again, mask & ~kept)
        merged, count, cluster = merge_by_density(tokens.hidden, again)
        left = first_of(kept, int(kept.sum(1).max()))
        out = _behind(tokens, left, merged, count)
        # Groups follow the kept tokens. Other dropped tokens go into none.
        into = torch.where(again, kept.sum(1, keepdim=True) + cluster, out.mask.shape[1])
        return replace(out, group=torch.where(kept, kept.cumsum(1) - 1, into))


def _recycled(dropped: int) -> int:
    """Return how many of ``dropped`` tokens are recycled."""
    return min(dropped, int(0.3 * dropped) + 1) if dropped else 0


def _groups(recycled: int) -> int:
    """Return into how many groups ``recycled`` tokens are merged."""
    return recycled // 10 + 1 if recycled else 0


def merge_by_density(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens by density peaks (DPC-KNN), and average each cluster.

    n chosen tokens of a row form G = n // 10 + 1 groups. The distance is ``d = |a - b| / sqrt(C)``.
    The density is ``exp(-mean d^2)`` over the G nearest tokens, itself included. The G tokens with
    the largest product of density and distance to the nearest denser token are centres; for the
    densest, that distance is the largest of all. Each token joins the nearest centre.

    Of equally dense tokens the earlier one counts as denser; for G = 2, two tokens nearest to each
    other are always equally dense. The public code adds noise there. Products are compared by their
    logarithms, since densities far from all other tokens are 0 in float32.

    Args:
        hidden: (I, L, C) tokens.
        chosen: (I, L) bool, the tokens to cluster.

    Returns:
        The means (I, G, C), the number of groups (I,), and the group (I, L) of each chosen token.
    """
    count = chosen.sum(1)
    groups = torch.where(count > 0, count // 10 + 1, 0)
    place, real = first_of(chosen, int(count.max()))  # (I, n)
    features = take(hidden, place)
    most = int(groups.max())
    with torch.no_grad():
        pair = real[:, :, None] & real[:, None]  # (I, n, n), both tokens real
        # Not by a matrix product, whose rounding depends on the batch and breaks ties by chance.
        away = torch.cdist(*[features.float()] * 2, compute_mode="donot_use_mm_for_euclid_dist")
        away = away / features.shape[-1] ** 0.5
        nearest = away.masked_fill(~pair, torch.inf).sort(-1).values[..., :most]  # (I, n, G)
        counted = torch.arange(nearest.shape[-1], device=away.device) < groups[:, None]
        counted = counted[:, None] & nearest.isfinite()
        squares = nearest.double().square().masked_fill(~counted, 0).sum(-1)
        density = -squares / counted.sum(-1).clamp(min=1)  # (I, n), the logarithm of the density
        first = torch.ones_like(pair[0]).tril(-1)  # (n, n), True where the second token is earlier
        alike = density[:, None] == density[..., None]
        denser = ((density[:, None] > density[..., None]) | alike & first) & pair
        to_denser = away.masked_fill(~denser, torch.inf).amin(-1)
        farthest = away.masked_fill(~pair, 0).amax((1, 2))
        score = density + torch.where(to_denser.isfinite(), to_denser, farthest[:, None]).log()
        score = score.masked_fill(~real, -torch.inf)
        centres = score.argsort(dim=1, descending=True, stable=True)[:, :most]  # (I, G)
        there = torch.arange(most, device=away.device) < groups[:, None]
        to_centre = take(away, centres).masked_fill(~there[..., None], torch.inf)  # (I, G, n)
        own = torch.arange(most, device=away.device).expand_as(centres)
        # A centre joins itself, also if another one is at the same point. The last column takes
        # the centres that do not exist, and is cut off.
        group = pad(to_centre.argmin(1), (0, 1))
        group = group.scatter(1, centres.where(there, group.shape[1] - 1), own)[:, :-1]
    size = sum_groups(real.float()[..., None], group, most)
    means = sum_groups(features.float() * real[..., None], group, most) / size.clamp(min=1)
    # From the n chosen tokens back to all L.
    spare = torch.zeros(len(chosen), chosen.shape[1] + 1, dtype=torch.long, device=chosen.device)
    cluster = spare.scatter(1, place.where(real, chosen.shape[1]), group)[:, :-1]
    return means.to(hidden.dtype), groups, cluster


def _behind(
    tokens: VisualTokens, left: tuple[Tensor, Tensor], merged: Tensor, count: Tensor
) -> CompressedTokens:
    """Append the first ``count`` (I,) tokens of ``merged`` (I, G, C) to the kept tokens.

    They take the last places of each image, and kept tokens there move forward. ``left`` are the
    indices of the kept tokens and a mask of the real ones, both (I, K).
    """
    place, real = left
    kept, length = real.sum(1), tokens.mask.sum(1)
    total = kept + count
    slot = torch.arange(int(total.max()), device=place.device)
    own = slot < kept[:, None]  # (I, K + G), slots of kept tokens
    place = pad(place, (0, max(0, len(slot) - place.shape[1])))[:, : len(slot)]
    hidden = torch.where(
        own[..., None],
        take(tokens.hidden, place),
        take(merged, (slot - kept[:, None]).clamp(0, merged.shape[1] - 1)),
    )
    # No anchor may lie beyond the place from which all later slots still fit before the end.
    anchor = torch.where(own, place, length[:, None])
    anchor = torch.minimum(anchor, (length - total)[:, None] + slot)
    return CompressedTokens(hidden, slot < total[:, None], anchor)
