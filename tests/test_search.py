"""papers/search.py: halving keeps the better half, what is too slow is not tried, and the verdict's seeds are fresh."""

from __future__ import annotations

import pandas as pd
import pytest
import search

from llavolta.errors import UserError
from llavolta.studies import compare
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import Scheme


@pytest.fixture
def fake(monkeypatch):
    """Comparisons without training: accuracy by scheme, with a jump for each seed, and speed-ups."""
    right = {search.BASELINE: 0.7, "slow": 0.8, "good": 0.68, "bad": 0.3, "lucky": 0.69}
    asked = []

    def answers(schemes, seeds, config, heldout, questions, workers, changes=None):
        asked.append((dict(seeds), heldout))
        rows = []
        for name in schemes:
            for seed in seeds[name]:
                share = right.get(name, 0.5) + 0.01 * seed - 0.3 * (name == "lucky" and seed > 0)
                rows += [dict(scheme=name, seed=seed, type="read", correct=n < 100 * share) for n in range(100)]
        return pd.DataFrame(rows)

    def costs(schemes, config, model, rounds):
        recipe = {name: 0.39 for name in schemes} | {search.BASELINE: 1.0, "slow": 0.5}
        table = pd.DataFrame(dict(recipe=pd.Series(recipe), align_share=0.4)).rename_axis("scheme")
        return table.loc[list(schemes)], None

    monkeypatch.setattr(compare, "compare", answers)
    monkeypatch.setattr(compare, "costs", costs)
    return asked


def schemes(*names) -> dict[str, Scheme]:
    return {name: Scheme.equal(name, "none") for name in names}


def test_halving_keeps_the_better_ones_over_all_seeds_so_far(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "KEPT", 2)
    log, runs = search.search(schemes("slow", "good", "bad", "lucky"), TrainConfig(output=str(tmp_path)))
    seeds = runs.query("type == 'read'").groupby("scheme").seed.apply(list).to_dict()
    assert seeds == {search.BASELINE: [0, 1, 2], "good": [0, 1, 2], "lucky": [0, 1], "bad": [0]}
    assert log[log["round"] == 0].scheme.tolist() == ["slow"] and not log.query("scheme == 'slow'").kept.any()
    assert log[log["round"] == 1].scheme.tolist() == ["lucky", "good", "bad"]  # the best first
    assert log[(log["round"] == 1) & log.kept].scheme.tolist() == ["lucky", "good"]
    assert log[(log["round"] == 2) & log.kept].scheme.tolist() == ["good"]  # the second seed showed it
    assert log[(log["round"] == 3) & log.kept].scheme.tolist() == ["good"]
    assert log.query("scheme == 'good'").difference.round(6).tolist() == [-0.02] * 3
    assert not any("slow" in seeds for seeds, _ in fake)


def test_the_verdict_is_of_other_seeds_and_questions(fake, tmp_path):
    chosen = schemes("good", "bad")
    table, runs = search.verdict(chosen, TrainConfig(output=str(tmp_path)), tmp_path / "fresh.json", (10, 11))
    assert fake == [(dict.fromkeys([search.BASELINE, *chosen], [10, 11]), tmp_path / "fresh.json")]
    assert table.scheme.tolist() == ["good", "good", "bad", "bad"] and sorted(table.type[:2]) == ["overall", "read"]
    assert table.difference.round(6).tolist() == [-0.02] * 2 + [-0.4] * 2
    assert table.speedup.round(2).tolist() == [2.56] * 4
    assert not {*search.SEEDS} & {*search.FRESH}
    means = runs.groupby(["scheme", "type"]).accuracy.mean()
    assert means["bad", "overall"] == pytest.approx(table.query("scheme == 'bad'").accuracy.iloc[0])
    assert len(runs) == 3 * 2 * 2  # schemes, seeds, types


def test_all_tokens_for_fewer_steps_stand_beside_the_schemes(fake, scenes, tmp_path):
    data = str(scenes / "train.json")
    config = TrainConfig(output=str(tmp_path), data=data, max_steps=200, align_steps=240)
    fresh = tmp_path / "fresh.json"
    table, runs = search.verdict(schemes("good"), config, fresh, (10, 11), fewer=["50:60", "100"])
    speedup = table.groupby("scheme").speedup.first()
    assert speedup["all-tokens-50-60"] == pytest.approx(4)  # a quarter of all steps
    assert speedup["all-tokens-100"] == pytest.approx(1 / (0.4 + 0.6 * 0.5))
    assert {"all-tokens-50-60", "all-tokens-100"} < set(runs.scheme)
    with pytest.raises(UserError, match="steps of tuning.* not '0'"):
        search.fewer_steps(["0"])


def test_nothing_fast_enough_is_said(fake, tmp_path):
    with pytest.raises(UserError, match=r"no candidate is 3 times faster; the fastest is 2\.56"):
        search.search(schemes("good", "slow"), TrainConfig(output=str(tmp_path)), faster=3)


def test_the_candidates_fit_models_of_both_worlds():
    for depth in (8, 30):
        held = search.candidates(search.FOLDER / "candidates.yaml", depth)
        assert len(held) > 5 and all(scheme.align for scheme in held.values())
        assert all(scheme.boundaries(200)[-1] == 200 for scheme in held.values())


def test_the_preset_is_the_candidate_that_won():
    log = pd.read_csv(search.FOLDER / "search.csv")
    (winner,) = log.scheme[log["round"].eq(len(search.SEEDS)) & log.kept]
    held = search.candidates(search.FOLDER / "candidates.yaml", 8)
    assert search.presets(held, 8) == {winner: "fast"}
    verdict = pd.read_csv(search.FOLDER / "verdict.csv")
    assert set(verdict.scheme) == {"fast"} and set(verdict.seeds) == {len(search.FRESH)}
