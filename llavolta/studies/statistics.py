"""Compute accuracies with 95% intervals, overall and by question type, and paired differences.

``answers`` is always a table with one row per question and at least the columns type and correct,
such as ``evaluation.evaluate`` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
from scipy import stats

from llavolta.errors import ConfigError

OVERALL = "overall"
DRAWN_AT_ONCE = 1 << 20  # numbers that a bootstrap resamples at a time: 16 MB


def with_overall(answers: pd.DataFrame) -> pd.DataFrame:
    """Return ``answers`` twice: first with the type "overall", then as they are."""
    return pd.concat([answers.assign(type=OVERALL), answers], ignore_index=True)


def accuracy_table(answers: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Measure the accuracy per question type.

    Args:
        answers: One row per question: type, correct, and the columns ``by``. If it has the
            reference answer as well, the table gets the column constant.
        by: Further columns to group by.

    Returns:
        One row per type, "overall" last: questions (their number), accuracy, and its 95% interval
        (low, high). constant is the accuracy of a model that gives each type's most frequent
        reference answer to all questions of the type. The index is type. With ``by``, type is a
        column, groups stand in the order of ``answers``, and "overall" comes first.
    """
    if "answer" in answers:
        # mode() sorts, so that of several most frequent answers the first by alphabet counts.
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
    """Compute the 95% percentile bootstrap interval of a mean.

    Args:
        values: (n,) numbers, such as whether each question was answered correctly.
        draws: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The ends of the interval. They are equal if all values are.

    Raises:
        ConfigError: There are no values.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ConfigError("there is no answer to take a mean of; ask at least one question")
    if len(values) < 2 or (values == values[0]).all():  # all resamples are equal
        return float(values[0]), float(values[0])
    # In batches, so that memory does not grow with the number of values.
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
    """Compute the 95% interval of a mean by Student's t.

    Args:
        values: (n,) one number per seed.

    Returns:
        The ends of the interval.

    Raises:
        ConfigError: There are fewer than two values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ConfigError("an interval over seeds needs at least two seeds")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def paired_difference(
    first: pd.Series, second: pd.Series, interval_of=interval
) -> dict[str, float]:
    """Compute the mean difference of two series, paired by their index.

    Args:
        first: One number per question or seed.
        second: The numbers to subtract.
        interval_of: ``interval`` over questions, or ``mean_interval`` over seeds.

    Returns:
        "difference", and its 95% interval "difference_low" and "difference_high".

    Raises:
        ConfigError: Too few pairs for the interval.
    """
    # The series align by index. Pairs that one of them lacks are NaN and do not count.
    difference = (first.astype(float) - second.astype(float)).dropna()
    low, high = interval_of(difference)
    return {"difference": float(difference.mean()), "difference_low": low, "difference_high": high}


def points(share: float) -> str:
    """Format ``share`` in percentage points with its sign: 0.0125 is "+1.3". See ``percent``."""
    text = _hundredfold(share)
    return text if text.startswith("-") else f"+{text}"


def percent(share: float) -> str:
    """Format ``share`` (0 to 1) in percent, such as "92.9%".

    Halves round away from 0, so that figures read from a CSV of six digits give the same text as
    the figures that were written.
    """
    return f"{_hundredfold(share)}%"


def _hundredfold(share: float) -> str:
    """``share`` times 100 with one digit after the point."""
    # Four digits of a percentage are the six digits of a share, which a CSV preserves.
    exact = Decimal(repr(round(100 * float(share), 4)))
    return str(exact.quantize(Decimal("0.1"), ROUND_HALF_UP) + 0)  # adding 0 turns -0.0 into 0.0
