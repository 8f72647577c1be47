"""A random subset: the baseline that many pruning methods do not beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import KeepRatio, VisualTokens, require_int


@dataclass(frozen=True)
class RandomDrop(KeepRatio):
    """Keep a uniformly random subset of round(keep * n) tokens (UniPruneBench, arXiv 2511.02650).

    In training every call draws anew from torch's global generator, each picture for itself. In evaluation the subset
    is that of ``seed``, the same in every call and for every picture of n tokens, so that results repeat and decoding
    with and without a cache agree.
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
