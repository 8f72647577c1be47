"""The order of the data: batches of one modality and of similar length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Random order in which each batch has one modality and examples of similar length.

    This is LLaVA's ``group_by_modality_length``. The order depends on the seed and the epoch alone,
    so a resumed run sees the same batches. The examples that fill no whole batch come last, where
    modalities may mix.

    Args:
        lengths: (n,) length of each example; in training, words.
        medium: (n,) modality of each example: 0 text, 1 images, 2 video.
        batch: Examples of an optimizer step over all processes.
        seed: Seed of the order.
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
        """Set the epoch, from 0, whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches, rest = [], []
        for wanted in (1, 2, 0):
            chosen = rng.permutation(np.flatnonzero(self.medium == wanted))
            # Sorting all examples at once would give every epoch nearly the same batches.
            mega = self.batch * 50
            for start in range(0, len(chosen), mega):
                part = chosen[start : start + mega]
                part = part[np.argsort(-self.lengths[part], kind="stable")]  # longest first
                whole = len(part) // self.batch * self.batch
                batches += list(part[:whole].reshape(-1, self.batch))
                rest.append(part[whole:])
        order = [batches[i] for i in rng.permutation(len(batches))]
        return iter(np.concatenate([*order, *rest]).tolist())
