"""Keep the patches with high class attention, and merge the others into them (PruMerge)."""

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
    """Keep outliers of the class attention, and merge similar patches into each.

    1. ``a = softmax(q_cls k^T / sqrt(C_vision))`` over the class token and the patches, from the
       tower's last encoder layer, with all heads as one.
    2. The k tokens of largest a are kept. k is the number of tokens with a above
       ``Q3 + 1.5 (Q3 - Q1)``, per image.
    3. Each becomes ``x_i + sum_j a_j x_j``, over the ``neighbours`` other tokens, kept or not, with
       the largest cosine of their keys.
    4. One extra token, ``sum_j a_j x_j`` over all tokens that are not kept, follows them. Without
       outliers it is the only token.

    No gradient passes through a. Kept tokens stay in raster order. The extra token takes the
    image's last place, and a kept patch from there moves one place forward. Where the model feeds
    the class token to the language model (the frames of Video-LLaVA), it is one of the tokens.

    At "vision" only. A tower without a class token (SigLIP) raises UnsupportedModel. Source: arXiv
    2403.15388, section 3, and its public code.

    Attributes:
        keep: "adaptive" for step 2; or the share of output tokens, the extra one included, so that
            all images have equally many.
        weights: "unnormalised" as published; or "normalised", which divides the weights of each
            sum, 1 and the a_j, by their total.
        positions: "contiguous" as published: positions close up, so that the text after an image
            moves up. "original": text keeps its positions, and a kept token that of its patch.
        neighbours: Number of tokens merged into each kept one, at least 0.
        published_share: Share of tokens that remains for ``keep="adaptive"`` on LLaVA-1.5.
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
                    f'{self.name}: keep must be "adaptive" or a share of the tokens, '
                    f"not {self.keep!r}"
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
        """Return the number of output tokens.

        For ``keep="adaptive"`` it is the mean share published for LLaVA-1.5.
        """
        if self.keep == "adaptive":
            return max(1.0, num_tokens * self.published_share)
        return max(1, round(num_tokens * self.keep))

    def kept(self, attention: Tensor) -> Tensor:
        """Return a (I, L) bool mask of the tokens to keep, given the class attention (I, L)."""
        if self.keep == "adaptive":
            return outliers(attention)
        return largest(attention, self.num_tokens(attention.shape[1]) - 1)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        attention, keys, length = tokens.attention("class"), tokens.keys(), tokens.mask.shape[1]
        kept = self.kept(attention)
        count = kept.sum(1, keepdim=True)  # (I, 1)
        total = count + (count < length)  # the extra token needs at least one that is not kept
        slot = torch.arange(int(total.max()), device=kept.device)  # (M,)
        # Kept patches first, in raster order: (I, M).
        patch = torch.argsort(~kept, dim=1, stable=True)[:, : len(slot)]

        weight = self._weights(patch, attention, keys)
        extra = attention.masked_fill(kept, 0)[:, None]  # (I, 1, L)
        weight = torch.where((slot == count)[..., None], extra, weight)
        if self.weights == "normalised":
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        hidden = matmul_float32(weight, tokens.hidden).to(tokens.hidden.dtype)

        # The extra token stands at the last place; kept ones make room, so that anchors rise.
        anchor = torch.minimum(torch.where(slot < count, patch, length - 1), length - total + slot)
        group = torch.where(kept, kept.cumsum(1) - 1, count)
        return CompressedTokens(hidden, slot < total, anchor, group=group)

    @torch.no_grad()
    def _weights(self, patch: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
        """Return the weight (I, M, L) of each token in the sum for token ``patch`` (I, M).

        It is 1 for the token itself, a for its neighbours and 0 for all others.
        """
        itself = patch[..., None]
        chosen = keys.gather(1, itself.expand(-1, -1, keys.shape[-1]))
        # The norm of a token's own key does not change the order of its cosines.
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
    """PruMerge that also keeps spatially uniform samples, about a quarter of all tokens.

    With r the share of outliers, at least that of one token, every ``int(int(1 / r) / 3)``-th patch
    is kept too. All others are merged as in PruMerge (arXiv 2403.15388, section 3).

    With a share ``keep`` every image keeps the same number: a quarter of them by attention, as r is
    of the published 4 r, and the others evenly among the remaining patches.
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
        # The rank, from 1, of each remaining patch. One is taken wherever rank * wanted / others
        # reaches the next whole number, which spreads ``wanted`` of them evenly.
        rank = (~chosen).cumsum(1)
        return chosen | (rank * wanted // others > (rank - 1) * wanted // others) & ~chosen


def outliers(attention: Tensor) -> Tensor:
    """Mark the values (I, L) above Q3 + 1.5 (Q3 - Q1) of their own row."""
    low, high = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)
    return attention > (high + 1.5 * (high - low))[:, None]


def largest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest values of each row (I, L)."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(
        1, values.topk(count, dim=1).indices, True
    )
