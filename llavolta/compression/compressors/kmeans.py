"""Merge similar visual tokens by k-means clustering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    require_int,
    require_share,
    share_of,
    sum_groups,
)
from llavolta.compression.probe import matmul_float32


@dataclass(frozen=True)
class KMeans(Compressor):
    """Merge n tokens into the means of round(keep * n) clusters of their hidden states.

    Lloyd's algorithm (1982) with Euclidean distance starts from a random subset of the tokens,
    which ``seed`` fixes, equal in every call. A merged token takes the place and position of the
    token nearest to its mean, and merged tokens stand in the order of these places. A cluster
    without tokens is left out, so fewer may remain. Gradients pass through the means.

    Attributes:
        keep: Share of the tokens, above 0 and at most 1.
        iterations: Updates of the means, from 0 to 10,000.
        seed: Seed of the first means, at least 0.
    """

    keep: float = 0.25
    iterations: int = 5
    seed: int = 0
    name: ClassVar[str] = "kmeans"

    def __post_init__(self):
        require_share("kmeans", "keep", self.keep)
        require_int("kmeans", "iterations", self.iterations, at_least=0, at_most=10_000)
        require_int("kmeans", "seed", self.seed, at_least=0)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def num_tokens(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.keep))

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        features, wanted = tokens.hidden.float(), share_of(tokens.mask, self.keep)
        clusters = int(wanted.max())
        group = self._clusters(features.detach(), tokens.mask, wanted)
        anchor = _nearest_to_mean(features.detach(), group, clusters)

        # Number the clusters by the place of their anchors. Empty ones, at place L, come last.
        rank = anchor.argsort(dim=1).argsort(dim=1)
        group = F.pad(rank, (0, 1), value=clusters).gather(1, group)  # (I, L)
        count = sum_groups(tokens.mask.long()[..., None], group, clusters)
        hidden = sum_groups(features, group, clusters) / count.clamp(min=1)
        longest = int((count > 0).sum(1).max())  # most clusters with tokens in a row
        left = [
            part[:, :longest]
            for part in (hidden.to(tokens.hidden.dtype), count[..., 0] > 0, anchor.sort().values)
        ]
        return CompressedTokens(*left, group=group)

    def _clusters(self, features: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Return the cluster (I, L) of each token, ``wanted`` (I,) clusters per row.

        Padding gets the index max(wanted).
        """
        clusters = int(wanted.max())
        start = torch.rand(mask.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(
            mask.device
        )
        start = (
            start.expand(mask.shape)
            .masked_fill(~mask, -1)
            .argsort(dim=1, descending=True)[:, :clusters]
        )
        centre = features.gather(1, start[..., None].expand(-1, -1, features.shape[-1]))
        unused = torch.arange(clusters, device=mask.device) >= wanted[:, None]  # (I, M)

        for step in range(self.iterations + 1):
            product = matmul_float32(features, centre.transpose(1, 2))
            # (I, L, M) squared distance less |x|^2, which is the same for all clusters.
            distance = (centre**2).sum(-1)[:, None] - 2 * product
            group = (
                distance.masked_fill(unused[:, None], torch.inf)
                .argmin(-1)
                .masked_fill(~mask, clusters)
            )
            if step < self.iterations:
                count = sum_groups(mask.float()[..., None], group, clusters)
                # An empty cluster keeps its old mean.
                centre = torch.where(
                    count > 0, sum_groups(features, group, clusters) / count.clamp(min=1), centre
                )
        return group


def _nearest_to_mean(features: Tensor, group: Tensor, clusters: int) -> Tensor:
    """Return the token nearest to each cluster's mean (I, M), L for an empty cluster.

    Of equally near tokens it is the first. ``group`` (I, L) is ``clusters`` at padding.
    """
    images, length, width = features.shape
    count = sum_groups(torch.ones_like(features[..., :1]), group, clusters)
    mean = F.pad(sum_groups(features, group, clusters) / count.clamp(min=1), (0, 0, 0, 1))
    distance = (features - mean.gather(1, group[..., None].expand(-1, -1, width))).norm(dim=-1)
    # The smallest distance in each cluster, then the first token that has it.
    nearest = distance.new_full((images, clusters + 1), torch.inf).scatter_reduce(
        1, group, distance, "amin"
    )
    place = torch.arange(length, device=group.device).where(
        distance == nearest.gather(1, group), length
    )
    return group.new_full((images, clusters + 1), length).scatter_reduce(1, group, place, "amin")[
        :, :-1
    ]
