"""A compressor of one's own: importing this file makes ``"2:unusual:0.25"`` a plan, and a choice in the sliders."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from llavolta import KeepRatio, VisualTokens


@dataclass(frozen=True)
class KeepUnusual(KeepRatio):
    """Keep the share ``keep`` of each picture's tokens that look least like the picture's mean token."""

    name: ClassVar[str] = "unusual"

    def scores(self, tokens: VisualTokens):
        count = tokens.mask.sum(1, keepdim=True)[..., None]
        mean = (tokens.hidden * tokens.mask[..., None]).sum(1, keepdim=True) / count  # (I, 1, C)
        return -F.cosine_similarity(tokens.hidden, mean, dim=-1)  # (I, L), higher is kept first
