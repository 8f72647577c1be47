"""PruMerge and PruMerge+: keep the patches that the class token looks at, and merge the others into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    Positions,
    VisualTokens,
    require_choice,
    require_int,
    require_share,
)
from llavolta.compression.probe import matmul_float32

Weights = Literal["unnormalised", "normalised"]


@dataclass(frozen=True)
class PruMerge(Compressor):
    """On the vision tower's output keep outliers of the class token's attention, and merge into each its neighbours.

    ``a = softmax(q_cls k^T / sqrt(C_vision))`` from the tower's last encoder layer, all heads as one, over the class
    token and the patches. Kept: the k tokens of largest a, k the number above ``Q3 + 1.5 (Q3 - Q1)`` of that image's a.
    Each becomes ``x_i + sum_j a_j x_j`` over the ``neighbours`` other tokens, kept ones too, whose keys are most alike
    (cosine); one extra token ``sum_j a_j x_j`` over all that are not kept stands behind them. Without outliers it is
    all that is left. No gradient goes through a. Source: arXiv 2403.15388, section 3, and its public code.

    keep: "adaptive" as above, or the share of tokens that is left of every image, the extra one among them, for batches
    of equal lengths. weights: "unnormalised" as published, or "normalised": the weights in each sum (1 and those a_j)
    are divided by their total. positions: "contiguous" as published: the language model sees a shorter sequence with
    consecutive positions, so text behind an image moves up, too; or "original": text keeps its positions, and a
    kept token that of its patch. Kept tokens stay in raster order; the extra token takes the picture's last place, and
    kept patches that end there move one place towards the front. Where the class token itself is fed to the language
    model (the frames of Video-LLaVA) it is one of the tokens.

    At "vision" only. A tower without a class token (SigLIP) is refused with UnsupportedModel.
    """

    keep: float | Literal["adaptive"] = "adaptive"
    weights: Weights = "unnormalised"
    positions: Positions = "contiguous"
    neighbours: int = 32
    name: ClassVar[str] = "prumerge"
    needs: ClassVar[frozenset[str]] = frozenset({"tower", "class_token"})
    published_share: ClassVar[float] = 0.055

    def __post_init__(self):
        if self.keep != "adaptive":
            if isinstance(self.keep, str):
                raise ValueError(
                    f'{self.name}: keep must be "adaptive" or a share of the tokens, not {self.keep!r}'
                )
            require_share(self.name, "keep", self.keep)
        require_choice(self.name, "weights", self.weights, Weights)
        require_choice(self.name, "positions", self.positions, Positions)
        require_int(self.name, "neighbours", self.neighbours, at_least=0)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    @property
    def contiguous(self) -> bool:
        return self.positions == "contiguous"

    def num_tokens(self, num_tokens: int) -> float:
        """With keep="adaptive", where it depends on the picture, the share that was published for LLaVA-1.5."""
        if self.keep == "adaptive":
            return max(1.0, num_tokens * self.published_share)
        return max(1, round(num_tokens * self.keep))

    def kept(self, attention: Tensor) -> Tensor:
        """(I, L) bool: the tokens that others are merged into; attention (I, L)."""
        if self.keep == "adaptive":
            return outliers(attention)
        return largest(attention, self.num_tokens(attention.shape[1]) - 1)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        attention, keys, length = tokens.attention("class"), tokens.keys(), tokens.mask.shape[1]
        kept = self.kept(attention)
        count = kept.sum(1, keepdim=True)  # (I, 1)
        total = count + (
            count < length
        )  # with the extra token, if there is anything to put into it
        slot = torch.arange(int(total.max()), device=kept.device)  # (M,)
        patch = torch.argsort(~kept, dim=1, stable=True)[
            :, : len(slot)
        ]  # (I, M), kept ones first, in raster order

        weight = self._weights(patch, attention, keys)
        extra = attention.masked_fill(kept, 0)[:, None]  # (I, 1, L)
        weight = torch.where((slot == count)[..., None], extra, weight)
        if self.weights == "normalised":
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        hidden = matmul_float32(weight, tokens.hidden).to(tokens.hidden.dtype)

        anchor = torch.minimum(torch.where(slot < count, patch, length - 1), length - total + slot)
        group = torch.where(kept, kept.cumsum(1) - 1, count)
        return CompressedTokens(hidden, slot < total, anchor, group=group)

    @torch.no_grad()
    def _weights(self, patch: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
        """(I, M, L) what each token weighs in the sums that start from tokens patch (I, M): its own 1, neighbours a."""
        itself = patch[..., None]
        chosen = keys.gather(1, itself.expand(-1, -1, keys.shape[-1]))
        # The length of the token's own key does not change which ones are nearest.
        norm = keys.norm(dim=-1, dtype=torch.float32).clamp(min=1e-8)
        similarity = matmul_float32(chosen, keys.transpose(1, 2)) / norm[:, None]
        similarity.scatter_(2, itself, -torch.inf)
        nearest = similarity.topk(min(self.neighbours, keys.shape[1] - 1), dim=2).indices
        a = attention[:, None].expand_as(similarity)
        return (
            torch.zeros_like(similarity)
            .scatter_(2, nearest, a.gather(2, nearest))
            .scatter_(2, itself, 1)
        )


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with spatially uniform samples among the kept tokens: about a quarter of all.

    With r the share of outliers (that of one token, if there is none), every ``int(int(1 / r) / 3)``-th patch is kept,
    too, then all are merged as in PruMerge (arXiv 2403.15388, section 3). With a share ``keep`` every image keeps the
    same number: a quarter of them by attention, as r is of the published 4 r, the others evenly among the rest.
    """

    name: ClassVar[str] = "prumerge+"
    published_share: ClassVar[float] = 0.25

    def kept(self, attention: Tensor) -> Tensor:
        length = attention.shape[1]
        place = torch.arange(length, device=attention.device)
        if self.keep == "adaptive":
            chosen = outliers(attention)
            step = length // chosen.sum(1, keepdim=True).clamp(min=1) // 3  # (I, 1)
            return chosen | (place % step.clamp(min=1) == 0)
        budget = self.num_tokens(length) - 1
        chosen = largest(attention, budget // 4)
        others, wanted = length - budget // 4, budget - budget // 4
        rank = (~chosen).cumsum(1)  # from 1
        return chosen | (rank * wanted // others > (rank - 1) * wanted // others) & ~chosen


def outliers(attention: Tensor) -> Tensor:
    """(I, L) bool, what lies above Q3 + 1.5 (Q3 - Q1) of its own row."""
    low, high = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)
    return attention > (high + 1.5 * (high - low))[:, None]


def largest(values: Tensor, count: int) -> Tensor:
    """(I, L) bool, the ``count`` largest of each row."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(
        1, values.topk(count, dim=1).indices, True
    )
