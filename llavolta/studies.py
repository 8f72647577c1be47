"""Studies of where visual tokens go and how much they matter."""

from __future__ import annotations

import numpy as np
import torch

from llavolta.compressors import VisualTokens
from llavolta.plan import parse_plan


def token_groups(plan, num_tokens: int) -> np.ndarray:
    """(num_tokens,) for each visual token of an image the number of the token it ends in under ``plan``; -1 if dropped.

    For compressors that go by place alone; it follows one-hot tokens through them.
    """
    hidden = torch.eye(num_tokens)[None]
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    positions = torch.arange(num_tokens)[None, :, None]
    for compressor in parse_plan(plan).values():
        out = compressor(VisualTokens(hidden, mask, positions))
        hidden, mask = out.hidden, out.mask
        positions = positions[:, out.anchor.expand(mask.shape)[0]] if out.positions is None else out.positions
    share = hidden[0]  # (M, L) how much of each token is in what is left
    return torch.where(share.sum(0) > 0, share.argmax(0), -1).numpy()
