"""Give verdicts on claims by one rule. ``RULE`` is its text, which is printed on every page of claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not settled"
OTHER_SIZE = "same direction, other size"
NOT_TESTED, ARITHMETIC, TOO_SHORT = "not tested", "arithmetic", "too short to judge"
MARGIN = 0.01  # a loss below one percentage point counts as none
LEVEL = 0.05  # of significance
MEASUREMENTS = 3  # fewest measurements of a time

RULE = """## How verdicts are given

The same rule holds for the papers' claims and for our own. It goes by the 95% interval.

- **supported**: the whole interval is where the claim says. **contradicted**: the whole interval is where the claim
  excludes. **not settled**: anything else.
- *Better*: the difference is above 0. *Nothing is lost*: the difference is above -1 point, overall and for each type of
  question; it is contradicted where one of them is below -1 point. The margin is ours, and no paper states one.
- Runs with the same seeds, or answers to the same questions, are compared by their paired differences.
- Where a claim needs several comparisons, their p-values are corrected by Holm's method; types of question apart from
  overall figures.
- One seed decides nothing about training. Answers of one given model decide about that model alone; their intervals
  (bootstrap) are over questions, which are taken as independent although four of them share a picture.
- A trend over depth is a rank correlation (Spearman) over all layers.
- Times are medians of at least three measurements, with their range. *supported*: the published time lies in the range;
  *same direction, other size*: all measurements are on the published side, none so near; what the FLOPs alone give
  stands beside it, since a time that follows from them is no finding of its own.
- *our control*: a comparison that is ours; the paper states no figure. *too short to judge*: the baseline has less than
  half of the accuracy that longer training of the same model reaches. *arithmetic*: follows from a formula.
"""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        df: Degrees of freedom of Student's t: 0 for a single run, infinite for intervals over questions.
    """

    mean: float
    low: float
    high: float
    df: float = math.inf

    @classmethod
    def of_runs(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of one value per seed, by Student's t; the interval of a single value is infinite."""
        values = np.asarray(values, dtype=float)
        if len(values) < 2:
            return cls(float(values.mean()), -math.inf, math.inf, 0)
        half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)
        return cls(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values) - 1)

    @property
    def one_run(self) -> bool:
        """Whether this is of a single run, which has no interval."""
        return self.df == 0

    def p_above(self, bound: float = 0.0) -> float:
        """Return the one-sided p-value of the hypothesis that the true mean is at most ``bound``."""
        return self._p(self.mean - bound, self.mean - self.low)

    def p_below(self, bound: float = 0.0) -> float:
        """Return the one-sided p-value of the hypothesis that the true mean is at least ``bound``."""
        return self._p(bound - self.mean, self.high - self.mean)

    def _p(self, distance: float, half: float) -> float:
        """The p-value of a mean ``distance`` above the bound, from the half width of the 95% interval."""
        if self.one_run:
            return 1.0
        if half <= 0:
            return 0.0 if distance > 0 else 1.0
        # half is the standard error times t.ppf, so that this is the t statistic.
        return float(stats.t.sf(distance / half * stats.t.ppf(1 - LEVEL / 2, self.df), self.df))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p-values by Holm's method.

    Args:
        p_values: (n,) p-values.

    Returns:
        (n,) corrected p-values, in the same order.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = p_values.argsort()
    corrected = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[order.argsort()]


def signs(estimates: Sequence[Estimate]) -> list[str]:
    """Give the verdict on each of several claims that a mean is above 0, corrected for their number."""
    # Two-sided, because a claim may be supported or contradicted.
    p_values = holm([2 * min(one.p_above(), one.p_below()) for one in estimates])
    return [
        OPEN if p >= LEVEL else SUPPORTED if one.mean > 0 else CONTRADICTED
        for one, p in zip(estimates, p_values, strict=True)
    ]


def better(*estimates: Estimate) -> str:
    """Give the verdict on a claim that every mean is above 0."""
    return _one_seed(estimates) or together(signs(estimates))


def no_loss(overall: Sequence[Estimate], types: Sequence[Estimate] = (), margin: float = MARGIN) -> str:
    """Give the verdict on a claim that nothing is lost.

    Args:
        overall: Differences over all questions.
        types: Differences by question type.
        margin: A loss below it counts as none.

    Returns:
        Supported if every interval lies above ``-margin``, contradicted if a difference is significantly below it.
    """
    if seed := _one_seed([*overall, *types]):
        return seed
    if all(one.low > -margin for one in (*overall, *types)):
        return SUPPORTED
    # Overall figures and question types are corrected apart.
    lost = [*holm([2 * one.p_below(-margin) for one in overall]), *holm([2 * one.p_below(-margin) for one in types])]
    return CONTRADICTED if min(lost) < LEVEL else OPEN


def trend(places: Sequence[float], values: Sequence[float]) -> tuple[Estimate, float]:
    """Compute Spearman's rank correlation of ``values`` with ``places``.

    Returns:
        The correlation with its interval, and its p-value.
    """
    # Fisher's transformation, with the standard error of Bonett and Wright (2000) for Spearman's correlation.
    found = stats.spearmanr(places, values)
    z, half = np.arctanh(np.clip(found.statistic, -1 + 1e-12, 1 - 1e-12)), stats.norm.ppf(1 - LEVEL / 2)
    half *= math.sqrt((1 + found.statistic**2 / 2) / (len(places) - 3))
    low, high = np.tanh([z - half, z + half])
    return Estimate(float(found.statistic), float(low), float(high)), float(found.pvalue)


def falls(places: Sequence[float], values: Sequence[float]) -> str:
    """Give the verdict on a claim that ``values`` fall with ``places``."""
    correlation, p = trend(places, values)
    return OPEN if p >= LEVEL else SUPPORTED if correlation.mean < 0 else CONTRADICTED


def time(measured: Sequence[float], published: float) -> str:
    """Give the verdict on a claim about a time.

    Args:
        measured: Measurements, relative to the baseline's time.
        published: The published time relative to the baseline's, below 1.
    """
    least, most = min(measured), max(measured)
    if len(measured) < MEASUREMENTS:
        return f"{OPEN}: {'one measurement' if len(measured) == 1 else 'two measurements'}"
    if least <= published <= most:
        return SUPPORTED
    return OTHER_SIZE if most < 1 else CONTRADICTED if least >= 1 else OPEN


def together(verdicts: Sequence[str]) -> str:
    """Give the verdict on a claim that needs all of ``verdicts``."""
    if all(verdict == SUPPORTED for verdict in verdicts):
        return SUPPORTED
    return CONTRADICTED if CONTRADICTED in verdicts else OPEN


def _one_seed(estimates: Sequence[Estimate]) -> str | None:
    return f"{OPEN}: one seed" if any(one.one_run for one in estimates) else None
