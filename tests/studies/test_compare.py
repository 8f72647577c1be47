"""Schemes side by side: statistics against hand-computed values, controls of equal cost, failures."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from llavolta import SCHEMES, Scheme
from llavolta.compression.plan import tokens_per_layer
from llavolta.data import padding_colour
from llavolta.errors import ConfigError, DataError, PlanError
from llavolta.studies import compare as compare_module
from llavolta.studies.compare import (
    CONTROLS,
    accuracies,
    compare,
    contestants,
    costs,
    headline,
    mean_interval,
    roughness,
    seed_lists,
    table,
    table_of_one_seed,
)
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.trainer import read_metrics
from llavolta.worlds import WORLDS

ONE = {"single-stage": [0], "mine": [0]}


def cost(scheme: Scheme) -> float:
    return sum(stage.share * sum(tokens_per_layer(stage.plan, 32, 576)) for stage in scheme.stages)


@pytest.mark.parametrize("name", ["three-stage-reversed", "three-stage-shuffled"])
def test_order_controls_cost_what_the_scheme_costs(name):
    assert cost(CONTROLS[name]) == pytest.approx(cost(SCHEMES["three-stage"]))
    plans = [stage.plan for stage in CONTROLS[name].stages]
    assert plans != [stage.plan for stage in SCHEMES["three-stage"].stages]
    assert set(plans) == {"2:avgpool:8", "16:avgpool:8", "none"}


def test_a_shuffled_scheme_gives_each_plan_its_steps_in_blocks():
    scheme = SCHEMES["heavy"].shuffled("mixed", blocks=3, seed=1)
    plans = [scheme.stages[scheme.stage_at(step, 60)].plan for step in range(60)]
    assert plans.count("none") == 30 and len(scheme.stages) == 6
    assert scheme == SCHEMES["heavy"].shuffled("mixed", blocks=3, seed=1)
    assert scheme != SCHEMES["heavy"].shuffled("mixed", blocks=3, seed=2)


def test_the_pruned_control_keeps_as_many_tokens_as_pooling():
    for pruned, pooled in zip(CONTROLS["three-stage-pruned"].stages, SCHEMES["three-stage"].stages, strict=True):
        assert tokens_per_layer(pruned.plan, 32, 576) == tokens_per_layer(pooled.plan, 32, 576)


def test_contestants_are_scaled_and_the_baseline_is_always_there():
    chosen = contestants(["heavy"], {"mine": [{"plan": "3:avgpool:2", "share": 1}]}, 8)
    assert list(chosen) == ["single-stage", "heavy", "mine"]
    assert chosen["heavy"].stages[0].plan == "1:avgpool:8" and chosen["mine"].stages[0].plan == "3:avgpool:2"
    with pytest.raises(PlanError, match="names layer 9"):
        contestants(["heavy"], {"mine": ["9:avgpool:2"]}, 8)
    with pytest.raises(ConfigError, match="unknown scheme 'x'"):
        contestants(["x"], {}, 8)


def test_mean_interval_is_students():
    # mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom at 97.5% is 2.776445
    low, high = mean_interval([1, 2, 3, 4, 5])
    assert (low, high) == pytest.approx((3 - 2.776445 * np.sqrt(2.5 / 5), 3 + 2.776445 * np.sqrt(2.5 / 5)))
    with pytest.raises(ConfigError, match="two seeds"):
        mean_interval([1.0])


@pytest.fixture
def answers() -> pd.DataFrame:
    """Two schemes, three seeds, four questions: the second scheme loses one question of seed 2."""
    rows = [
        dict(
            scheme=scheme, seed=seed, type="ab"[q % 2], correct=q <= seed and not (scheme == "heavy" and q + seed == 4)
        )
        for seed in range(3)
        for scheme in ("single-stage", "heavy")
        for q in range(4)
    ]
    return pd.DataFrame(rows)


def test_table_pairs_the_seeds(answers):
    runs = accuracies(answers)
    overall = runs.query("type == 'overall'").pivot(index="seed", columns="scheme", values="accuracy")
    assert overall["single-stage"].tolist() == [0.25, 0.5, 0.75] and overall["heavy"].tolist() == [0.25, 0.5, 0.5]
    row = table(runs).loc["heavy"]
    assert row.difference == pytest.approx(-0.25 / 3)
    half = 4.302653 * np.std([0, 0, -0.25], ddof=1) / np.sqrt(3)
    assert (row.difference_low, row.difference_high) == pytest.approx((-0.25 / 3 - half, -0.25 / 3 + half))
    assert table(runs).loc["single-stage"].difference == 0
    assert table(runs, kind="a").loc["heavy"].accuracy == pytest.approx(np.mean([0.5, 0.5, 0.5]))


def test_schemes_may_have_fewer_seeds(answers):
    fewer = accuracies(answers).query("scheme != 'heavy' or seed != 2")
    row = table(fewer).loc["heavy"]  # paired on the two seeds that both have, where nothing was lost
    assert (row.accuracy, row.difference, row.difference_low, row.difference_high) == (0.375, 0, 0, 0)
    assert table(fewer).loc["single-stage"].accuracy == 0.5


def test_seed_lists():
    names = ["single-stage", "heavy", "light"]
    assert seed_lists(2, names) == dict.fromkeys(names, [0, 1])
    assert seed_lists({"heavy": 3}, names) == {"single-stage": [0, 1, 2], "heavy": [0, 1, 2], "light": [0]}
    for wrong in (0, True, "2", {"heaviest": 2}, {"heavy": 0}):
        with pytest.raises(ConfigError, match="seeds must be a whole number"):
            seed_lists(wrong, names)


def test_one_seed_pairs_the_questions(answers):
    row = table_of_one_seed(answers[answers.seed == 2]).loc["heavy"]
    assert row.difference == -0.25 and row.difference_low >= -1 and row.difference_high == 0
    one = table_of_one_seed(answers[answers.seed == 2]).assign(time=0.5)
    assert "not settled by one seed (not settled, at most" in headline(one, {"heavy": [2]})
    row = dict(time=0.5, difference=-0.02, difference_low=-0.05, difference_high=0.01)
    for low, high, word in (
        (-0.142, 0.025, "at most 14.2 points lost"),
        (-0.05, -0.01, "a loss"),
        (0.01, 0.05, "a gain"),
    ):
        bounds = dict(difference_low=low, difference_high=high)
        made = pd.DataFrame([row, row | bounds], index=["single-stage", "heavy"])
        assert headline(made, {"heavy": [0, 1]}).endswith(word)


def test_roughness_leaves_the_jump_between_stages_out():
    rows = [
        dict(scheme="s", seed=0, step=k, stage=1 + (k > 2), loss=loss, grad_norm=1.0)
        for k, loss in enumerate([1.0, 0.9, 0.7, 5.0, 4.8])
    ]
    row = roughness(pd.DataFrame(rows)).iloc[0]
    assert row.loss == pytest.approx(np.std([-0.1, -0.2, -0.2], ddof=1)) and row.grad_norm == 1


def test_a_failing_run_stops_the_comparison_with_its_error(scenes, small_model, tmp_path):
    options = dict(model=str(small_model), data=str(scenes / "train.json"), align_steps=0, max_steps=2, batch_size=4)
    config = TrainConfig(output=str(tmp_path), **options)
    with pytest.raises(DataError, match="no data file .*nowhere.json"):
        compare(contestants([], {"mine": ["none"]}, 4), ONE, config, "nowhere.json", workers=2, progress=False)


@pytest.mark.slow
def test_workers_end_with_a_comparison_that_is_killed(tmp_path):
    """Also in the middle of a run, which they would otherwise go on writing.

    A worker left over would hold the pipe open, and ``subprocess.run`` would wait for it.
    """
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from llavolta.studies.compare import _begin_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=_begin_worker, initargs=(1,))\n"
        "    pool.submit(os.getpid).result()\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=180)
    assert killed.returncode == -signal.SIGKILL


def test_answers_are_kept_for_their_questions_pictures_and_plan_only(scenes, small_model, tmp_path, monkeypatch):
    options = dict(model=str(small_model), data=str(scenes / "train.json"), align_steps=0, max_steps=2, batch_size=4)
    config, schemes = TrainConfig(output=str(tmp_path / "runs"), **options), contestants([], {}, 4)
    heldout = scenes / "heldout.json"

    def ask(questions: int, file=heldout, plan="none"):
        plans = {"single-stage": plan}
        return compare(schemes, ONE, config, file, questions, progress=False, plans=plans)

    first = ask(8)
    model = tmp_path / "runs" / "0" / "single-stage" / "model.safetensors"
    trained = model.stat().st_mtime_ns
    pd.testing.assert_frame_equal(ask(4), first[:4])
    assert len(ask(12)) == 12 and len(ask(4, plan="0:avgpool:144")) == 4
    other = tmp_path / "other.json"
    entries = json.loads(heldout.read_text())[::-1]
    other.write_text(json.dumps(entries))
    shutil.copytree(scenes / "images", tmp_path / "images")
    assert ask(4, other).answer.tolist() == [turn["value"] for turn in entries[0]["conversations"][1::2]]
    asked, real = [], compare_module.evaluate
    monkeypatch.setattr(compare_module, "evaluate", lambda *a, **k: asked.append(1) or real(*a, **k))
    ask(4, other)
    assert not asked
    picture = tmp_path / entries[0]["image"]
    picture.write_bytes((tmp_path / entries[1]["image"]).read_bytes())  # the same question of another picture
    ask(4, other)
    assert len(asked) == 1
    assert model.stat().st_mtime_ns == trained and not list(model.parent.glob("checkpoint-*"))
    changed = TrainConfig(output=str(tmp_path / "runs"), learning_rate=1e-5, **options)
    for again in (dict(), dict(questions=13), dict(plans={"single-stage": "1:avgpool:2"})):  # answered before or not
        with pytest.raises(ConfigError, match="another run"):
            compare(schemes, ONE, changed, heldout, **{"questions": 4, "progress": False, **again})


def test_pictures_are_padded_as_in_training_and_questions_are_of_its_data(scenes, small_model, tmp_path, monkeypatch):
    seen = {}

    def look(model, processor, data, *args, **options):
        seen.update(pad=data.pad, file=data.file)
        return pd.DataFrame([dict(question="q", answer="a", prediction="a", correct=True)])

    monkeypatch.setattr("llavolta.studies.compare.evaluate", look)
    monkeypatch.setitem(WORLDS, "digits", replace(WORLDS["digits"], build=lambda *_: scenes))
    options = dict(model=str(small_model), align_steps=0, max_steps=1, batch_size=4)
    config = TrainConfig(output=str(tmp_path), pad_to_square=True, **options)
    compare(contestants([], {}, 4), {"single-stage": [0]}, config, progress=False, questions=1)
    assert seen["file"] == scenes / "heldout.json"
    assert seen["pad"] == padding_colour(load_model(str(small_model))[1])


def test_a_model_of_clips_is_asked_about_clips(clip_data, video_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "llavolta.studies.compare._run", lambda run, heldout, *rest: seen.append(heldout) or pd.DataFrame([{}])
    )
    monkeypatch.setitem(WORLDS, "clips", replace(WORLDS["clips"], build=lambda *_: clip_data))
    config = TrainConfig(output=str(tmp_path), model=str(video_model), data="clips", align_steps=0, max_steps=1)
    compare(contestants([], {}, 8), {"single-stage": [0]}, config, progress=False)
    assert seen == [clip_data / "heldout.json"]


def test_models_answer_and_are_timed_on_the_accelerator(scenes, small_model, tmp_path, monkeypatch):
    """Where there is one: "meta" stands for it, and what works on it says so."""
    where = []

    def look(model, *args, **options):
        where.append(model.device.type)
        return pd.DataFrame([dict(question="q", answer="a", prediction="a", correct=True)])

    monkeypatch.setattr("llavolta.studies.opening.device", lambda: torch.device("meta"))
    monkeypatch.setattr("llavolta.studies.compare.evaluate", look)
    monkeypatch.setattr("llavolta.cost.bench.step_times", look)
    options = dict(model=str(small_model), data=str(scenes / "train.json"), align_steps=0, max_steps=1, batch_size=4)
    config, schemes = TrainConfig(output=str(tmp_path), **options), contestants([], {}, 4)
    compare(schemes, ONE, config, scenes / "heldout.json", 1, progress=False)
    with pytest.raises(KeyError):  # there are no times to sum
        costs(schemes, config, tmp_path / "0" / "single-stage", progress=False)
    assert where == ["meta", "meta"]


@pytest.mark.slow
def test_schemes_with_an_alignment_of_their_own_share_it_and_are_timed_as_a_whole(scenes, small_model, tmp_path):
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    config = TrainConfig(
        output=str(tmp_path), model=str(small_model), align_steps=2, max_steps=4, batch_size=8, log_steps=1, **data
    )
    align = {"align": {"plan": "0:avgpool:16"}}
    short = {"align": {"plan": "0:avgpool:16", "share": 0.5}}
    own = {"early": [align, "0:avgpool:16", "none"], "late": [align, "none", "0:avgpool:16"], "short": [short, "none"]}
    schemes = contestants(["heavy"], own, 4)
    compare(schemes, seed_lists(1, schemes), config, scenes / "heldout.json", 8, progress=False)
    folders = ["align", "align-0-avgpool-16", "align-0-avgpool-16-0.5-of-the-steps"]
    assert sorted(path.name for path in (tmp_path / "0").glob("align*")) == folders
    assert [read_metrics(tmp_path / "0" / name / "align" / "metrics.jsonl")[-1]["step"] for name in folders] == [
        2,
        2,
        1,
    ]
    starts = {name: yaml.safe_load((tmp_path / "0" / name / "config.yaml").read_text())["model"] for name in schemes}
    assert {name for name, start in starts.items() if start.endswith("avgpool-16")} == {"early", "late"}
    table, _ = costs(schemes, config, tmp_path / "0" / "single-stage", rounds=1, progress=False)
    assert table.loc["single-stage", ["time", "flops", "align", "recipe"]].tolist() == [1, 1, 1, 1]
    assert table["align"]["heavy"] == 1 and 0 < table.align_share["heavy"] < 1
    assert table["align"]["early"] == table["align"]["late"] < 1
    assert table["align"]["short"] == table["align"]["early"] / 2
    for row in table.itertuples():  # between what its two parts are
        assert min(row.align, row.time) - 1e-9 <= row.recipe <= max(row.align, row.time) + 1e-9
    alone, _ = costs(schemes, config.changed(align_steps=0), tmp_path / "0" / "single-stage", 1, progress=False)
    assert list(alone) == ["time", "flops"]
