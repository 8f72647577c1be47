"""papers/frontier.py: every recorded scheme once, and what is committed is what the records say."""

from __future__ import annotations

import frontier
import pandas as pd
import pytest
import times

from llavolta.show import plots
from llavolta.studies import compare
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import SCHEMES


def test_what_is_committed_is_what_the_records_say():
    table = frontier.recorded()
    held = pd.read_csv(frontier.FOLDER / "frontier.csv", index_col="scheme")
    assert table.index.is_unique and compare.BASELINE not in table.index
    pd.testing.assert_frame_equal(held, table.rename_axis("scheme"), atol=6e-5, rtol=0, check_dtype=False)
    measured = times.recorded()
    share = measured[measured.scheme == "three-stage"].median(numeric_only=True)
    assert table.speedup["three-stage"] == pytest.approx(1 / share.recipe)
    assert share.tuning < share.recipe < share["align"] == 1  # its projector is aligned on all tokens
    assert table.group["three-stage"] == "LLaVolta" and table.group["fast"] == "ours, fresh seeds"


def test_the_verdict_joins_them(tmp_path, monkeypatch):
    (tmp_path / "compare-runs.csv").write_text((frontier.FOLDER / "compare-runs.csv").read_text())
    swift = pd.DataFrame([dict(scheme="swift", recipe=share) for share in (0.3, 0.4, 0.45)])
    measured = pd.concat([times.recorded(), swift])
    monkeypatch.setattr(times, "recorded", lambda: measured)
    rows = [
        dict(scheme=name, type=kind, speedup=9.9, difference=-0.01, low=-0.02, high=0.0, seeds=10)
        for name in ("swift", "two-stage", "all-tokens-83-99")
        for kind in ("read", "overall")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "verdict.csv", index=False)
    monkeypatch.setattr(frontier, "FOLDER", tmp_path)
    row = frontier.recorded().loc["swift"]
    assert (row.group, row.speedup, row.difference_high, row.seeds) == ("ours, fresh seeds", 2.5, 0.0, 10)
    assert frontier.recorded().loc["two-stage"].seeds == 10  # in place of the figure that is already recorded
    fewer = frontier.recorded().loc["all-tokens-83-99"]  # is counted in steps, not timed
    assert (fewer.group, fewer.speedup) == ("control, fresh seeds", 9.9)
    ax = plots.frontier(frontier.recorded()).axes[0]
    assert "ours, fresh seeds: swift" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_all_that_is_recorded_is_measured_in_one_run(monkeypatch):
    timed = []

    def costs(schemes, config, model, rounds):
        timed.extend(schemes)
        table = pd.DataFrame(dict(time=0.5, flops=0.5, align=1.0, recipe=0.75), index=list(schemes))
        return table.rename_axis("scheme"), None

    monkeypatch.setattr(compare, "costs", costs)
    table = times.measure(frontier.schemes(8), TrainConfig(output="-"), 5)
    assert {*times.COLUMNS} - {"measurement"} <= {*table} and table.scheme.is_unique
    assert {*SCHEMES, *frontier.recorded().index} <= {*timed}
    for name, scheme in frontier.schemes(30).items():  # in the other world, too
        assert scheme.boundaries(200)[-1] == 200, name
