"""The one rule by which pages of claims give verdicts; ``RULE`` is its text, printed on every page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not settled"
OTHER_SIZE = "same direction, other size"
NOT_TESTED, ARITHMETIC, TOO_SHORT = "not tested", "arithmetic", "too short to judge"
MARGIN = 0.01  # a loss below one point counts as none
LEVEL = 0.05
MEASUREMENTS = 3  # of a time, at least

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

    df: degrees of freedom of Student's t; infinite for intervals over questions.
    """

    mean: float
    low: float
    high: float
    df: float = math.inf

    @classmethod
    def of_runs(cls, values: Sequence[float]) -> Estimate:
        """Of one value a seed, by Student's t; of a single one the interval is everything."""
        values = np.asarray(values, dtype=float)
        if len(values) < 2:
            return cls(float(values.mean()), -math.inf, math.inf, 0)
        half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)
        return cls(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values) - 1)

    @property
    def one_run(self) -> bool:
        return self.df == 0

    def p_above(self, bound: float = 0.0) -> float:
        """One-sided p-value against a true mean of at most ``bound``."""
        return self._p(self.mean - bound, self.mean - self.low)

    def p_below(self, bound: float = 0.0) -> float:
        """One-sided p-value against a true mean of at least ``bound``."""
        return self._p(bound - self.mean, self.high - self.mean)

    def _p(self, distance: float, half: float) -> float:
        if self.one_run:
            return 1.0
        if half <= 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / half * stats.t.ppf(1 - LEVEL / 2, self.df), self.df))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """``p_values`` corrected by Holm's method, in their order."""
    p_values = np.asarray(p_values, dtype=float)
    order = p_values.argsort()
    corrected = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[order.argsort()]


def signs(estimates: Sequence[Estimate]) -> list[str]:
    """Of each of several claims that a mean is above 0, its verdict, corrected for their number."""
    p_values = holm([2 * min(one.p_above(), one.p_below()) for one in estimates])
    return [
        OPEN if p >= LEVEL else SUPPORTED if one.mean > 0 else CONTRADICTED
        for one, p in zip(estimates, p_values, strict=True)
    ]


def better(*estimates: Estimate) -> str:
    """The verdict on a claim that every mean is above 0."""
    return _one_seed(estimates) or together(signs(estimates))


def no_loss(overall: Sequence[Estimate], types: Sequence[Estimate] = (), margin: float = MARGIN) -> str:
    """The verdict on a claim that no mean is below ``-margin``, overall and by type of question."""
    if seed := _one_seed([*overall, *types]):
        return seed
    if all(one.low > -margin for one in (*overall, *types)):
        return SUPPORTED
    lost = [*holm([2 * one.p_below(-margin) for one in overall]), *holm([2 * one.p_below(-margin) for one in types])]
    return CONTRADICTED if min(lost) < LEVEL else OPEN


def trend(places: Sequence[float], values: Sequence[float]) -> tuple[Estimate, float]:
    """The rank correlation of ``values`` with ``places``, its interval, and its p-value."""
    found = stats.spearmanr(places, values)
    z, half = np.arctanh(np.clip(found.statistic, -1 + 1e-12, 1 - 1e-12)), stats.norm.ppf(1 - LEVEL / 2)
    half *= math.sqrt((1 + found.statistic**2 / 2) / (len(places) - 3))
    low, high = np.tanh([z - half, z + half])
    return Estimate(float(found.statistic), float(low), float(high)), float(found.pvalue)


def falls(places: Sequence[float], values: Sequence[float]) -> str:
    """The verdict on a claim that ``values`` fall with ``places``."""
    correlation, p = trend(places, values)
    return OPEN if p >= LEVEL else SUPPORTED if correlation.mean < 0 else CONTRADICTED


def time(measured: Sequence[float], published: float) -> str:
    """The verdict on a claim that a time is ``published`` of the baseline's, below 1."""
    least, most = min(measured), max(measured)
    if len(measured) < MEASUREMENTS:
        return f"{OPEN}: {'one measurement' if len(measured) == 1 else 'two measurements'}"
    if least <= published <= most:
        return SUPPORTED
    return OTHER_SIZE if most < 1 else CONTRADICTED if least >= 1 else OPEN


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that needs all of ``verdicts``."""
    if all(verdict == SUPPORTED for verdict in verdicts):
        return SUPPORTED
    return CONTRADICTED if CONTRADICTED in verdicts else OPEN


def _one_seed(estimates: Sequence[Estimate]) -> str | None:
    return f"{OPEN}: one seed" if any(one.one_run for one in estimates) else None
