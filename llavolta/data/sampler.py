"""The order of the data: batches of one modality and of like length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Batches of one modality and of like length, in random order: LLaVA's ``group_by_modality_length``.

    The order is a function of the seed and the epoch alone, so a resumed run sees the same batches. medium: (n,)
    which kind of pictures an example has, see LlavaData. batch: examples of an optimizer step over all processes. The
    few left over at the end may mix them.
    """

    def __init__(self, lengths: np.ndarray, medium: np.ndarray, batch: int, seed: int):
        self.lengths, self.medium, self.batch, self.seed, self.epoch = (
            lengths,
            medium,
            batch,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches, rest = [], []
        for wanted in (1, 2, 0):
            chosen = rng.permutation(np.flatnonzero(self.medium == wanted))
            mega = (
                self.batch * 50
            )  # sort by length only within some 50 batches, so that epochs differ
            for start in range(0, len(chosen), mega):
                part = chosen[start : start + mega]
                part = part[np.argsort(-self.lengths[part], kind="stable")]
                whole = len(part) // self.batch * self.batch
                batches += list(part[:whole].reshape(-1, self.batch))
                rest.append(part[whole:])
        order = [batches[i] for i in rng.permutation(len(batches))]
        return iter(np.concatenate([*order, *rest]).tolist())
