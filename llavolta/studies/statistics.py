"""Accuracies with their intervals: overall, by type, and paired differences."""

from __future__ import annotations

import numpy as np
import pandas as pd

DRAWN_AT_ONCE = 1 << 20  # numbers that a bootstrap holds at a time, 16 MB


def interval(correct: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of ``correct`` (n,)."""
    correct = np.asarray(correct, dtype=float)
    rng, means = np.random.default_rng(seed), []
    for rows in _parts(draws, max(1, DRAWN_AT_ONCE // max(len(correct), 1))):
        means.append(correct[rng.integers(0, len(correct), (rows, len(correct)))].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _parts(total: int, size: int) -> list[int]:
    """``total`` in parts of ``size``, the last one smaller."""
    return [min(size, total - start) for start in range(0, total, size)]


def accuracy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Per question type, and over all: questions, accuracy, its 95% interval (low, high), best constant answer.

    ``constant`` is the accuracy of giving every question of a type that type's most frequent answer.
    """
    best = frame.groupby("type")["answer"].transform(lambda answers: answers.mode()[0])
    frame = frame.assign(constant=frame.answer == best)
    rows = []
    for kind, part in [*frame.groupby("type"), ("overall", frame)]:
        low, high = interval(part.correct)
        row = dict(type=kind, questions=len(part), accuracy=part.correct.mean(), low=low, high=high)
        rows.append({**row, "constant": part.constant.mean()})
    return pd.DataFrame(rows).set_index("type")
