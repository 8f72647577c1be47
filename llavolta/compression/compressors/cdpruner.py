"""Keep a diverse subset of the visual tokens that are relevant to the question (CDPruner)."""

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

_LEAST = 1e-6  # of a residual variance, which reaches 0 once the kernel's rank is used up


@dataclass(frozen=True)
class CDPruner(KeepBudget):
    """Choose the most probable subset of a determinantal point process, greedily.

    The kernel is ``diag(r) S diag(r)``. S are the cosines of the hidden states. The relevance r is
    the cosine of a token to the text after the image, averaged over the text tokens. Per image it
    is scaled to ``(r - min + 1e-6) / (max - min)`` (arXiv 2506.10967, section 3; greedy MAP
    inference as in Chen et al., arXiv 1709.05135). Tokens stay in raster order.

    Relevance is measured in the language model's space, as in deployments of the method. The paper
    measures it in CLIP's, with the sign reversed, but a LLaVA checkpoint lacks CLIP's text tower.
    Beyond the kernel's rank, tokens follow in raster order, where the public code gives NaN and
    fewer tokens. From layer 0 on, where the question is known.
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    @torch.no_grad()
    def relevance(self, tokens: VisualTokens) -> Tensor:
        """Return the relevance (I, L) of each token to the question, about 0 to 1."""
        words, behind = tokens.rows()
        # A mean of unit vectors (I, C): its product with a unit vector is the mean of the cosines.
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
        rows: list[Tensor] = []  # of the incremental Cholesky factor, one (I, L) per choice

        def residual(step: int, chosen: Tensor, gain: Tensor) -> Tensor:
            # e = (Q_j - c_j C) / sqrt(d_j), and the residual d loses e^2.
            row = kernel[picture, chosen]
            if rows:
                before = torch.stack(rows, 1)  # (I, steps, L)
                row = row - matmul_float32(before[picture, :, chosen][:, None], before)[:, 0]
            row = row / gain[picture, chosen].clamp(min=_LEAST).sqrt()[:, None]
            rows.append(row)
            return (gain - row.square()).clamp(min=_LEAST)

        start = kernel.diagonal(dim1=1, dim2=2)
        return keep_tokens(tokens, choose_greedily(count, tokens.mask, start, residual))
