"""Accuracies with their intervals: overall, by type, and paired differences. One place for all that is counted.

``answers`` is always a table with a row per question: at least type and correct, such as ``evaluation.evaluate`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
from scipy import stats

from llavolta.studies.opening import StudyError

OVERALL = "overall"
DRAWN_AT_ONCE = 1 << 20  # numbers that a bootstrap holds at a time, 16 MB


def with_overall(answers: pd.DataFrame) -> pd.DataFrame:
    """``answers`` twice: as they are, and, first, all of the type "overall"."""
    return pd.concat([answers.assign(type=OVERALL), answers], ignore_index=True)


def accuracy_table(answers: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Per question type, and last over all: questions, accuracy, its 95% interval (low, high) and, where true answers
    are given, constant: the accuracy of giving every question of a type that type's most frequent answer.

    by: further columns to tell apart; then type is a column, too, and the types stand in the order of ``answers``.
    """
    if "answer" in answers:
        best = answers.groupby([*by, "type"])["answer"].transform(lambda given: given.mode()[0])
        answers = answers.assign(constant=answers.answer == best)
    rows = []
    for key, part in with_overall(answers).groupby([*by, "type"], sort=not by):
        low, high = interval(part.correct)
        row = dict(
            zip([*by, "type"], key, strict=True), questions=len(part), accuracy=part.correct.mean()
        )
        row |= dict(low=low, high=high) | (
            {"constant": part.constant.mean()} if "answer" in answers else {}
        )
        rows.append(row)
    table = pd.DataFrame(rows)
    if by:
        return table
    table = table.set_index("type")
    return table.loc[[*table.index.drop(OVERALL), OVERALL]]


def interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of ``values`` (n,), by bootstrap (percentiles), in bounded memory."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise StudyError("there is no answer to take a mean of; ask at least one question")
    if len(values) < 2 or (values == values[0]).all():  # every draw is the same
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        n_resamples=draws,
        batch=max(1, DRAWN_AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of ``values``, one a seed, by Student's t. Raises StudyError for fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise StudyError("an interval over seeds needs at least two seeds")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def paired_difference(
    first: pd.Series, second: pd.Series, interval_of=interval
) -> dict[str, float]:
    """{"difference", "difference_low", "difference_high"} of ``first`` less ``second``, paired by their index.

    interval_of: ``interval`` over questions, or ``mean_interval`` over seeds.
    """
    difference = (first.astype(float) - second.astype(float)).dropna()  # one may have fewer seeds
    low, high = interval_of(difference)
    return {"difference": float(difference.mean()), "difference_low": low, "difference_high": high}


def points(share: float) -> str:
    """``share`` in percentage points, with its sign: 0.0125 is "+1.3". See ``percent``."""
    text = _hundredfold(share)
    return text if text.startswith("-") else f"+{text}"


def percent(share: float) -> str:
    """``share`` as "92.9%".

    It is rounded once and halves go away from 0, so that a CSV of six digits and the figures that it was written from
    give the same text.
    """
    return f"{_hundredfold(share)}%"


def _hundredfold(share: float) -> str:
    exact = Decimal(repr(round(100 * float(share), 4)))
    return str(exact.quantize(Decimal("0.1"), ROUND_HALF_UP) + 0)  # adding 0 turns -0.0 into 0.0
