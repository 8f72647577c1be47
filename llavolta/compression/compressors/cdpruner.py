"""CDPruner: a diverse subset of the tokens that matter to the question."""

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
    choose_greedily,
    cosines,
    keep_tokens,
)
from llavolta.compression.probe import matmul_float32

_LEAST = 1e-6  # of a residual: once the rank of the kernel is used up, it is 0


@dataclass(frozen=True)
class CDPruner(KeepBudget):
    """Keep the most probable subset of a determinantal point process conditioned on the question, greedily.

    Kernel ``diag(r) S diag(r)``: S the cosines of the hidden states, r in (0, 1] the relevance: the cosine of a token
    to the text behind the picture, the mean over its tokens, scaled to that range in each picture (arXiv 2506.10967,
    section 3; greedy MAP after Chen et al., arXiv 1709.05135). Relevance is measured in the language model's space, as
    deployments of it do; the paper's own is CLIP's (with the sign turned), whose text tower is not in a LLaVA. Raster
    order. Tokens beyond the kernel's rank, where the public code gives NaN and fewer tokens, follow in raster order.
    From layer 0 on, where the question is known.
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    @torch.no_grad()
    def relevance(self, tokens: VisualTokens) -> Tensor:
        """(I, L)."""
        words, behind = tokens.rows()
        mean = (F.normalize(words.float(), dim=-1) * behind[..., None]).sum(1) / behind.sum(
            1, keepdim=True
        )
        found = matmul_float32(F.normalize(tokens.hidden.float(), dim=-1), mean[..., None])[..., 0]
        low = found.masked_fill(~tokens.mask, torch.inf).amin(1, keepdim=True)
        high = found.masked_fill(~tokens.mask, -torch.inf).amax(1, keepdim=True)
        return (found - low + 1e-6) / (high - low).clamp(min=1e-6)

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        relevance, count = self.relevance(tokens), self.budget(tokens.mask)
        kernel = relevance[:, :, None] * cosines(tokens.hidden.detach()) * relevance[:, None]
        picture = torch.arange(len(kernel), device=kernel.device)
        rows: list[Tensor] = []

        def residual(step: int, chosen: Tensor, gain: Tensor) -> Tensor:
            row = kernel[picture, chosen]
            if rows:
                before = torch.stack(rows, 1)  # (I, steps, L)
                row = row - matmul_float32(before[picture, :, chosen][:, None], before)[:, 0]
            row = row / gain[picture, chosen].clamp(min=_LEAST).sqrt()[:, None]
            rows.append(row)
            return (gain - row.square()).clamp(min=_LEAST)

        start = kernel.diagonal(dim1=1, dim2=2)
        return keep_tokens(tokens, choose_greedily(count, tokens.mask, start, residual))
