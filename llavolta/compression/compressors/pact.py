"""PACT: drop what the picture itself does not look at, then cluster what is left by its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    cosines,
    first_of,
    largest_of,
    require_number,
    require_share,
    require_switch,
    share_of,
    sum_groups,
)


@dataclass(frozen=True)
class PACT(Compressor):
    """Prune without the text, and merge clusters that weigh as many tokens as they hold (arXiv 2504.08966; layer 4).

    1. ``score = mean over heads of softmax(q k^T / sqrt(d)) * |h|``: q the mean of this layer's queries of the picture
       and of all tokens before it, k the keys of these, both before rotation; h the hidden state. The round(keep * n)
       best of a picture's n tokens are kept.
    2. Clusters (DBDPC): on the rotated keys of the kept, with distances ``d = 1 - cosine`` and densities
       ``sum exp(-(d / 2)^2)``: in falling density a token farther than ``cutoff`` from all centres becomes one. Every
       kept token joins its nearest centre, a pruned one too if within ``recover`` * cutoff; the others go.
    3. Plain means stand at their centres' positions; the layers behind add the log of a cluster's size to the logits of
       its key, ``proportional=False``: not (for flash attention).

    How many are left depends on the picture; num_tokens gives the most. The public code keeps one token fewer in 1.
    """

    keep: float = 0.55
    cutoff: float = 0.21
    recover: float = 1.5
    proportional: bool = True
    name: ClassVar[str] = "pact"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def __post_init__(self):
        require_share(self.name, "keep", self.keep)
        require_number(self.name, "cutoff", self.cutoff)
        require_number(self.name, "recover", self.recover)
        require_switch(self.name, "proportional", self.proportional)

    def num_tokens(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.keep))

    @torch.no_grad()
    def scores(self, tokens: VisualTokens) -> Tensor:
        """(I, L)."""
        return tokens.own_attention() * tokens.hidden.float().norm(dim=-1)

    @torch.no_grad()
    def clusters(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(I, L) bool, the centres; and (I, L) for each token the place of its centre, L where it is dropped."""
        mask, length = tokens.mask, tokens.mask.shape[1]
        kept = largest_of(self.scores(tokens), share_of(mask, self.keep), mask)
        away = 1 - cosines(tokens.keys(rotated=True))
        density = ((-(away / 2).square()).exp() * kept[:, None]).sum(-1)
        open_, centres = kept.clone(), torch.zeros_like(kept)
        picture = torch.arange(len(mask), device=mask.device)
        while bool(open_.any()):
            chosen = density.masked_fill(~open_, -torch.inf).argmax(1)
            new = torch.nn.functional.one_hot(chosen, length).bool() & open_
            centres |= new
            open_ &= ~new & (away[picture, chosen] > self.cutoff)
        to_centre, nearest = away.masked_fill(~centres[:, None], torch.inf).min(-1)
        nearest = torch.where(centres, torch.arange(length, device=mask.device), nearest)
        joins = mask & (kept | (to_centre <= self.recover * self.cutoff))
        return centres, nearest.where(joins, length)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        centres, nearest = self.clusters(tokens)
        anchor, mask = first_of(centres, int(centres.sum(1).max()))
        groups = anchor.shape[1]
        number = torch.nn.functional.pad(centres.cumsum(1) - 1, (0, 1), value=groups)
        group = number.gather(1, nearest)
        count = sum_groups(
            torch.ones_like(group, dtype=torch.float)[..., None], group, groups
        ).clamp(min=1)
        hidden = sum_groups(tokens.hidden.float(), group, groups) / count
        size = (
            sum_groups(tokens.size[..., None], group, groups)[..., 0].clamp(min=1)
            if self.proportional
            else None
        )
        return CompressedTokens(
            hidden.to(tokens.hidden.dtype), mask, anchor, group=group, size=size
        )
