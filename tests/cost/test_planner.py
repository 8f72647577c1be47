"""Hours, money and memory against figures worked out by hand."""

from __future__ import annotations

import pytest

from llavolta import SCHEMES
from llavolta.cost.flops import Passes, StepCost, cost_model, reference_config
from llavolta.cost.planner import (
    GPUS,
    PlannerError,
    Speed,
    fit_speed,
    memory_table,
    published_hours,
    scheme_table,
    within,
)


@pytest.fixture(scope="module")
def model():
    return cost_model(reference_config())


def cost(rest: float, attention: float) -> StepCost:
    nothing = Passes(0)
    return StepCost(nothing, nothing, Passes(rest), Passes(attention), nothing)


def test_a_gpu_at_a_share_of_its_peak():
    speed = Speed.of_gpu("A100-80GB", 0.5, 2)
    assert speed.seconds(cost(300e12, 12e12)) == pytest.approx(1.0)  # 312 TFLOP at 2 x 156 TFLOP/s
    for wrong in (("A1000", 0.5, 1), ("H200", 0, 1), ("H200", 1.5, 1), ("H200", 0.5, 0)):
        with pytest.raises(PlannerError):
            Speed.of_gpu(*wrong)


def test_speeds_are_found_again_from_measured_steps():
    true = Speed(2e-12, 5e-12, 0.3)
    costs = [cost(4e12, 1e12), cost(2e12, 0.2e12), cost(1e12, 0.1e12)]
    for known, speed in ((3, true), (2, Speed(2e-12, 5e-12))):
        seconds = [speed.seconds(c) for c in costs[:known]]
        found = fit_speed(costs[:known], seconds)
        assert [found.seconds(c) for c in costs] == pytest.approx([speed.seconds(c) for c in costs], rel=1e-6)
    one = fit_speed(costs[:1], [10.0])
    assert one.per_linear == one.per_attention == pytest.approx(2e-12)
    with pytest.raises(PlannerError, match="as many measured times"):
        fit_speed(costs, [1.0])


def test_noise_never_makes_a_negative_rate():
    speed = fit_speed([cost(4e12, 1e12), cost(2e12, 0.2e12)], [1.0, 0.9])
    assert min(speed.per_linear, speed.per_attention, speed.fixed) >= 0


def test_hours_of_a_scheme_are_those_of_its_stages(model):
    speed = Speed.of_gpu("H100-SXM", 0.4, 8)
    schemes = {name: SCHEMES[name] for name in ("single-stage", "three-stage")}
    table = scheme_table(model, schemes, 1000, speed, price=2.0, gpus=8, text_tokens=60)
    seconds = [speed.seconds(model.step(plan, 60)) for plan in ("2:avgpool:8", "16:avgpool:8", "none")]
    assert table.hours["three-stage"] == pytest.approx(1000 * sum(seconds) / 3 / 3600)
    assert table.hours["single-stage"] == pytest.approx(1000 * seconds[2] / 3600)
    assert table.time_ratio["three-stage"] == pytest.approx(sum(seconds) / 3 / seconds[2])
    assert table.price["single-stage"] == pytest.approx(16 * table.hours["single-stage"])
    assert table.ratio["single-stage"] == 1
    # CR of the stages: 5.565, 1.778, 1; tokens add up, ratios do not
    assert table.ratio["three-stage"] == pytest.approx(3 / (1 / 5.5652 + 1 / 1.7778 + 1), rel=1e-4)


def test_which_scheme_fits(model):
    table = scheme_table(model, SCHEMES, 665_298, Speed.of_gpu("A100-80GB", 0.4, 8))
    budget = (table.hours["light"] + table.hours["single-stage"]) / 2
    fitting = within(table, budget)
    assert fitting.index[0] == "light" and "single-stage" not in fitting.index
    assert fitting.ratio.is_monotonic_increasing
    with pytest.raises(PlannerError, match="no scheme takes at most 0.01 hours; the fastest, '"):
        within(table, 0.01)


def test_memory(model):
    table = memory_table(model, ["none", "2:avgpool:8"], batch=4, gpus=8, text_tokens=60)
    assert table.weights["none"] == pytest.approx(2 * 7.063427072 / 8)
    assert table.optimizer["none"] == pytest.approx(12 * (7.063427072 - 0.303507456) / 8)
    kept = (2 * 636 + 30 * 132) / (32 * 636)
    assert table.activations["2:avgpool:8"] / table.activations["none"] == pytest.approx(kept)
    assert table.cache_per_example["none"] == pytest.approx(32 * 636 * 2 * 4096 * 2 / 1e9)
    less = memory_table(model, ["none"], batch=4, gpus=8, checkpointing=True, lora_rank=128, text_tokens=60)
    assert less.activations["none"] < table.activations["none"] / 10
    assert less.optimizer["none"] < table.optimizer["none"] / 10


def test_the_published_hours_and_data_sheets():
    assert published_hours() == {"single-stage": 15.3, "four-stage-wider": 12.8}
    assert all(gpu.peak > 100 and gpu.memory >= 24 for gpu in GPUS.values())
