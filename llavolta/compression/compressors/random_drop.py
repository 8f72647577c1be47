"""Keep a random subset: a baseline that many pruning methods do not beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens, require_int


@dataclass(frozen=True)
class RandomDrop(KeepRatio):
    """Keep a uniformly random subset of round(keep * n) tokens (UniPruneBench, arXiv 2511.02650).

    In training each call draws a new subset per row, from torch's global generator. In evaluation
    ``seed`` fixes the subset, equal in every call and for every row of n tokens. So results repeat,
    and decoding with and without a cache agree.

    Attributes:
        keep: Share of the tokens to keep, above 0 and at most 1.
        seed: Seed of the subset in evaluation, at least 0.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self):
        super().__post_init__()
        require_int("random", "seed", self.seed, at_least=0)

    def scores(self, tokens: VisualTokens) -> Tensor:
        if tokens.training:
            return torch.rand(tokens.mask.shape, device=tokens.mask.device)
        one = torch.rand(tokens.mask.shape[1], generator=torch.Generator().manual_seed(self.seed))
        return one.to(tokens.mask.device).expand(tokens.mask.shape)
