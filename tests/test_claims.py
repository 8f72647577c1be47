"""The pages of claims say what their figures say, and are up to date."""

from __future__ import annotations

import re
import shutil

import claims
import pandas as pd
import pytest
from search import candidates

from llavolta.studies.compare import BASELINE, CONTROLS, contestants
from llavolta.train.schemes import SCHEMES


@pytest.mark.parametrize("paper", claims.PAGES)
def test_the_committed_page_is_what_its_figures_give(paper):
    assert (claims.PAPERS / paper / "claims.md").read_text() == claims.render(paper), "run python papers/claims.py"


def test_the_readme_shows_the_recorded_results():
    text = claims.README.read_text()
    assert text == claims.readme(text), "run python papers/claims.py"


@pytest.mark.parametrize("paper", claims.PAGES)
def test_commands_name_notebooks_and_parameters_that_exist(paper):
    for notebook, arguments in re.findall(r"`(\w+\.ipynb) OUT\.ipynb([^`]*)`", claims.render(paper)):
        source = (claims.PAPERS.parent / "notebooks" / notebook).read_text()
        for name in re.findall(r"-p (\w+)", arguments):
            assert f'"{name} = ' in source, name


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """Made-up figures: every scheme 90% but for what a test changes, seeds alike."""
    shutil.copytree(claims.PAPERS, tmp_path / "papers")
    shutil.copy(claims.README, tmp_path)
    names = [*SCHEMES, *CONTROLS]
    rows = [dict(scheme=n, seed=s, type="overall", accuracy=0.9 + 0.001 * s) for n in names for s in range(5)]
    pd.DataFrame(rows).to_csv(tmp_path / "papers" / "llavolta" / "compare-runs.csv", index=False)
    costs = [dict(scheme=n, time=1.0 if n == BASELINE else 0.7, flops=0.7) for n in names]
    pd.DataFrame(costs).to_csv(tmp_path / "papers" / "llavolta" / "compare-costs.csv", index=False)
    monkeypatch.setattr(claims, "PAPERS", tmp_path / "papers")
    monkeypatch.setattr(claims, "README", tmp_path / "README.md")
    return tmp_path / "papers" / "llavolta"


def verdicts(folder) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in claims.llavolta(folder)}


def change(folder, scheme: str, by: list[float]) -> None:
    runs = pd.read_csv(folder / "compare-runs.csv")
    runs.loc[runs.scheme == scheme, "accuracy"] += by
    runs.to_csv(folder / "compare-runs.csv", index=False)


LOST, FOUR, TIME = "Nothing is lost at", "Four stages are", "Staged compression"


def verdict(folder, start: str) -> str:
    return next(value for text, value in verdicts(folder).items() if text.startswith(start))


def test_equal_accuracies_lose_nothing_and_favour_nothing(papers):
    assert verdict(papers, LOST) == "reproduced"
    assert verdict(papers, FOUR) == "not reproduced: within the noise"
    assert verdict(papers, TIME) == "reproduced"
    order = [value for text, value in verdicts(papers).items() if text.startswith("Heavy first")]
    assert order == ["not reproduced: within the noise"] * 3


def test_a_clear_loss_and_a_clear_gain(papers):
    change(papers, "three-stage", [-0.03, -0.031, -0.029, -0.03, -0.03])
    assert verdict(papers, LOST) == "in part"
    assert verdict(papers, "Heavy first and light later is better than the same stages in reverse") == (
        "not reproduced: the opposite holds"
    )
    change(papers, "four-stage-wider", [0.05, 0.051, 0.049, 0.05, 0.05])
    assert verdict(papers, FOUR) == "reproduced"


def test_wide_intervals_settle_nothing(papers):
    change(papers, "three-stage", [0.1, -0.1, 0.05, -0.05, 0.0])
    assert verdict(papers, LOST) == "not settled: no loss shown, but the intervals are wide"
    change(papers, "four-stage-wider", [0.05, 0.051, 0.049, 0.05, 0.05])
    assert verdict(papers, FOUR) == "not reproduced: within the noise"  # three-stage may be as good


def test_too_little_time_saved(papers):
    costs = pd.read_csv(papers / "compare-costs.csv")
    costs.loc[costs.scheme == "four-stage-wider", "time"] = 0.9
    costs.to_csv(papers / "compare-costs.csv", index=False)
    assert verdict(papers, TIME) == "in part"


def test_the_readme_follows_its_figures(papers):
    change(papers, "heavy", [0.01] * 5)
    assert claims.main([]) == 0
    row = next(line for line in claims.README.read_text().splitlines() if line.startswith("| `heavy` |"))
    # 90.2% and 91.2% are the means; all seeds differ by one point, so the interval of the difference is a point
    assert "| 91.2% (91.0% to 91.4%) | +1.0 (+1.0 to +1.0) | 0.70 | 0.70 | 5 |" in row
    claims.README.write_text("no marks")
    assert claims.main([]) == 1


def test_a_stale_page_and_missing_figures_are_errors(papers, capsys):
    change(papers, "heavy", [0.01] * 5)
    (papers / "claims.md").write_text("old")
    assert claims.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert claims.main([]) == 0 and claims.main(["--check"]) == 0
    (papers / "attention.csv").unlink()
    assert claims.main([]) == 1 and "papers/llavolta lacks figures" in capsys.readouterr().err


def test_faster_needs_the_speed_and_the_accuracy(papers):
    folder = papers.parent / "faster"
    for file in papers.parent.glob("*/**/verdict.csv"):
        file.unlink()

    def verdicts(speedup: float, difference: float, low: float, high: float, worst: float = 0.0) -> list[str]:
        rows = [
            dict(scheme=name, type=kind, speedup=speedup, baseline=0.9, accuracy=0.9 + mean, difference=mean, low=low)
            | dict(high=high, seeds=10)
            for name in ("fast", "four-times", "dualspeed")
            for kind, mean in (("overall", difference), ("count", worst))
        ]
        pd.DataFrame(rows).to_csv(folder / "verdict.csv", index=False)
        return [claim.verdict for claim in claims.faster(folder)]

    assert claims.faster(folder) == []
    assert verdicts(2.6, 0.0, -0.004, 0.004) == [claims.YES] * 2
    assert verdicts(2.2, 0.0, -0.004, 0.004) == [claims.NO, claims.YES]  # 2.5 times are claimed, and 2.1
    assert verdicts(2.6, -0.1, -0.12, -0.08) == [claims.NO] * 2
    assert verdicts(2.6, 0.0, -0.04, 0.04) == [claims.UNSETTLED] * 2
    assert verdicts(2.6, 0.0, -0.004, 0.004, worst=-0.02)[0] == claims.UNSETTLED  # one type pays


@pytest.mark.parametrize("folder", ["llavolta", "faster"])
def test_recorded_costs_are_those_of_the_schemes_as_they_are_now(folder):
    costs = pd.read_csv(claims.PAPERS / folder / "compare-costs.csv").set_index("scheme")
    steps = pd.read_csv(claims.PAPERS / folder / "compare-steps.csv").set_index("plan")
    known = candidates(claims.PAPERS / "faster" / "retired.yaml", 8)
    schemes = {**contestants([name for name in costs.index if name not in known], {}, 8), **known}
    for column, ratio in {"flops": "flops_ratio", "time": "ratio"}.items():
        for name in costs.index:
            scheme = schemes[name]
            expected = sum(stage.share * steps[ratio][str(stage)] for stage in scheme.stages)
            assert costs[column][name] == pytest.approx(expected, abs=2e-3), f"{name} changed after its {column}"


def test_seeds_steps_and_the_ratio_s_verdict_are_those_of_the_figures(papers):
    file = papers.parent / "compressors" / "trained.csv"
    pd.read_csv(file).assign(seeds=3, steps=77).to_csv(file, index=False)
    found = [*claims.prumerge(papers), *claims.llava_stf(papers)]
    trained = [claim for claim in found if "training-free" not in claim.ours]
    assert [claim.seeds for claim in trained] == [3] * 5
    assert all("train_steps 77 -p seeds 3" in claim.command for claim in trained)
    one = [claim for claim in found if claim not in trained] + claims.llavolta(papers)[:2]
    assert [claim.seeds for claim in one] == [None] * 4  # over questions to one model
    published = pd.read_csv(papers / "published.csv")
    for percent, verdict in ((500, claims.YES), (600, claims.NO)):
        published.loc[published.quantity == "compression ratio above", "value"] = percent
        published.to_csv(papers / "published.csv", index=False)
        claim = next(claim for claim in claims.llavolta(papers) if claim.text.startswith("Stage I"))
        assert claim.verdict == verdict and claim.published == f"> {percent}%"


def test_no_verdict_on_accuracy_is_drawn_from_runs_that_learnt_nothing(papers):
    """Both worlds side by side; a baseline hardly above constant answers can lose nothing."""
    folder = papers.parent / "nano"
    constant = pd.read_csv(folder / "accuracy.csv").query("type == 'overall' and plan == 'none'").constant.iloc[0]
    questions = 300
    for share, open_question in ((constant, True), (0.9, False)):
        rows = [dict(question=i, type="what", correct=int(i < share * questions)) for i in range(questions)]
        wide = pd.DataFrame(rows)
        names = pd.read_csv(folder / "compare-costs.csv").scheme
        right = wide[["question", "type"]].assign(**{name: wide.correct for name in names})
        right.loc[: questions // 3, "three-stage"] = 0
        right.to_csv(folder / "compare-correct.csv", index=False)
        found = {claim.text: claim.verdict.split("; pictures: ")[1] for claim in claims.nano(folder)}
        accuracy = [verdict for text, verdict in found.items() if text.startswith(("Nothing", "Heavy"))]
        assert len(accuracy) == 3 and all(verdict.startswith(claims.OPEN) for verdict in accuracy) == open_question
        if not open_question:
            assert found["Nothing is lost at the end of training"] == claims.NO
        assert not next(verdict for text, verdict in found.items() if "70%" in text).startswith(claims.OPEN)
