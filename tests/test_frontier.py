"""papers/frontier.py: every recorded scheme once, and what is committed is what the records say."""

from __future__ import annotations

from types import SimpleNamespace

import frontier
import pandas as pd
import pytest

from llavolta.show import plots
from llavolta.studies import compare
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import NAMED


def test_what_is_committed_is_what_the_records_say():
    table = frontier.recorded()
    held = pd.read_csv(frontier.FOLDER / "frontier.csv", index_col="scheme")
    assert table.index.is_unique and compare.BASELINE not in table.index
    pd.testing.assert_frame_equal(held, table.rename_axis("scheme"), atol=6e-5, rtol=0, check_dtype=False)
    share = pd.read_csv(frontier.FOLDER / "speedups.csv", index_col="scheme").loc["three-stage"]
    assert table.speedup["three-stage"] == pytest.approx(1 / share.recipe)
    assert share.tuning < share.recipe < share["align"] == 1  # its projector is aligned on all tokens
    assert table.group["three-stage"] == "LLaVolta" and table.group["fast"] == "ours, fresh seeds"


def test_the_verdict_joins_them(tmp_path, monkeypatch):
    for name in ("compare-runs.csv", "speedups.csv"):
        (tmp_path / name).write_text((frontier.FOLDER / name).read_text())
    with (tmp_path / "speedups.csv").open("a") as file:
        file.write("swift,0.4,0.4,0.4\n")
    rows = [
        dict(scheme=name, type=kind, speedup=9.9, difference=-0.01, low=-0.02, high=0.0, seeds=10)
        for name in ("swift", "two-stage")
        for kind in ("read", "overall")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "verdict.csv", index=False)
    monkeypatch.setattr(frontier, "FOLDER", tmp_path)
    row = frontier.recorded().loc["swift"]
    assert (row.group, row.speedup, row.difference_high, row.seeds) == ("ours, fresh seeds", 2.5, 0.0, 10)
    assert frontier.recorded().loc["two-stage"].seeds == 10  # in place of the figure that is already recorded
    ax = plots.frontier(frontier.recorded()).axes[0]
    assert "ours, fresh seeds: swift" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_all_that_is_recorded_is_measured_in_one_run(tmp_path, monkeypatch):
    timed = []

    def costs(schemes, config, model, rounds):
        timed.extend(schemes)
        return pd.DataFrame(dict(time=0.5, flops=0.5, align=1.0, recipe=0.75), index=list(schemes)), None

    monkeypatch.setattr(compare, "costs", costs)
    monkeypatch.setattr(frontier.build, "prepare", lambda config: SimpleNamespace(num_layers=8))
    table = frontier.measure(TrainConfig(output="-"), tmp_path)
    assert list(table) == ["tuning", "align", "recipe"] and table.index.is_unique
    assert {*NAMED, *compare.CONTROLS, *frontier.recorded().index} <= {*timed}
    for name, scheme in frontier.schemes(30).items():  # in the other world, too
        assert scheme.boundaries(200)[-1] == 200, name
