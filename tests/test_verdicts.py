"""papers/verdicts.py: the one rule, on made-up figures and at its boundaries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import verdicts
from scipy import stats
from verdicts import CONTRADICTED, OPEN, OTHER_SIZE, SUPPORTED, Estimate


def test_an_estimate_has_the_interval_and_p_values_of_scipy():
    values = [0.01, 0.03, -0.02, 0.02, 0.015]
    one = Estimate.of_runs(values)
    found = stats.ttest_1samp(values, 0)
    assert (one.low, one.high) == pytest.approx(found.confidence_interval(0.95))
    assert 2 * min(one.p_above(), one.p_below()) == pytest.approx(found.pvalue)
    assert one.p_above(-0.01) == pytest.approx(stats.ttest_1samp(values, -0.01, alternative="greater").pvalue)
    edge = Estimate(0.02, 0.0, 0.05)  # an interval over questions, which need not be symmetric
    assert 2 * edge.p_above() == pytest.approx(0.05) and edge.p_below(0.05) == pytest.approx(0.025)
    assert Estimate(0.0, 0.0, 0.0).p_above(-0.01) == 0 and Estimate(0.0, 0.0, 0.0).p_above() == 1


def test_holm_is_that_of_the_textbook():
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and len(verdicts.holm([])) == 0


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.001, 0.02, SUPPORTED), (-0.001, 0.02, OPEN), (-0.02, 0.001, OPEN), (-0.02, -0.001, CONTRADICTED)],
)
def test_better_goes_by_the_interval(low, high, verdict):
    assert verdicts.better(Estimate((low + high) / 2, low, high)) == verdict


def test_several_comparisons_are_corrected():
    clear = Estimate(0.01, 0.0005, 0.0195)  # alone it is above 0
    assert verdicts.signs([clear]) == [SUPPORTED] and verdicts.signs([clear] * 3) == [OPEN] * 3
    sure = Estimate(0.03, 0.02, 0.04)
    assert verdicts.signs([sure, clear, Estimate(-0.03, -0.04, -0.02)]) == [SUPPORTED, SUPPORTED, CONTRADICTED]
    assert verdicts.better(sure, clear, Estimate(-0.03, -0.04, -0.02)) == CONTRADICTED
    assert verdicts.better(sure, Estimate(0.0, -0.1, 0.1)) == OPEN


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.0099, 0.004, SUPPORTED),
        (-0.0099, -0.001, SUPPORTED),  # a loss that is shown, but below a point
        (-0.0101, 0.004, OPEN),
        (-0.018, -0.002, OPEN),  # a loss that is shown, but perhaps below a point
        (-0.02, -0.0101, CONTRADICTED),
        (-0.2, 0.2, OPEN),
    ],
)
def test_nothing_is_lost_needs_a_margin(low, high, verdict):
    assert verdicts.no_loss([Estimate((low + high) / 2, low, high)]) == verdict


def test_no_type_of_question_may_pay():
    fine, worse = Estimate(0.0, -0.005, 0.005), Estimate(-0.03, -0.04, -0.02)
    assert verdicts.no_loss([fine], [fine, fine]) == SUPPORTED
    assert verdicts.no_loss([fine], [fine, Estimate(-0.005, -0.02, 0.01)]) == OPEN
    assert verdicts.no_loss([fine], [fine, worse]) == CONTRADICTED
    edge = Estimate(-0.02, -0.0298, -0.0102)
    assert verdicts.no_loss([edge], [fine] * 3) == CONTRADICTED  # overall figures are corrected by themselves
    assert verdicts.no_loss([fine], [edge, fine, fine]) == OPEN


def test_one_seed_decides_nothing():
    one = Estimate.of_runs([0.5])
    assert one.one_run and math.isinf(one.low)
    assert verdicts.better(one) == verdicts.no_loss([one]) == f"{OPEN}: one seed"
    assert verdicts.better(Estimate(0.5, 0.4, 0.6), one) == f"{OPEN}: one seed"


def test_a_trend_is_over_all_layers():
    places = np.arange(8)
    assert verdicts.falls(places, 8 - places) == SUPPORTED and verdicts.falls(places, places**2) == CONTRADICTED
    between = [24, 11, 11, 3, 2, 5, 36, 17]  # falls from the first to the last
    assert verdicts.falls(places, between) == OPEN
    correlation, p = verdicts.trend(places, between)
    assert correlation.mean == pytest.approx(stats.spearmanr(places, between).statistic) and p > 0.05
    assert correlation.low < correlation.mean < correlation.high


def test_times_need_three_measurements_and_the_published_size():
    assert verdicts.time([0.7], 0.84) == f"{OPEN}: one measurement"
    assert verdicts.time([0.7, 0.71], 0.84) == f"{OPEN}: two measurements"
    assert verdicts.time([0.80, 0.84, 0.85], 0.84) == SUPPORTED
    assert verdicts.time([0.70, 0.72, 0.71], 0.84) == verdicts.time([0.9, 0.95, 0.99], 0.84) == OTHER_SIZE
    assert verdicts.time([1.0, 1.1, 1.2], 0.84) == CONTRADICTED and verdicts.time([0.95, 1.1, 1.2], 0.84) == OPEN
