"""The papers' tables hold what lmms-eval wrote, in percent, mark what was not run, and invent nothing."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from tiny import write_results

from llavolta.errors import DataError
from llavolta.harness.table import AVERAGE, HOURS, RATIO, paper_table, published, runs_in, training
from llavolta.train.schemes import Scheme
from llavolta.train.trainer import MetricsCallback


@pytest.fixture
def runs(tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    stages = [{"plan": "1:avgpool:8", "share": 0.5}, {"plan": "none", "share": 0.5}]
    (trained / "config.yaml").write_text(yaml.safe_dump({"resolved_stages": stages}))
    rows = [
        {"step": 10, "seconds": 18.0, "plan": "1:avgpool:8", "tokens_per_layer": [144, 18, 18, 18]},
        {"step": 20, "seconds": 36.0, "plan": "none", "tokens_per_layer": [144] * 4},
    ]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gqa = {"gqa": {"exact_match": 0.62}, "mme": {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}}
    more = {"pope": {"pope_f1_score": 0.86, "pope_accuracy": 0.87}}
    return {
        "ours": [
            write_results(tmp_path / "a", str(trained), "none", gqa),
            write_results(tmp_path / "b", str(trained), "none", more),
        ],
        "theirs": [write_results(tmp_path / "c", "hub/model", "2:avgpool:8", {"gqa": {"exact_match": 0.5}} | more)],
    }


def test_rows_in_percent_with_averages_over_what_all_have(runs):
    table = paper_table(runs)
    assert table.loc["ours", ["GQA", "MME", "POPE"]].tolist() == pytest.approx([62, 75, 86])
    assert table.loc["theirs", ["GQA", "POPE"]].tolist() == pytest.approx([50, 86])
    assert math.isnan(table.MME["theirs"]) and table["MM-Vet"].isna().all() and table["MSVD-QA"].isna().all()
    assert table[AVERAGE].tolist() == pytest.approx([(62 + 86) / 2, (50 + 86) / 2])  # MME is not in both
    assert table[HOURS]["ours"] == pytest.approx((10 * 18 + 10 * 36) / 3600) and math.isnan(table[HOURS]["theirs"])
    assert table[RATIO]["ours"] == pytest.approx(4 * 144 / (0.5 * (144 + 3 * 18) + 0.5 * 4 * 144))


def test_what_makes_no_row_is_refused(runs, tmp_path):
    with pytest.raises(DataError, match="both has GQA 2 times|both mixes"):
        paper_table({"both": [runs["ours"][0], runs["theirs"][0]]})
    again = write_results(tmp_path / "d", str(tmp_path / "trained"), "none", {"gqa": {"exact_match": 0.1}})
    with pytest.raises(DataError, match="twice has GQA 2 times"):
        paper_table({"twice": [runs["ours"][0], again]})
    with pytest.raises(DataError, match="no folder .*nowhere; run"):
        paper_table({"x": [tmp_path / "nowhere"]})


def test_runs_are_found_by_model_and_plan(runs, tmp_path):
    found = runs_in(tmp_path)
    assert {name: [folder.name for folder in folders] for name, folders in found.items()} == {
        "trained, none": ["a", "b"],
        "model, 2:avgpool:8": ["c"],
    }
    assert runs_in(tmp_path / "nowhere") == {}


def test_published_rows_are_those_of_the_papers_csv():
    held = published()
    assert held[AVERAGE]["published: four stages"] == 61.9
    assert held[HOURS].tolist() == [15.3, 12.8]
    assert math.isnan(held[AVERAGE]["published: no compression"])


@pytest.mark.parametrize(
    "plan, tokens, wanted",
    [
        ("0:avgpool:8", [18.0] * 4, 8.0),
        ("vision:avgpool:4", [36.0] * 4, 4.0),
        ("0:random:0.1", [2 / 3 * 18 + 1 / 3 * 144] * 4, 2.4),  # DualSpeed: every third step is whole
        ("1:avgpool:8", [144, 18, 18, 18], 4 * 144 / 198),
    ],
)
def test_ratio_of_a_model_that_is_compressed_everywhere(plan, tokens, wanted, tmp_path):
    def ratio(**logged):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"resolved_stages": [{"plan": plan, "share": 1}]}))
        row = {"step": 10, "seconds": 1.0, "plan": plan, "tokens_per_layer": tokens} | logged
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return training(tmp_path)[RATIO]

    assert math.isnan(ratio(visual_tokens=0, tokens_per_layer=[0] * 4))  # their number varies
    assert ratio(visual_tokens=144) == pytest.approx(wanted)
    old = ratio()  # logs of before: where no layer saw all tokens, their number is not known
    assert old == pytest.approx(wanted) if plan[0] == "1" else math.isnan(old)


def test_training_logs_the_visual_tokens_that_the_ratio_is_of(tmp_path):
    log = MetricsCallback(tmp_path / "metrics.jsonl", Scheme.equal("everywhere", "0:avgpool:8"), 4, 144)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=2)
    log.on_log(None, state, None, logs={"loss": 1.0})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"resolved_stages": [{"plan": "0:avgpool:8", "share": 1}]}))
    assert training(tmp_path)[RATIO] == pytest.approx(8)
