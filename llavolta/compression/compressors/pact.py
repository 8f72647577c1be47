"""Prune visual tokens without the text, and cluster the others by their keys (PACT)."""

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
    """Prune visual tokens, and merge the others into clusters that count by their size.

    1. Pruning (EUTI): the score of a token is
       ``mean over heads of softmax(q k^T / sqrt(d)) * |h|``. q is the mean of this layer's queries
       over the image and all tokens before it, k are the keys of these, both before rotation, and h
       is the hidden state. The round(keep * n) best of n tokens are kept.
    2. Clustering (DBDPC): distances are ``d = 1 - cosine`` of the rotated keys of the kept tokens,
       and densities are ``sum exp(-(d / 2)^2)``. In order of falling density, a token farther than
       ``cutoff`` from all centres becomes a centre. Each kept token joins its nearest centre. A
       pruned one does so within ``recover * cutoff``, else it is dropped.
    3. Clusters become the plain means of their hidden states, at the positions of their centres.

    The number of output tokens depends on the image; ``num_tokens`` returns the maximum. The public
    code keeps one token fewer in step 1. Source: arXiv 2504.08966, at layer 4. From layer 0 on.

    Attributes:
        keep: Share of the tokens to keep in step 1, above 0 and at most 1.
        cutoff: Cosine distance within which tokens share a centre.
        recover: Multiple of ``cutoff`` within which pruned tokens are merged too.
        proportional: Add the log of a cluster's size to the attention logits of its key, from this
            layer on. False for flash attention, which takes no such bias.
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
        """Return the pruning score (I, L) of each token."""
        return tokens.own_attention() * tokens.hidden.float().norm(dim=-1)

    @torch.no_grad()
    def clusters(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """Find the clusters.

        Returns:
            The centres, a (I, L) bool mask; and for each token the index (I, L) of its centre among
            the L tokens, L for a dropped one.
        """
        mask, length = tokens.mask, tokens.mask.shape[1]
        kept = largest_of(self.scores(tokens), share_of(mask, self.keep), mask)
        away = 1 - cosines(tokens.keys(rotated=True))
        # Density counts kept tokens only, each itself included.
        density = ((-(away / 2).square()).exp() * kept[:, None]).sum(-1)
        open_, centres = kept.clone(), torch.zeros_like(kept)
        picture = torch.arange(len(mask), device=mask.device)
        # Each round takes the densest open token of every row as a centre and closes all within
        # the cutoff. This gives the same centres as the paper's rounds, without depending on the
        # batch.
        while bool(open_.any()):
            chosen = density.masked_fill(~open_, -torch.inf).argmax(1)
            new = torch.nn.functional.one_hot(chosen, length).bool() & open_
            centres |= new
            open_ &= ~new & (away[picture, chosen] > self.cutoff)
        to_centre, nearest = away.masked_fill(~centres[:, None], torch.inf).min(-1)
        # A centre belongs to itself, also if another one has an equal key.
        nearest = torch.where(centres, torch.arange(length, device=mask.device), nearest)
        joins = mask & (kept | (to_centre <= self.recover * self.cutoff))
        return centres, nearest.where(joins, length)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        centres, nearest = self.clusters(tokens)
        anchor, mask = first_of(centres, int(centres.sum(1).max()))
        groups = anchor.shape[1]
        # Indices among L tokens become indices among the centres; L becomes ``groups``.
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
