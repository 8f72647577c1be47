"""Hours, money and memory against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llavolta import SCHEMES
from llavolta.cost.flops import Passes, StepCost, cost_model
from llavolta.cost.planner import GPUS, Speed, fit_speed, memory_table, published_hours, scheme_table, subject, within
from llavolta.cost.references import reference_config
from llavolta.errors import ConfigError
from llavolta.train.schemes import PAPER_SCHEMES, Stage


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
        with pytest.raises(ConfigError):
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
    with pytest.raises(ConfigError, match="as many measured times"):
        fit_speed(costs, [1.0])


def test_noise_never_makes_a_negative_rate():
    speed = fit_speed([cost(4e12, 1e12), cost(2e12, 0.2e12)], [1.0, 0.9])
    assert min(speed.per_linear, speed.per_attention, speed.fixed) >= 0


TOKENS = {  # of an image, by its size
    "llava-1.5-7b": ((640, 480), 576),
    "qwen2.5-vl-7b": ((330, 230), 12 * 8),  # 336 x 224 pixels, 28 a side
    "qwen3-vl-8b": ((320, 256), 10 * 8),  # 32 a side
    "internvl3-8b": ((640, 480), (4 * 3 + 1) * 256),  # tiles, and the whole image
    "smolvlm-500m": ((640, 160), (4 * 1 + 1) * 64),
    # the whole image, and 2 x 2 tiles without their padding
    "llava-onevision-7b": ((640, 480), 27 * 27 + 40 * (54 + 1)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "internvl3-8b" else pytest.mark.slow) for name in TOKENS]
)
def test_other_families_are_planned_by_what_their_processors_make(name):
    size, visual = TOKENS[name]
    planned = subject(name, size=size)
    model = cost_model(planned.config)
    assert model.tokens_of(planned.pictures) == visual
    schemes = {of: SCHEMES[of].scaled(len(model.layers)) for of in ("single-stage", "four-stage-wider")}
    options = dict(pictures=planned.pictures, checkpointing=True, lora_rank=8)
    table = scheme_table(model, schemes, 1000, Speed.of_gpu("H100-SXM", 0.4), **options)
    lengths = model.lengths("none", 64, 1, [visual])
    assert set(lengths) == {64 + visual} and table.hours["single-stage"] > table.hours["four-stage-wider"] > 0
    memory = memory_table(model, ["none", "0:avgpool:4"], lora_rank=8, pictures=planned.pictures)
    assert memory.cache_per_example["0:avgpool:4"] / memory.cache_per_example["none"] == pytest.approx(
        (64 + -(-visual // 4)) / (64 + visual)
    )
    assert memory.weights["none"] == pytest.approx(2 * sum(model.parameters.values()) / 1e9, rel=0.01)


@pytest.mark.parametrize("size", [(640,), (0, 480), (640.5, 480)])
def test_a_size_that_no_picture_has(size):
    with pytest.raises(ConfigError, match="a width and a height"):
        subject("qwen3-vl-8b", size=size)


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


def test_alignment_is_a_part_of_the_recipe(model):
    speed = Speed.of_gpu("H100-SXM", 0.4, 8)
    align = Stage("0:avgpool2d:4", 0.5)
    schemes = {"plain": SCHEMES["single-stage"], "short": replace(SCHEMES["three-stage"], align=align)}
    table = scheme_table(model, schemes, 1000, speed, captions=900, text_tokens=60, labelled=20, lora_rank=8)
    caption = {plan: speed.seconds(model.step(plan, 20, phase="align")) for plan in ("none", "0:avgpool2d:4")}
    assert table.align_hours["plain"] == pytest.approx(900 * caption["none"] / 3600)
    assert table.align_hours["short"] == pytest.approx(450 * caption["0:avgpool2d:4"] / 3600)
    assert table.recipe_ratio["plain"] == 1
    both = table.align_hours + table.hours
    assert table.recipe_ratio["short"] == pytest.approx(both["short"] / both["plain"])


def test_which_scheme_fits(model):
    table = scheme_table(model, PAPER_SCHEMES, 665_298, Speed.of_gpu("A100-80GB", 0.4, 8))
    budget = (table.hours["light"] + table.hours["single-stage"]) / 2
    fitting = within(table, budget)
    assert fitting.index[0] == "light" and "single-stage" not in fitting.index
    assert fitting.ratio.is_monotonic_increasing
    with pytest.raises(ConfigError, match="no scheme takes at most 0.01 hours; the fastest, '"):
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
