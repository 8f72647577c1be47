"""SparseVLM: rank by the words that the picture itself finds relevant, and recycle some of what is dropped."""

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
    """Keep the ``keep`` tokens of the highest attention of the raters in this layer, and merge some of the dropped.

    Raters, from the inputs V, X of layer 0: with ``W = softmax_X(V X^T)`` over the text X behind the picture, those of
    X whose mean weight over V is above the mean (arXiv 2410.04417, eq. 5 and 6). Score: this layer's attention, the
    mean over heads and raters. Recycling (section 3.3; not in SparseVLM+): of the m dropped tokens the int(0.3 m) + 1
    best are clustered by density peaks into a tenth as many groups and one, whose plain means stand in the last places.
    ``recycle=False`` leaves them out.

    One call is one layer; the published code's layers, behind whose outputs of 2, 6 and 15 it prunes, and its counts
    for "192": ``3:sparsevlm:300;7:sparsevlm:200;16:sparsevlm:110`` (128: 303, 110, 36; 64: 66, 30, 17), to which
    recycled tokens are added. The paper's own number of tokens, by the rank of the attention, is not in that code. It
    closes up positions; here they stay, as in SparseVLM+. Its random noise on densities is left out.
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
        """(I, T0) of the tokens of each picture's row at layer 0."""
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
        """(I, L)."""
        raters = self.raters(tokens)
        behind = tokens.start.rows()[1]  # which rates where every word weighs the same
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
        into = torch.where(
            again, kept.sum(1, keepdim=True) + cluster, out.mask.shape[1]
        )  # dropped: into none
        return replace(out, group=torch.where(kept, kept.cumsum(1) - 1, into))


def _recycled(dropped: int) -> int:
    return min(dropped, int(0.3 * dropped) + 1) if dropped else 0


def _groups(recycled: int) -> int:
    return recycled // 10 + 1 if recycled else 0


def merge_by_density(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens ``chosen`` (I, L) of hidden (I, L, C), n of a picture, in n // 10 + 1 groups: means (I, G, C), how
    many there are (I,), and (I, L) which of them each chosen token is in.

    Density peaks (DPC-KNN): distance ``d = |a - b| / sqrt(C)``, density ``exp(-mean d^2)`` over the G nearest, itself
    among them, times the distance to the nearest denser token (the densest: the largest distance of all); the G
    largest are centres, and every token joins the nearest one. Of equally dense tokens, as two that
    are nearest to each other always are where G = 2, the first counts as denser: the published code
    adds noise there. Products are compared by their logarithms, as densities of tokens far from all
    others are 0 in float32.
    """
    count = chosen.sum(1)
    groups = torch.where(count > 0, count // 10 + 1, 0)
    place, real = first_of(chosen, int(count.max()))
    features = take(hidden, place)
    most = int(groups.max())
    with torch.no_grad():
        pair = real[:, :, None] & real[:, None]
        # Not by a matrix product, whose rounding depends on the batch and breaks ties by chance.
        away = torch.cdist(*[features.float()] * 2, compute_mode="donot_use_mm_for_euclid_dist")
        away = away / features.shape[-1] ** 0.5
        nearest = away.masked_fill(~pair, torch.inf).sort(-1).values[..., :most]  # (I, n, G)
        counted = torch.arange(nearest.shape[-1], device=away.device) < groups[:, None]
        counted = counted[:, None] & nearest.isfinite()
        squares = nearest.double().square().masked_fill(~counted, 0).sum(-1)
        density = -squares / counted.sum(-1).clamp(min=1)  # its logarithm
        first = torch.ones_like(pair[0]).tril(-1)  # (n, n), where the second stands before
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
        group = pad(
            to_centre.argmin(1), (0, 1)
        )  # a centre to itself, whatever lies at the same place
        group = group.scatter(1, centres.where(there, group.shape[1] - 1), own)[:, :-1]
    size = sum_groups(real.float()[..., None], group, most)
    means = sum_groups(features.float() * real[..., None], group, most) / size.clamp(min=1)
    spare = torch.zeros(len(chosen), chosen.shape[1] + 1, dtype=torch.long, device=chosen.device)
    cluster = spare.scatter(1, place.where(real, chosen.shape[1]), group)[:, :-1]
    return means.to(hidden.dtype), groups, cluster


def _behind(
    tokens: VisualTokens, left: tuple[Tensor, Tensor], merged: Tensor, count: Tensor
) -> CompressedTokens:
    """The tokens at ``left`` (places and whether they are real), and behind them ``count`` (I,) of merged (I, G, C),
    in the last places of each picture, as far as kept ones do not stand there."""
    place, real = left
    kept, length = real.sum(1), tokens.mask.sum(1)
    total = kept + count
    slot = torch.arange(int(total.max()), device=place.device)
    own = slot < kept[:, None]
    place = pad(place, (0, max(0, len(slot) - place.shape[1])))[:, : len(slot)]
    hidden = torch.where(
        own[..., None],
        take(tokens.hidden, place),
        take(merged, (slot - kept[:, None]).clamp(0, merged.shape[1] - 1)),
    )
    anchor = torch.where(own, place, length[:, None])
    anchor = torch.minimum(anchor, (length - total)[:, None] + slot)
    return CompressedTokens(hidden, slot < total[:, None], anchor)
