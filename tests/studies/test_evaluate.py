"""Evaluation: exact match, constant answers, intervals, and agreement with the model's own greedy answers."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import llavolta
from llavolta.compression.families import find_parts
from llavolta.compression.plan import parse_plan
from llavolta.cost import bench
from llavolta.data import Collator, LlavaData, padding_colour
from llavolta.errors import ConfigError, DataError
from llavolta.studies import evaluation, inspect, opening, redundancy, statistics
from llavolta.studies.opening import open_study
from llavolta.train.models import load_model
from llavolta.worlds import WORLDS


def test_the_table_shows_the_best_constant_answer_per_type():
    frame = pd.DataFrame(
        {
            "type": ["count"] * 4 + ["read"] * 2,
            "answer": ["2", "2", "2", "1", "7", "8"],
            "correct": [True, False, True, True, True, False],
        }
    )
    table = statistics.accuracy_table(frame)
    assert table.accuracy.to_dict() == pytest.approx({"count": 0.75, "read": 0.5, "overall": 4 / 6})
    assert table.constant.to_dict() == pytest.approx({"count": 0.75, "read": 0.5, "overall": 4 / 6})
    assert table.questions.to_dict() == {"count": 4, "read": 2, "overall": 6}
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


def test_the_interval_narrows_with_more_answers():
    rng = np.random.default_rng(0)
    few, many = rng.random(50) < 0.8, rng.random(5000) < 0.8
    low, high = statistics.interval(many)
    assert high - low < 0.03 < np.subtract(*statistics.interval(few)[::-1]) and low < 0.8 < high


def test_answers_do_not_depend_on_the_batch_and_follow_the_plan(scenes, small_model):
    model, processor = load_model(str(small_model))
    data = LlavaData(scenes / "heldout.json")
    one = evaluation.evaluate(model, processor, data, limit=12, batch_size=1, progress=False)
    many = evaluation.evaluate(model, processor, data, limit=12, batch_size=12, progress=False)
    assert one.prediction.tolist() == many.prediction.tolist() and len(one) == 12
    assert one.columns.tolist() == ["index", "type", "question", "answer", "prediction", "truncated", "correct"]
    pooled = evaluation.evaluate(model, processor, data, plan="0:avgpool:72", limit=12, progress=False)
    assert len(pooled) == 12 and model.training is False


def test_step_times_are_ratios_to_the_uncompressed_step(scenes, small_model):
    model, processor = load_model(str(small_model))
    data = LlavaData(scenes / "train.json")
    batch = Collator(processor)([data[i] for i in range(8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    times = bench.step_times(model, [batch], ["1:avgpool:8", "none"], rounds=3, progress=False)
    assert times.plan.tolist() == ["none", "1:avgpool:8"]
    assert times.ratio[0] == times.flops_ratio[0] == 1 and times.flops_ratio[1] < 0.6
    assert (times.seconds > 0).all()
    assert all((before[name] == value).all() for name, value in model.state_dict().items())


def test_an_answer_may_be_as_long_as_the_longest_true_one(scenes, small_model, tmp_path, monkeypatch, capsys):
    """A model that says the right thing is right, however long that is; a limit of one's own is counted and said."""
    model, processor = load_model(str(small_model))
    truth = "1 2 3 4 5 6 7 8 9"
    entry = json.loads((scenes / "heldout.json").read_text())[0]
    picture = {"image": str((scenes / entry["image"]).resolve().relative_to(scenes.resolve()))}
    turns = [{"from": "human", "value": "<image>\nRead all digits."}, {"from": "gpt", "value": truth}]
    (tmp_path / "long.json").write_text(json.dumps([{"id": "0", **picture, "conversations": turns}]))
    data = LlavaData(tmp_path / "long.json", scenes)
    ids = processor.tokenizer(f" {truth}", add_special_tokens=False)["input_ids"]

    def oracle(**options):
        said = [*ids, processor.tokenizer.eos_token_id][: options["max_new_tokens"]]
        prompt = options["input_ids"]
        return torch.cat([prompt, prompt.new_tensor([said] * len(prompt))], dim=1)

    monkeypatch.setattr(model, "generate", oracle)
    capsys.readouterr()  # what loading printed
    whole = evaluation.evaluate(model, processor, data, progress=False)
    assert whole.correct.all() and not whole.truncated.any() and not capsys.readouterr().err
    swept = redundancy.redundancy_sweep(model, processor, data, [1], [1, 4], progress=False)
    assert swept.correct.all()
    cut = evaluation.evaluate(model, processor, data, max_new_tokens=4, progress=False)
    said = capsys.readouterr().err
    assert not cut.correct.any() and cut.truncated.all()
    assert "cuts off 1 of 1 true answers" in said and "1 of 1 answers did not end" in said
    assert not redundancy.redundancy_sweep(
        model, processor, data, [1], [4], max_new_tokens=4, progress=False
    ).correct.any()
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.evaluate(model, processor, data, max_new_tokens=0, progress=False)


def test_the_mode_of_every_module_is_back_after_an_error(scenes, small_model, monkeypatch):
    model, processor = load_model(str(small_model))
    data = LlavaData(scenes / "heldout.json")
    model.train()
    model.model.vision_tower.eval()  # a frozen part may stay in evaluation mode while the rest trains
    before = [module.training for module in model.modules()]

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(evaluation, "prompts", fail)
    for ask in (
        lambda: evaluation.evaluate(model, processor, data, limit=2, progress=False),
        lambda: redundancy.redundancy_sweep(model, processor, data, [1], [2], limit=2, progress=False),
        lambda: redundancy.answer_attention(model, processor, data, limit=2, progress=False),
    ):
        with pytest.raises(RuntimeError, match="on purpose"):
            ask()
        assert [module.training for module in model.modules()] == before
    monkeypatch.undo()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        inspect.view(model, processor, "what ?", data[0].images, "1:avgpool:2")
    assert [module.training for module in model.modules()] == before


def test_intervals_in_parts_are_those_of_all_draws_at_once(monkeypatch):
    correct = np.random.default_rng(3).random(777) < 0.7
    sample = np.random.default_rng(0).integers(0, 777, (2000, 777))
    whole = tuple(np.quantile(correct.astype(float)[sample].mean(1), [0.025, 0.975]))
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 5000)
    assert statistics.interval(correct) == whole


def test_memory_of_an_interval_is_bounded():
    correct = np.random.default_rng(0).random(100_000) < 0.5
    tracemalloc.start()
    low, high = statistics.interval(correct, draws=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert low < 0.5 < high and peak < 40e6  # all at once took 80 MB for these draws, 3.2 GB for 2000


def test_layers_are_shared_beside_a_forward_of_the_models_own(small_model):
    """Such as accelerate's, which puts one on each module of a model on several devices."""
    model, _ = load_model(str(small_model))
    layers = find_parts(model).layers
    own = layers[0].forward = functools.partial(layers[0].forward)
    with redundancy.shared_layers(model):
        assert layers[0].forward is not own
    assert layers[0].forward is own and "forward" not in vars(layers[1])


def test_every_plan_in_a_docstring_can_be_parsed():
    package = Path(llavolta.__file__).parent
    plans = [
        plan
        for file in package.rglob("*.py")
        for plan in re.findall(r"\bplan=((?:\d+|vision):[\w:.=+;]+\w)", file.read_text(encoding="utf-8"))
    ]
    assert len(plans) >= 2
    for plan in plans:
        parse_plan(plan)


def test_a_study_opens_model_and_pictures_as_they_were_trained(scenes, small_model, tmp_path, monkeypatch):
    """On its device, padded as its run's own config.yaml says; questions are those held out of the world, or given."""
    run = tmp_path / "run"
    shutil.copytree(small_model, run)
    monkeypatch.setitem(WORLDS, "digits", replace(WORLDS["digits"], build=lambda *_: scenes))
    study = open_study(run)
    assert (study.data.file, study.data.pad) == (scenes / "heldout.json", None)
    assert study.depth == len(study.model.model.language_model.layers) and study.model.dtype == torch.float32
    (run / "config.yaml").write_text("pad_to_square: true")
    study = open_study(run, scenes / "train.json", dtype=torch.bfloat16)
    assert (study.data.file, study.model.dtype) == (scenes / "train.json", torch.bfloat16)
    assert study.data.pad == padding_colour(study.processor) and open_study(run, pad_to_square=False).data.pad is None
    with pytest.raises(DataError, match="unknown data 'digit'; choose from digits, clips"):
        open_study(run, world="digit")
    monkeypatch.setattr(opening, "load_model", lambda *_, **__: pytest.fail("loaded before the questions were"))
    with pytest.raises(DataError, match="no.json"):
        open_study(run, tmp_path / "no.json")


def test_accuracy_is_told_apart_by_further_columns_and_needs_an_answer():
    answers = pd.DataFrame(
        dict(type=["a", "b"] * 4, correct=[True, False] * 3 + [True, True], plan=["x"] * 4 + ["y"] * 4)
    )
    table = statistics.accuracy_table(answers, by=["plan"]).set_index(["plan", "type"])
    assert table.accuracy.to_dict() == {
        ("x", "overall"): 0.5,
        ("y", "overall"): 0.75,
        ("x", "a"): 1,
        ("x", "b"): 0,
        ("y", "a"): 1,
        ("y", "b"): 0.5,
    }
    assert statistics.accuracy_table(answers).index.tolist() == ["a", "b", "overall"]
    with pytest.raises(ConfigError, match="at least one question"):
        statistics.interval([])
