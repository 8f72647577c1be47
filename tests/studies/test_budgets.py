"""Equal budgets: what plans leave, worked out by hand; the difficult questions; the words."""

from __future__ import annotations

import pandas as pd
import pytest

from llavolta.data import LlavaData
from llavolta.errors import ConfigError
from llavolta.studies import budgets
from llavolta.studies.budgets import DOWNSAMPLE, FULL, METHODS, plan_at, plans_at
from llavolta.train.models import load_model


@pytest.mark.parametrize("budget", [0.05, 0.11, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(8, 144), (32, 576), (4, 64)])
def test_plans_leave_what_the_budget_says(budget, sizes):
    layers, tokens = sizes
    table = plans_at([budget], *sizes)
    before_decoder = [method for method, plan in METHODS.items() if plan.startswith(("0:", "vision:"))]
    unmet = {"VScan"} if budget == 1 else set()  # its second stage always drops two of three
    assert set(before_decoder) - unmet <= set(table.method)
    coarse = table.method.isin(["DART", "SparseVLM"])  # counts by pivots; recycles some of what it drops
    assert not ((table[coarse].share - budget).abs() > max(9 / tokens, 0.06)).any()
    exact = table[~table.method.isin([DOWNSAMPLE]) & ~table.method.str.contains("average pooling") & ~coarse]
    # Whole tokens: each entry may round by half a token.
    assert (exact.share - budget).abs().max() <= 1.5 / tokens + 1e-9


def test_plans_by_hand():
    assert plan_at("random drop", 0.25, 8, 144) == "vision:random:0.25"
    assert plan_at("average pooling", 0.11, 8, 144) == "0:avgpool:9"
    # 32 layers, 2 of them on all tokens: (0.25 * 32 - 2) / 30 = 0.2
    assert plan_at("FastV", 0.25, 32, 576) == "2:fastv:0.2"
    assert plan_at("FastV", 0.05, 32, 576) is None  # two layers on all tokens are 6.25% already
    # (8 + 8 k + 8 k^2 + 8 k^3) / 32 = 0.5 at k = 0.5437
    assert plan_at("PyramidDrop", 0.5, 32, 576).startswith("8:pyramiddrop:0.5437;16:pyramiddrop:0.5437")
    with pytest.raises(ConfigError, match="unknown method"):
        plan_at("lottery", 0.5, 8, 144)
    with pytest.raises(ConfigError, match="a share of the tokens"):
        plan_at("FastV", 0, 8, 144)


def test_training_free_marks_what_downsampling_gets_wrong(scenes, small_model):
    model, processor = load_model(str(small_model))
    plans = plans_at([0.25], 4, 144, ["random drop", DOWNSAMPLE, "FastV"])
    answers = budgets.training_free(model, processor, LlavaData(scenes / "heldout.json"), plans, 24, progress=False)
    assert answers.groupby("method").size().to_dict() == {"random drop": 24, DOWNSAMPLE: 24, FULL: 24}
    down = answers[answers.method == DOWNSAMPLE].set_index("number").correct
    for _, part in answers.groupby("method"):
        assert (part.set_index("number").difficult == ~down).all()
    table = budgets.accuracy(answers)
    assert table.query("method == @DOWNSAMPLE and type == 'difficult'").accuracy.tolist() == [0]
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


def test_methods_that_a_model_cannot_do_are_left_out_and_named(scenes, small_model, capsys):
    model, processor = load_model(str(small_model))
    plans = pd.DataFrame([dict(budget=0.5, method="FastV", plan="9:fastv:0.5")])
    answers = budgets.training_free(model, processor, LlavaData(scenes / "heldout.json"), plans, 4, progress=False)
    assert set(answers.method) == {FULL} and "left out: FastV: " in capsys.readouterr().out


def test_tokens_left_are_counted(scenes, small_model):
    data = LlavaData(scenes / "heldout.json")
    assert budgets.tokens_left(small_model, data, "none", 144) == 1
    assert budgets.tokens_left(small_model, data, "2:avgpool:4", 144) == pytest.approx((144 + 144 + 36 + 36) / 4 / 144)
    assert budgets.tokens_left(small_model, data, "vision:prumerge+:0.25", 144) == 0.25
    assert 1 / 144 <= budgets.tokens_left(small_model, data, "vision:prumerge", 144) < 0.2


def test_headline():
    rows = [
        dict(budget=0.25, method=m, type="overall", accuracy=a, low=a - 0.1, high=a + 0.1)
        for m, a in ((FULL, 0.9), ("random drop", 0.5), ("PruMerge", 0.7))
    ]
    text = budgets.headline(pd.DataFrame(rows))
    assert "Without compression: 90.0%" in text
    assert "25% of the tokens: best without training is PruMerge with 70.0%" in text and "random drop has 50.0%" in text
