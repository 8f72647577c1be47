"""The pages of claims say what their figures say, and are up to date."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import claims
import pandas as pd
import pytest
import times
import verdicts
from search import candidates
from verdicts import CONTRADICTED, OPEN, OTHER_SIZE, SUPPORTED

from llavolta.studies.compare import BASELINE, CONTROLS, contestants
from llavolta.train.schemes import PAPER_SCHEMES


@pytest.mark.parametrize("paper", claims.PAGES)
def test_the_committed_page_is_what_its_figures_give(paper):
    """Its commands name notebooks and parameters that exist."""
    page = claims.render(paper)
    assert (claims.PAPERS / paper / "claims.md").read_text() == page, "run python papers/claims.py"
    for notebook, arguments in re.findall(r"`(\w+\.ipynb) OUT\.ipynb([^`]*)`", page):
        source = (claims.PAPERS.parent / "notebooks" / notebook).read_text()
        for name in re.findall(r"-p (\w+)", arguments):
            assert f'"{name} = ' in source, name


def test_the_readme_shows_the_recorded_results():
    text = claims.README.read_text()
    assert text == claims.readme(text), "run python papers/claims.py"


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """Made-up figures: every scheme 90% but for what a test changes, seeds alike."""
    shutil.copytree(claims.PAPERS, tmp_path / "papers")
    shutil.copy(claims.README, tmp_path)
    names = [*PAPER_SCHEMES, *CONTROLS]
    kinds = ("overall", "count")
    rows = [dict(scheme=n, seed=s, type=k, accuracy=0.9 + s / 1000) for n in names for s in range(5) for k in kinds]
    pd.DataFrame(rows).to_csv(tmp_path / "papers" / "llavolta" / "compare-runs.csv", index=False)
    costs = [dict(scheme=n, time=1.0 if n == BASELINE else 0.7, flops=0.7) for n in names]
    pd.DataFrame(costs).to_csv(tmp_path / "papers" / "llavolta" / "compare-costs.csv", index=False)
    monkeypatch.setattr(claims, "PAPERS", tmp_path / "papers")
    monkeypatch.setattr(claims, "README", tmp_path / "README.md")
    return tmp_path / "papers" / "llavolta"


def verdicts_of(folder) -> Callable[[str], str]:
    """A function: the verdict on the claim whose text starts so."""
    found = {claim.text: claim.verdict for claim in claims.llavolta(folder)}
    return lambda start: next(value for text, value in found.items() if text.startswith(start))


def change(folder, scheme: str, by: list[float], kind: str = "overall") -> None:
    runs = pd.read_csv(folder / "compare-runs.csv")
    runs.loc[(runs.scheme == scheme) & (runs.type == kind), "accuracy"] += by
    runs.to_csv(folder / "compare-runs.csv", index=False)


LOST, BETTER, FOUR = "Nothing is lost at", "Staged training scores", "Four stages are"
TIME, REVERSE = "Staged compression", "Heavy first and light later is better than the same stages in reverse"


def test_equal_accuracies_lose_nothing_and_favour_nothing(papers):
    verdict = verdicts_of(papers)
    assert verdict(LOST) == SUPPORTED
    assert verdict(BETTER) == verdict(FOUR) == verdict(REVERSE) == OPEN
    assert verdict("Stage I") == verdicts.ARITHMETIC and "426.7%" in claims.render("llavolta")


def test_a_clear_loss_and_a_clear_gain(papers):
    change(papers, "three-stage", [-0.03, -0.031, -0.029, -0.03, -0.03])
    change(papers, "four-stage-wider", [0.05, 0.051, 0.049, 0.05, 0.05])
    verdict = verdicts_of(papers)
    assert verdict(LOST) == verdict(REVERSE) == verdict(BETTER) == CONTRADICTED
    assert verdict(FOUR) == SUPPORTED


def test_wide_intervals_and_losses_within_a_point_settle_nothing(papers):
    change(papers, "three-stage", [0.1, -0.1, 0.05, -0.05, 0.0])
    change(papers, "four-stage-wider", [0.05, 0.051, 0.049, 0.05, 0.05])
    verdict = verdicts_of(papers)
    assert verdict(LOST) == OPEN and verdict(FOUR) == OPEN  # three-stage may be as good


def test_a_type_that_loses_decides_with_the_overall_figure(papers):
    change(papers, "three-stage", [-0.03, -0.031, -0.029, -0.03, -0.03], kind="count")
    verdict = verdicts_of(papers)
    assert verdict(LOST) == CONTRADICTED and verdict(BETTER) == OPEN


def test_a_single_seed_decides_nothing(papers):
    runs = pd.read_csv(papers / "compare-runs.csv")
    runs[runs.seed == 0].to_csv(papers / "compare-runs.csv", index=False)
    runs = claims.Runs(pd.read_csv(papers / "compare-runs.csv"))
    assert runs.difference("three-stage", BASELINE).one_run
    assert claims._better(runs, claims.STAGED, "").verdict == f"{OPEN}: one seed"


@pytest.mark.parametrize(
    ("taken", "found"), [([0.84, 0.83, 0.85], SUPPORTED), ([0.70, 0.71, 0.72], OTHER_SIZE), ([0.84], OPEN)]
)
def test_times_come_from_repeated_measurements(papers, taken, found):
    file = papers.parent / "benchmarks" / "step-times.csv"
    row = dict.fromkeys(times.COLUMNS, 1) | dict(source=times.SOURCE, flops=0.7)
    rows = [
        row | dict(scheme=n, measurement=k, tuning=t) for k, t in enumerate(taken) for n in [BASELINE, *claims.STAGED]
    ]
    pd.DataFrame(rows).to_csv(file, index=False)
    claim = next(claim for claim in claims.llavolta(papers) if claim.text.startswith(TIME))
    assert claim.verdict.startswith(found) and "its FLOPs alone -30%" in claim.ours


def test_times_that_cannot_be_are_faults(papers):
    file = papers.parent / "benchmarks" / "step-times.csv"
    row = dict.fromkeys(times.COLUMNS, 1) | dict(source=times.SOURCE, scheme="heavy", flops=0.72)

    def faults(*tuning: float) -> list[str]:
        return times.faults(pd.DataFrame([row | dict(measurement=k, tuning=t) for k, t in enumerate(tuning, 1)]))

    assert faults(0.70, 0.72, 0.74) == []
    assert faults(0.68) == ["measurement 1: heavy takes 0.680 of the time but 0.720 of the FLOPs"]
    assert faults(0.70, 0.76) == ["measurements of heavy differ by 6.0 points"]
    pd.DataFrame([row | dict(tuning=0.6)]).to_csv(file, index=False)
    assert any("of the FLOPs" in fault for fault in claims.check({}))
    assert times.faults(pd.DataFrame([row | dict(source="earlier", tuning=0.6)])) == []  # a record, which is replaced


def test_the_readme_follows_its_figures(papers, monkeypatch):
    monkeypatch.setattr(claims, "PAGES", {})
    change(papers, "heavy", [0.01] * 5)
    assert claims.main([]) == 0
    row = next(line for line in claims.README.read_text().splitlines() if line.startswith("| `heavy` |"))
    # 90.2% and 91.2% are the means; all seeds differ by one point, so the interval of the difference is a point
    assert "| 91.2% (91.0% to 91.4%) | +1.0 (+1.0 to +1.0) | " in row and row.endswith("| 5 |")
    claims.README.write_text("no marks")
    assert claims.main([]) == 1


def test_a_stale_page_and_missing_figures_are_errors(papers, capsys, monkeypatch):
    monkeypatch.setattr(claims, "PAGES", {"llavolta": claims.PAGES["llavolta"]})
    change(papers, "heavy", [0.01] * 5)
    (papers / "claims.md").write_text("old")
    assert claims.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert claims.main([]) == 0 and claims.main(["--check"]) == 0
    (papers / "attention.csv").unlink()
    assert claims.main([]) == 1 and "papers/llavolta lacks figures" in capsys.readouterr().err


def test_the_same_rule_holds_for_published_and_own_schemes(papers):
    folder = papers.parent / "faster"
    for file in papers.parent.glob("*/**/verdict*.csv"):
        file.unlink()

    def found(difference: float, low: float, high: float, worst: tuple = (0.0, -0.001, 0.001)) -> list[str]:
        of = {"overall": (difference, low, high), "count": worst}
        rows = [
            dict(scheme=name, type=kind, speedup=2.6, baseline=0.9, accuracy=0.9 + mean, difference=mean)
            | dict(low=least, high=most, seeds=10)
            for name in ("fast", "four-times", "dualspeed")
            for kind, (mean, least, most) in of.items()
        ]
        pd.DataFrame(rows).to_csv(folder / "verdict.csv", index=False)
        shown = {claim.text: claim.verdict for claim in claims.faster(folder) if "times faster" not in claim.text}
        assert [text.split("`")[1] for text in shown] == ["fast", "fast", "dualspeed"]
        return list(shown.values())

    assert claims.faster(folder) == []
    assert found(0.0, -0.004, 0.004) == [SUPPORTED] * 3
    assert found(-0.1, -0.12, -0.08) == [CONTRADICTED] * 3
    assert found(0.0, -0.04, 0.04) == [OPEN] * 3
    assert found(-0.01, -0.015, -0.005) == [OPEN] * 3
    assert found(0.0, -0.004, 0.004, worst=(-0.03, -0.04, -0.02)) == [SUPPORTED, CONTRADICTED, SUPPORTED]


def test_a_scheme_stands_beside_all_tokens_at_equal_time(papers):
    folder = papers.parent / "faster"
    for file in folder.glob("**/verdict*.csv"):
        file.unlink()
    speed = {"fast": 2.4, "all-tokens-83-99": 2.45, "all-tokens-150": 1.2, BASELINE: 1.0}
    runs = [
        dict(scheme=name, seed=seed, type="overall", accuracy=0.9 - 0.05 * name.startswith("all") + seed / 1000)
        for name in speed
        for seed in range(10, 15)
    ]
    pd.DataFrame(runs).to_csv(folder / "verdict-runs.csv", index=False)
    rows = [dict(scheme=name, speedup=times) for name, times in speed.items() if name != BASELINE]
    pd.DataFrame(rows).to_csv(folder / "verdict.csv", index=False)
    (claim,) = claims._equal_time(folder)
    assert claim.verdict == SUPPORTED and claim.published == claims.CONTROL and claim.seeds == 5
    assert claim.ours == "fast less all-tokens-83-99: +5.0 (+5.0 to +5.0) points at 2.40 and 2.45 times the speed"
    assert claim.command.startswith("python papers/search.py --fewer 83:99")


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
    assert all(claim.verdict.endswith(", of one model") for claim in one)


def test_answers_to_the_same_questions_are_paired(papers):
    """A baseline that is right wherever another method is, and twice more of 100, beats it; apart they overlap."""
    folder = papers.parent / "compressors"
    free = pd.DataFrame(
        dict(budget=0.25, method=name, accuracy=a, low=a - 0.1, high=a + 0.1)
        for name, a in (("random drop", 0.6), ("downsampling", 0.5), ("no compression", 0.9))
    )
    free.to_csv(folder / "training-free.csv", index=False)
    texts = ("Random drop", "Downsampling")
    unpaired = {claim.text.split(" is")[0].split(" beats")[0]: claim.verdict for claim in claims.prumerge(papers)[2:]}
    assert unpaired == dict.fromkeys(texts, f"{OPEN}, of one model")
    rows = [
        dict(budget=0.25, method=name, question=q, type="read", correct=int(q < 100 * a))
        for name, a in (("random drop", 0.6), ("downsampling", 0.5))
        for q in range(100)
    ]
    pd.DataFrame(rows).to_csv(folder / "training-free-answers.csv.gz", index=False)
    assert [claim.verdict.split(",")[0] for claim in claims.prumerge(papers)[2:]] == [SUPPORTED, CONTRADICTED]


def test_no_verdict_on_accuracy_is_drawn_from_runs_that_learnt_little(papers):
    """Both worlds side by side; nano's baseline against what longer training of it reaches."""
    folder = papers.parent / "nano"
    longer = pd.read_csv(folder / "accuracy.csv").query("type == 'overall' and plan == 'none'").accuracy.iloc[0]
    questions = 300
    names = pd.read_csv(folder / "compare-costs.csv").scheme
    for share, short in ((0.4 * longer, True), (0.9, False)):
        right = pd.DataFrame(
            [
                dict(question=i, type="what") | {name: int(i < share * questions) for name in names}
                for i in range(questions)
            ]
        )
        right.loc[: questions // 3, "three-stage"] = 0
        right.to_csv(folder / "compare-correct.csv", index=False)
        found = {claim.text: claim.verdict.split("; pictures: ")[1] for claim in claims.nano(folder)}
        accuracy = [verdict for text, verdict in found.items() if text.startswith(("Nothing", "Heavy", "Staged tr"))]
        expected = verdicts.TOO_SHORT if short else f"{OPEN}: one seed"
        assert len(accuracy) == 4 and all(verdict.startswith(expected) for verdict in accuracy)
        of_model = [verdict for text, verdict in found.items() if "70%" in text or "attention" in text]
        assert of_model == [f"{CONTRADICTED}, of one model", f"{OPEN}, of one model"]
