"""Evaluation: exact match, constant answers, intervals, and agreement with the model's own greedy answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llavolta import bench, evaluate
from llavolta.data import Collator, LlavaData
from llavolta.train import load_model


def test_the_table_shows_the_best_constant_answer_per_type():
    frame = pd.DataFrame(
        {
            "type": ["count"] * 4 + ["read"] * 2,
            "answer": ["2", "2", "2", "1", "7", "8"],
            "correct": [True, False, True, True, True, False],
        }
    )
    table = evaluate.accuracy_table(frame)
    assert table.accuracy.to_dict() == pytest.approx({"count": 0.75, "read": 0.5, "overall": 4 / 6})
    assert table.constant.to_dict() == pytest.approx({"count": 0.75, "read": 0.5, "overall": 4 / 6})
    assert table.questions.to_dict() == {"count": 4, "read": 2, "overall": 6}
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


def test_the_interval_narrows_with_more_answers():
    rng = np.random.default_rng(0)
    few, many = rng.random(50) < 0.8, rng.random(5000) < 0.8
    low, high = evaluate.interval(many)
    assert high - low < 0.03 < np.subtract(*evaluate.interval(few)[::-1]) and low < 0.8 < high


def test_answers_do_not_depend_on_the_batch_and_follow_the_plan(scenes, small_model):
    model, processor = load_model(str(small_model))
    data = LlavaData(scenes / "heldout.json")
    one = evaluate.evaluate(model, processor, data, limit=12, batch_size=1, progress=False)
    many = evaluate.evaluate(model, processor, data, limit=12, batch_size=12, progress=False)
    assert one.prediction.tolist() == many.prediction.tolist() and len(one) == 12
    assert one.columns.tolist() == ["index", "type", "question", "answer", "prediction", "correct"]
    pooled = evaluate.evaluate(model, processor, data, plan="0:avgpool:72", limit=12, progress=False)
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
