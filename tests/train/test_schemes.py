"""Plans, schemes and the compression ratio."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavolta import SCHEMES, AveragePool, Scheme, Stage, compression_ratio, format_plan, parse_plan
from llavolta.compression.plan import tokens_per_layer
from llavolta.errors import ConfigError, PlanError
from llavolta.train import schemes
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import BASELINE_SCHEMES, EXTRA_SCHEMES, PAPER_SCHEMES, scale_plan

NAMES = ["single-stage", "heavy", "light", "three-stage", "four-stage-wider", "four-stage-deeper"]


@pytest.mark.parametrize(
    ("layer", "stride", "published"), [(2, 8, 5.565), (16, 8, 1.778), (2, 2, 1.882), (16, 2, 1.333), (5, 1, 1.0)]
)
def test_compression_ratio_as_published(layer, stride, published):
    ratio = compression_ratio(num_layers=32, num_tokens=576, layer=layer, stride=stride)
    assert ratio == pytest.approx(published, abs=5e-4)


def test_compression_ratio_counts_the_shorter_last_window():
    assert compression_ratio(num_layers=2, num_tokens=10, layer=1, stride=4) == pytest.approx(20 / (10 + 3))


@pytest.mark.parametrize(("layer", "stride"), [(32, 2), (-1, 2), (2, 0), (2, 1.5)])
def test_compression_ratio_refuses(layer, stride):
    with pytest.raises(ValueError):
        compression_ratio(num_layers=32, num_tokens=576, layer=layer, stride=stride)


def test_the_six_schemes_as_published():
    assert list(PAPER_SCHEMES) == NAMES
    third = (Stage("2:avgpool:8", 1 / 3), Stage("16:avgpool:8", 1 / 3), Stage("none", 1 / 3))
    assert SCHEMES["three-stage"].stages == third
    fast = SCHEMES["fast"].scaled(8)
    assert [s.plan for s in fast.stages] == ["0:kmeans:0.25:5:0;4:avgpool:36", "4:avgpool:8", "none"]
    assert fast.align.plan == "0:avgpool2d:4;4:avgpool:9" and fast.align.share == 1
    plans = {name: [stage.plan for stage in scheme.stages] for name, scheme in PAPER_SCHEMES.items()}
    assert plans["four-stage-wider"] == ["2:avgpool:8", "2:avgpool:2", "16:avgpool:2", "none"]
    assert plans["four-stage-deeper"] == ["2:avgpool:8", "16:avgpool:8", "16:avgpool:2", "none"]
    assert plans["heavy"] == ["2:avgpool:8", "none"] and plans["light"] == ["16:avgpool:8", "none"]
    assert all(plan[-1] == "none" for plan in plans.values())  # every scheme ends with standard training


def test_every_named_scheme_is_in_one_table_and_trains_by_its_name():
    controls = {"three-stage-reversed", "three-stage-shuffled", "constant", "three-stage-pruned"}
    assert {*SCHEMES} == {*NAMES, "dualspeed", "dualspeed-random", "fast", *controls}
    for name, scheme in SCHEMES.items():
        assert scheme.name == name and scheme.scaled(8).scaled(8, 8) == scheme.scaled(8)
        assert TrainConfig(output="x", scheme=name)._written_scheme() == scheme
    for old, now in {"NAMED": SCHEMES, "NEIGHBOURS": BASELINE_SCHEMES, "OURS": EXTRA_SCHEMES}.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now "):
            assert getattr(schemes, old) is now


@pytest.mark.parametrize(("layers", "heavy", "light"), [(32, 2, 16), (8, 1, 4), (6, 1, 3), (40, 3, 20), (16, 1, 8)])
def test_schemes_scale_to_any_depth(layers, heavy, light):
    plans = [stage.plan for stage in SCHEMES["three-stage"].scaled(layers).stages]
    assert plans == [f"{heavy}:avgpool:8", f"{light}:avgpool:8", "none"]


def test_layer_zero_stays_zero_and_clashes_are_refused():
    assert scale_plan("0:avgpool:2", 4) == "0:avgpool:2"
    with pytest.raises(PlanError, match="both become layer 1"):
        scale_plan("2:avgpool:2;4:avgpool:2", 8)


def test_the_stage_is_a_function_of_the_step():
    scheme = SCHEMES["three-stage"]
    assert [scheme.stage_at(step, 9) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert SCHEMES["single-stage"].stage_at(8, 9) == 0
    with pytest.raises(ValueError, match=r"0\.\.8"):
        scheme.stage_at(9, 9)


def test_pivots_as_in_the_public_script():
    plans = [stage.plan for stage in SCHEMES["four-stage-wider"].stages]
    scheme = Scheme.from_pivots("published", plans, [1300, 2600, 3900], 5200)
    assert scheme.boundaries(5200) == (1300, 2600, 3900, 5200)
    with pytest.raises(ValueError, match="pivots"):
        Scheme.from_pivots("bad", plans, [1300, 1300, 3900], 5200)


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), extra=st.integers(0, 200), data=st.data())
def test_every_stage_has_steps_and_they_cover_the_run(weights, extra, data):
    total = len(weights) + extra
    scheme = Scheme("any", tuple(Stage("none", weight / sum(weights)) for weight in weights))
    ends = scheme.boundaries(total)
    assert ends[-1] == total and all(b > a for a, b in zip((0, *ends), ends, strict=False))
    step = data.draw(st.integers(0, total - 1))
    stage = scheme.stage_at(step, total)
    assert (0, *ends)[stage] <= step < ends[stage]


def test_a_scheme_checks_itself():
    with pytest.raises(ValueError, match=r"sum to 0\.5"):
        Scheme("half", (Stage("none", 0.5),))
    with pytest.raises(ValueError, match="share"):
        Stage("none", 0)
    with pytest.raises(PlanError):
        Stage("2:avgpol:8", 1)
    with pytest.raises(ValueError, match="too few"):
        SCHEMES["three-stage"].boundaries(2)


@given(
    plan=st.dictionaries(st.integers(0, 40), st.integers(1, 50).map(AveragePool), max_size=4),
)
def test_plans_read_back_as_written(plan):
    assert parse_plan(format_plan(plan)) == plan == parse_plan(plan)


def test_plan_text():
    assert parse_plan(" 2:avgpool:8 ") == {2: AveragePool(8)} == parse_plan("2:avgpool:stride=8")
    assert parse_plan("none") == parse_plan(None) == parse_plan("") == {}
    assert tokens_per_layer("1:avgpool:4;3:avgpool:2", 4, 18) == [18, 5, 5, 3]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("avgpool:8", "cannot read 'avgpool:8'.*LAYER:COMPRESSOR:OPTION"),
        ("2", "cannot read"),
        ("two:avgpool:8", "cannot read"),
        ("-1:avgpool:8", "whole number from 0"),
        ("2:avgpool", "stride"),
        ("2:avgpool:eight", "stride must be a whole number"),
        ("2:avgpool:0", "at least 1, not 0"),
        ("2:avgpool:2:3", "per_frame must be true or false, not 3"),
        ("2:avgpool:2:true:3", "not more"),
        ("2:avgpool:strid=3", "unknown or given twice"),
        ("2:pool:3", "unknown compressor 'pool'.*known: .*avgpool"),
        ("2:avgpool:8;2:avgpool:4", "twice"),
        ("2:avgpool:8;", "cannot read ''"),
        (8, "not int"),
        ({2: 8}, "expected a Compressor"),
    ],
)
def test_malformed_plans_say_what_is_wrong(text, match):
    with pytest.raises(PlanError, match=match):
        parse_plan(text)


def test_truth_values_are_neither_pivots_nor_shares():
    with pytest.raises(ValueError, match="pivots must be optimizer steps"):
        Scheme.from_pivots("s", ["2:avgpool:8", "none"], [True], 4)
    with pytest.raises(ValueError, match="share must be"):
        Stage("none", True)


def test_a_stage_may_warm_up_anew():
    scheme = Scheme("warm", (Stage("1:avgpool:8", 0.5), Stage("none", 0.5, warmup=0.4)))
    assert [scheme.warmth(step, 20) for step in range(20)] == [1.0] * 10 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 6
    assert Scheme.of("warm", scheme.written) == scheme and "warmup" not in scheme.written[0]
    assert str(scheme.stages[1]) == "none, warmup 0.4"  # alignments are told apart by it
    for wrong in (1, -0.1, True, "0.1"):
        with pytest.raises(ConfigError, match="warmup must be a share"):
            Stage("none", 1, warmup=wrong)


def test_a_stage_may_have_more_of_the_learning_rate():
    scheme = Scheme("high", (Stage("1:avgpool:8", 0.5), Stage("none", 0.5, warmup=0.4, lr_scale=3)))
    assert [scheme.warmth(step, 10) for step in range(10)] == [1.0] * 5 + [1.5, 3.0] + [3.0] * 3
    assert Scheme.of("high", scheme.written) == scheme and set(scheme.written[0]) == {"plan", "share"}
    assert str(scheme.stages[1]) == "none, warmup 0.4, learning rate x 3"
    for wrong in (0, -1, True, "2", float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="lr_scale must be"):
            Stage("none", 1, lr_scale=wrong)


def test_drawn_layers_and_options_are_scaled():
    assert scale_plan("8|16:avgpool:8", 8) == "2|4:avgpool:8"
    assert scale_plan("16|24:fastv:0.5|0.25;vision:avgpool:2", 8) == "vision:avgpool:2;4|6:fastv:0.5|0.25"
    assert Scheme.equal("s", "2|16:avgpool:8", "none").scaled(4).stages[0].plan == "1|2:avgpool:8"
    with pytest.raises(PlanError, match="both become layer 1 of 4"):
        scale_plan("2|16:avgpool:2;4:avgpool:2", 4)


def test_a_plan_may_be_drawn_for_each_step():
    stage = Stage("2:avgpool2d:1|2|4;16:avgpool:2", 1)
    assert stage.plan == "2:avgpool2d:1|2|4;16:avgpool:2" and len(stage.choices) == 3
    drawn = [stage.drawn(step, seed=3).plan for step in range(600)]
    assert drawn == [stage.drawn(step, seed=3).plan for step in range(600)]
    assert drawn != [stage.drawn(step, seed=4).plan for step in range(600)]
    counts = [drawn.count(plan) for plan in sorted(set(drawn))]
    assert len(counts) == 3 and min(counts) > 150
    assert sum(p.share for p in stage.passes) == pytest.approx(1)
    means = [(144 + 36 + 9) / 3, (72 + 18 + 5) / 3]
    assert stage.tokens_per_layer(32, 144)[2::14][:2] == pytest.approx(means)
    scheme = Scheme("matryoshka", (stage,))
    assert Scheme.of("matryoshka", scheme.written) == scheme
    assert scheme.scaled(8).stages[0].plan == "1:avgpool2d:1|2|4;4:avgpool:2"
    assert len(Stage("0:avgpool:1|2;4:random:0.5|1", 1).choices) == 4
    with pytest.raises(ConfigError, match="cannot be with slow_every"):
        Stage("0:avgpool2d:1|2", 1, slow_every=2)
    with pytest.raises(PlanError, match="unknown compressor"):
        Stage("0:avgpool:1|2;4:none:3", 1)
