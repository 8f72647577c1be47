"""Write the papers' claims beside our figures, to papers/*/claims.md, and the README's table of results.

Every figure is computed from the CSV files there, which the notebooks write (``-p record ../papers/llavolta``), and
every verdict by the rule in papers/verdicts.py. ``--check`` writes nothing. It fails if a page is out of date, a
recorded time is impossible, a CSV has no stamp, or a number in the prose has no source.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nano as nano_page
import pandas as pd
import prose
import times
import verdicts
from verdicts import Estimate

from llavolta.errors import UserError
from llavolta.paths import PAPERS
from llavolta.studies.compare import BASELINE, roughness, table, table_of_one_seed
from llavolta.studies.statistics import OVERALL, interval, percent, points
from llavolta.train.schemes import (
    BASELINE_SCHEMES,
    EXTRA_SCHEMES,
    PAPER_SCHEMES,
    compression_ratio,
    plan_compression_ratio,
)

README = PAPERS.parent / "README.md"
REDUNDANCY = "01_redundancy.ipynb OUT.ipynb -p record ../papers/llavolta"
COMPARE = "04_compare_schemes.ipynb OUT.ipynb -p controls True -p seeds {seeds} -p record ../papers/llavolta"
NANO_EVIDENCE = "make nano-evidence"
VIDEO = "06_video.ipynb OUT.ipynb -p seeds {seeds} -p record ../papers/llavolta"
COMPRESSORS = (
    "05_compare_compressors.ipynb OUT.ipynb -p train_steps {steps} -p seeds {seeds} -p record ../papers/compressors"
)
UNTRAINED = "05_compare_compressors.ipynb OUT.ipynb -p train_steps 0 -p record ../papers/compressors"
FASTER = "python papers/search.py{options}, at the top of the repository"
OTHERS = (
    " --candidates papers/faster/beyond/candidates.yaml --winner three-times four-times --beside dualspeed --fresh 3"
    " --record papers/faster/beyond"
)
OTHER_WORLD = (
    " --preset nano --winner hard-align-k-means --fresh 3 --workers 1 --questions 300 --set max_steps=100"
    " --output data/runs/search-nano --record papers/nano"
)
TIMES = "python papers/times.py, at the top of the repository"
FASTEST = 2.5  # the speed-up that our own fastest scheme aims at
STAGED = ("three-stage", "four-stage-wider", "four-stage-deeper")
CONTROL = "our control"
LEARNT = 0.5  # least share of the accuracy of longer training; a run below it is too short to judge
BUDGET = 0.03  # distance of the share of tokens left from the budget, above which the page names it


class ClaimsError(UserError, ValueError):
    """A page of claims that cannot be made, or is out of date."""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what we find.

    Attributes:
        text: The claim.
        published: Its published figure.
        ours: Our figures with their intervals.
        verdict: The verdict of papers/verdicts.py.
        seeds: Seeds of our trainings; None if nothing was trained.
        command: The command that writes our figures.
    """

    text: str
    published: str
    ours: str
    verdict: str
    seeds: int | None = None
    command: str = ""


class Runs:
    """Accuracies of schemes, paired over seeds, or over questions if there is one seed.

    Args:
        runs: One row per scheme, seed and question type with ``accuracy``; or of one seed, one row per scheme and
            question with ``correct``.
    """

    def __init__(self, runs: pd.DataFrame):
        self.one_seed = "correct" in runs
        self.value, self.index = ("correct", "question") if self.one_seed else ("accuracy", "seed")
        self.runs = runs
        self.types = [kind for kind in dict.fromkeys(runs.type) if kind != OVERALL]

    def difference(self, first: str, second: str, kind: str = OVERALL) -> Estimate:
        """Estimate the accuracy of ``first`` less that of ``second``, for one question type."""
        # Questions have no type "overall": all of them count.
        of = self.runs if self.one_seed and kind == OVERALL else self.runs[self.runs.type == kind]
        wide = of.pivot(index=self.index, columns="scheme", values=self.value)
        change = (wide[first] - wide[second]).dropna()
        if not self.one_seed:
            return Estimate.of_runs(change)
        return Estimate(float(change.mean()), *interval(change))

    def by_type(self, first: str, second: str) -> dict[str, Estimate]:
        """Estimate the difference overall and for each question type."""
        return {kind: self.difference(first, second, kind) for kind in (OVERALL, *self.types)}

    def seeds(self, *names: str) -> int:
        """Return the smallest number of seeds among the named schemes."""
        of = self.runs[self.runs.scheme.isin(names)]
        return 1 if self.one_seed else int(of.groupby("scheme").seed.nunique().min())


def llavolta(folder: Path) -> list[Claim]:
    """Judge the claims of LLaVolta (arXiv 2406.20092), from the figures in ``folder``."""
    published = _published(folder)
    accuracies = pd.read_csv(folder / "compare-runs.csv")
    curves = pd.read_csv(folder / "compare-curves.csv")
    flops = pd.read_csv(folder / "compare-costs.csv").set_index("scheme").flops
    runs = Runs(accuracies)
    result = table(accuracies)
    command = COMPARE.format(seeds=runs.seeds(BASELINE))
    above = float(published["stage I", "compression ratio above"])
    ratios = [compression_ratio(32, 576, 2, 8), plan_compression_ratio("1:avgpool:8", 8, 144)]
    return [
        _redundancy(folder, published, REDUNDANCY),
        _attention(pd.read_csv(folder / "attention.csv"), REDUNDANCY),
        Claim(
            f"Stage I compresses visual tokens by more than {above:.0f}%",
            f"> {above:.0f}%",
            f"{ratios[0]:.1%} for 32 layers and 576 tokens; the embedded model's stage I (8 layers, 144 tokens) "
            f"{ratios[1]:.1%}",
            verdicts.ARITHMETIC,
        ),
        _time(published, times.recorded(_step_times(folder)), flops),
        _nothing_lost(runs, result, command),
        _better(runs, STAGED, command),
        _best(runs, result, command),
        *_order(runs, command),
        _stability(roughness(curves), runs, command),
        Claim(
            "Best on 9 of 13 image benchmarks",
            "9 of 13; average 61.9%",
            "needs the 7B model and the benchmarks",
            verdicts.NOT_TESTED,
        ),
        *_video(folder, published),
    ]


def nano(folder: Path) -> list[Claim]:
    """Judge LLaVolta's claims on two models and data sets: digits on the embedded model, and pictures on nano.

    The figures of nano are in ``folder``. They are of one seed, so that their intervals are over questions.
    """
    published = _published(folder.parent / "llavolta")
    right = pd.read_csv(folder / "compare-correct.csv")
    answers = right.melt(["question", "type"], var_name="scheme", value_name="correct")
    costs = pd.read_csv(folder / "compare-costs.csv").set_index("scheme")
    result, runs = table_of_one_seed(answers), Runs(answers)
    longer = pd.read_csv(folder / "accuracy.csv").set_index(["type", "vendor", "plan"])
    reached = longer.loc[(OVERALL, "seen", "none"), "accuracy"]
    learnt = result.accuracy[BASELINE] >= LEARNT * reached
    short = f"{verdicts.TOO_SHORT}: {BASELINE} has {percent(result.accuracy[BASELINE])}, "
    short += f"longer training {percent(reached)}"
    once = costs.time.rename("tuning").reset_index().assign(measurement=1)
    digits = {claim.text: claim for claim in llavolta(folder.parent / "llavolta")}
    staged = [name for name in STAGED if name in result.index]
    return [
        Claim(
            claim.text,
            claim.published,
            f"digits: {digits[claim.text].ours}. Pictures: {claim.ours}",
            f"digits: {digits[claim.text].verdict}; pictures: "
            + (claim.verdict if learnt or claim.seeds is None else short),
            claim.seeds,
            claim.command,
        )
        for claim in (
            _redundancy(folder, published, NANO_EVIDENCE),
            _attention(pd.read_csv(folder / "attention.csv"), NANO_EVIDENCE),
            _time(published, once, costs.flops, NANO_EVIDENCE),
            _nothing_lost(runs, result, NANO_EVIDENCE, [*staged, "constant"]),
            _better(runs, staged, NANO_EVIDENCE),
            *_order(runs, NANO_EVIDENCE),
        )
    ]


def _redundancy(folder: Path, published: pd.Series, command: str) -> Claim:
    lost = pd.read_csv(folder / "redundancy.csv").set_index("layer")
    limit = float(published["redundancy", "accuracy lost on GQA"]) / 100
    changes = {layer: Estimate(-row.lost, -row.high, -row.low) for layer, row in lost.iterrows()}
    return Claim(
        f"70% of the visual tokens pooled away at test time cost {limit:.0%} of the accuracy",
        f"-{limit:.0%} (GQA, LLaVA-1.5-7B)",
        "; ".join(f"layer {layer}: {_points(change)}" for layer, change in changes.items()),
        verdicts.no_loss(list(changes.values()), margin=limit) + ", of one model",
        None,
        command,
    )


def _attention(attention: pd.DataFrame, command: str) -> Claim:
    visual = attention.query("kind == 'visual'").sort_values("layer")
    correlation, p = verdicts.trend(visual.layer, visual.share)
    return Claim(
        "Visual tokens get less attention from the answer position in deeper layers",
        "falls with depth (LLaVA-1.5-7B)",
        f"rank correlation with depth {correlation.mean:+.2f} ({correlation.low:+.2f} to {correlation.high:+.2f}), "
        f"p {_p(p)}; "
        + "; ".join(f"layer {row.layer}: {row.share:.0%}" for row in visual.itertuples())
        + f" of the attention ({visual.tokens_share.mean():.0%} of the prompt's tokens)",
        verdicts.falls(visual.layer, visual.share) + ", of one model",
        None,
        command,
    )


def _time(published: pd.Series, measured: pd.DataFrame, flops: pd.Series, command: str = TIMES) -> Claim:
    """The published time is of four stages. Three stages are shown beside them."""
    saved = float(published["training time", "less training time"]) / 100
    known = [name for name in STAGED if name in set(measured.scheme)]
    judged = [name for name in known if name != "three-stage"] or known
    taken = {name: measured.tuning[measured.scheme == name].dropna() for name in known}
    found = {verdicts.time(taken[name].tolist(), 1 - saved) for name in judged}
    return Claim(
        f"Staged compression takes {saved:.0%} less training time",
        f"15.3 h to 12.8 h: -{saved:.0%} (four stages)",
        "; ".join(f"{name}: {_time_of(taken[name])}, its FLOPs alone {flops[name] - 1:+.0%}" for name in known)
        + " (of tuning)",
        found.pop() if len(found) == 1 else verdicts.OPEN,
        None,
        command,
    )


def _time_of(taken: pd.Series) -> str:
    median = f"{taken.median() - 1:+.0%}"
    span = f" ({taken.min() - 1:+.0%} to {taken.max() - 1:+.0%} in {len(taken)} measurements)"
    return median if len(taken) == 1 else median + span


def _nothing_lost(runs: Runs, result: pd.DataFrame, command: str, names=STAGED) -> Claim:
    changes = {name: runs.by_type(name, BASELINE) for name in names}
    judged = [changes[name] for name in names if name in STAGED]
    overall = [of[OVERALL] for of in judged]
    types = [change for of in judged for kind, change in of.items() if kind != OVERALL]
    return Claim(
        "Nothing is lost at the end of training",
        "implied by better scores",
        f"{BASELINE}: {_share(result.loc[BASELINE])}; "
        + "; ".join(f"{name}: {_loss(of, not runs.one_seed)}" for name, of in changes.items()),
        f"{verdicts.OPEN}: one seed" if runs.one_seed else verdicts.no_loss(overall, types),
        runs.seeds(*names),
        command,
    )


def _loss(changes: dict[str, Estimate], tested: bool) -> str:
    """A difference overall, its p-value against a loss of the margin, and the types that may lose more."""
    overall = changes[OVERALL]
    text = _points(overall)
    if tested:
        text += f", p {_p(overall.p_above(-verdicts.MARGIN))} against a loss of {100 * verdicts.MARGIN:.0f}"
        open_types = [f"{kind} {_points(one)}" for kind, one in changes.items() if one.low <= -verdicts.MARGIN]
        text += f" [{', '.join(kind for kind in open_types if not kind.startswith(OVERALL))}]"
    return text.removesuffix(" []")


def _better(runs: Runs, names, command: str) -> Claim:
    changes = [runs.difference(name, BASELINE) for name in names]
    return Claim(
        "Staged training scores better than the baseline",
        "better on average over 13 benchmarks",
        "; ".join(f"{name}: {_points(change)}" for name, change in zip(names, changes, strict=True)),
        f"{verdicts.OPEN}: one seed" if runs.one_seed else verdicts.better(*changes),
        runs.seeds(*names),
        command,
    )


def _best(runs: Runs, result: pd.DataFrame, command: str) -> Claim:
    """Supported if a scheme of four stages beats every other, contradicted if each of them is beaten."""
    four = [name for name in STAGED if name != "three-stage"]
    others = [name for name in PAPER_SCHEMES if name not in four]
    pairs = [(first, second) for first in four for second in others]
    changes = {pair: runs.difference(*pair) for pair in pairs}
    found = dict(zip(pairs, verdicts.signs(list(changes.values())), strict=True))
    of = {name: [found[name, other] for other in others] for name in four}
    best = any(all(verdict == verdicts.SUPPORTED for verdict in of[name]) for name in four)
    beaten = all(verdicts.CONTRADICTED in of[name] for name in four)
    shown = [
        f"{first} less {second}: {_points(changes[first, second])}"
        for first, second in pairs
        if not changes[first, second].low <= 0 <= changes[first, second].high
    ]
    return Claim(
        "Four stages are the best of the schemes",
        "best average",
        "; ".join(f"{name}: {_share(result.loc[name])}" for name in result.index if name in PAPER_SCHEMES)
        + (f"; of {len(pairs)} differences, clear before correction: {', '.join(shown)}" if shown else ""),
        verdicts.SUPPORTED if best else verdicts.CONTRADICTED if beaten else verdicts.OPEN,
        runs.seeds(*four),
        command,
    )


def _order(runs: Runs, command: str) -> list[Claim]:
    """Heavy first and light later against three controls, corrected for their number."""
    controls = {
        "three-stage-reversed": "the same stages in reverse order (same cost)",
        "three-stage-shuffled": "the same stages in random order (same cost)",
        "constant": "one light plan to the end",
    }
    known = [control for control in controls if control in set(runs.runs.scheme)]
    changes = [runs.difference("three-stage", control) for control in known]
    found = [f"{verdicts.OPEN}: one seed"] * len(known) if runs.one_seed else verdicts.signs(changes)
    return [
        Claim(
            f"Heavy first and light later is better than {controls[control]}",
            CONTROL,
            f"three-stage less {control}: {_points(change)}",
            verdict,
            runs.seeds(control),
            command,
        )
        for control, change, verdict in zip(known, changes, found, strict=True)
    ]


def _stability(rough: pd.DataFrame, runs: Runs, command: str) -> Claim:
    pooled, pruned = "three-stage", "three-stage-pruned"
    wide = rough.pivot(index="seed", columns="scheme", values="loss")
    unrest, means = Estimate.of_runs(wide[pruned] - wide[pooled]), wide.mean()
    return Claim(
        "Pooling trains more steadily than attention-based pruning",
        CONTROL,
        f"change of the loss from log to log (standard deviation): pooled {means[pooled]:.4f}, pruned "
        f"{means[pruned]:.4f} nats, difference {unrest.mean:+.4f} ({unrest.low:+.4f} to {unrest.high:+.4f}); "
        f"accuracy, pooled less pruned: {_points(runs.difference(pooled, pruned))}",
        verdicts.better(unrest),
        runs.seeds(pruned),
        command,
    )


def _video(folder: Path, published: pd.Series) -> list[Claim]:
    runs = Runs(pd.read_csv(folder / "video-runs.csv"))
    cost = pd.read_csv(folder / "video-costs.csv").set_index("scheme").loc["three-stage"]
    baseline = runs.runs.query("type == 'overall' and scheme == @BASELINE").accuracy.mean()
    change, seeds = runs.difference("three-stage", BASELINE), runs.seeds("three-stage")
    saved, command = float(published["video", "less training time than Video-LLaVA"]) / 100, VIDEO.format(seeds=seeds)
    return [
        Claim(
            "On video, too, staged compression takes less training time",
            f"-{saved:.0%} (Video-LLaVA)",
            f"three-stage: {cost.time - 1:+.0%}, its FLOPs alone {cost.flops - 1:+.0%} (of tuning)",
            verdicts.time([cost.time], 1 - saved),
            None,
            command,
        ),
        Claim(
            "On video staged training scores better",
            "better on three benchmarks",
            f"{BASELINE}: {percent(baseline)}; three-stage: {_points(change)}",
            verdicts.better(change),
            seeds,
            command,
        ),
    ]


def prumerge(folder: Path) -> list[Claim]:
    """Judge the claims of PruMerge (arXiv 2403.15388), and of two studies that doubt such methods."""
    compressors = folder.parent / "compressors"
    trained = pd.read_csv(compressors / "trained.csv").set_index("scheme")
    file = compressors / "training-free-answers.csv.gz"
    free = pd.read_csv(compressors / "training-free.csv"), pd.read_csv(compressors / "prefill.csv")
    free = *free, pd.read_csv(file) if file.exists() else None
    adaptive, plus = trained.loc["PruMerge (adaptive)"], trained.loc["PruMerge+"]
    return [
        Claim(
            "14 times fewer visual tokens with comparable accuracy after fine-tuning (PruMerge)",
            "5.5% of the tokens on average (18 times fewer); 14 times is 40 of 576",
            f"{adaptive.tokens:.1%} of the tokens ({1 / adaptive.tokens:.0f} times fewer), trained with it: "
            f"{_trained_loss(adaptive)}",
            _of_trained(adaptive),
            *_trained(adaptive),
        ),
        Claim(
            "4 times fewer visual tokens with comparable accuracy after fine-tuning (PruMerge+)",
            "25% of the tokens",
            f"{plus.tokens:.0%} of the tokens, trained with it: {_trained_loss(plus)}",
            _of_trained(plus),
            *_trained(plus),
        ),
        _baseline_is_strong("random drop", "Random drop is a strong baseline (UniPruneBench)", *free),
        _baseline_is_strong("downsampling", "Downsampling beats many methods (VTC-Bench)", *free),
    ]


def _baseline_is_strong(
    baseline: str, text: str, free: pd.DataFrame, left: pd.DataFrame, answers: pd.DataFrame | None
) -> Claim:
    """How many methods a simple baseline beats, and how many beat it, without training; corrected for their number.

    ``answers`` has the result of every question, if they are recorded. Without it, differences are computed from the
    intervals and not paired, which makes the comparison stricter.
    """
    measured = left.set_index(["budget", "method"]).measured
    changes = {}
    for budget, part in free.groupby("budget"):
        rows = part.set_index("method")
        right = None
        if answers is not None:
            of = answers[answers.budget == budget]
            right = of.pivot(index="question", columns="method", values="correct").astype(float)
        for method in rows.index.drop([baseline, "no compression"], errors="ignore"):
            if right is None:
                changes[budget, method] = _apart(rows.loc[baseline], rows.loc[method])
            else:
                change = right[baseline] - right[method]
                changes[budget, method] = Estimate(float(change.mean()), *interval(change))
    found = pd.Series(verdicts.signs(list(changes.values())), pd.MultiIndex.from_tuples(changes))
    said, more, fewer = [], [], []
    for budget, of in found.groupby(level=0):
        wins, losses = (of == verdicts.SUPPORTED).sum(), (of == verdicts.CONTRADICTED).sum()
        more, fewer = [*more, wins > losses], [*fewer, losses > wins]
        own = free[(free.budget == budget) & (free.method == baseline)].iloc[0]
        names = [baseline, *of.index.get_level_values(1)]
        shares = {name: measured.get((budget, name), budget) for name in names}
        unmet = [f"{name} {share:.0%}" for name, share in shares.items() if abs(share - budget) > BUDGET]
        unmet = f" (tokens really left: {', '.join(unmet)})" if unmet else ""
        said.append(f"{budget:.0%}: {_share(own)}, beats {wins}, loses to {losses} of {len(of)}{unmet}")
    verdict = verdicts.SUPPORTED if all(more) else verdicts.CONTRADICTED if all(fewer) else verdicts.OPEN
    shown = "training-free, " + "; ".join(said)
    return Claim(text, "claimed over many models", shown, f"{verdict}, of one model", None, UNTRAINED)


def llava_stf(folder: Path) -> list[Claim]:
    """Judge the claims of LLaVA-STF (arXiv 2506.07138)."""
    trained = pd.read_csv(folder.parent / "compressors" / "trained.csv").set_index("scheme")
    stf, both, pooled = (trained.loc[name] for name in ("STF", "MBTF + STF", "average pooling"))
    one_seed = f"{verdicts.OPEN}: one seed"
    return [
        Claim(
            "A quarter of the tokens, accuracy comparable or better",
            "GQA 61.9 against 62.0, POPE 86.0 against 85.9, MMB 66.2 against 64.3; lower: VQAv2 78.1 against 78.5, "
            "TextVQA 57.4 against 58.2",
            f"STF: {_trained_loss(stf)}; MBTF + STF: {_trained_loss(both)}",
            one_seed if stf.seeds < 2 else verdicts.no_loss([_change(stf), _change(both)]),
            *_trained(stf),
        ),
        Claim(
            "Better than average pooling to a quarter of the tokens",
            "VQAv2 78.1 against 77.0, VizWiz 51.1 against 44.0; GQA 61.9 against 62.1; lower: POPE 86.0 against 86.3",
            f"STF {_share(stf)}, average pooling {_share(pooled)}, both after {stf.steps:.0f} steps",
            one_seed if stf.seeds < 2 else verdicts.better(_apart(stf, pooled)),
            *_trained(stf),
        ),
        Claim(
            "Fusing several blocks of the tower (MBTF) adds to STF",
            "claimed, ablation",
            f"MBTF + STF {_share(both)}, STF {_share(stf)}, both after {stf.steps:.0f} steps",
            one_seed if stf.seeds < 2 else verdicts.better(_apart(both, stf)),
            *_trained(stf),
        ),
    ]


def faster(folder: Path) -> list[Claim]:
    """Judge DualSpeed (arXiv 2602.03815) and the winner of our search.

    Seeds and questions are those of papers/search.py's verdict, which the search did not use. Speed is that of
    alignment and tuning together.
    """
    published = pd.read_csv(folder / "published.csv").set_index("quantity").value
    speed, kept = published["training of LLaVA-1.5 faster by"], published["performance kept above"] / 100
    measured = times.recorded(_step_times(folder))
    claims = []
    for file, where, options in (
        (folder / "beyond" / "verdict.csv", "", OTHERS),
        (folder / "verdict.csv", "", ""),
        (folder.parent / "nano" / "verdict.csv", " (pictures, `nano`)", OTHER_WORLD),
    ):
        if not file.exists():
            continue
        table = pd.read_csv(file)
        command = FASTER.format(options=options)
        for scheme in dict.fromkeys(table.scheme):
            ours, rows = scheme in EXTRA_SCHEMES, table[table.scheme == scheme].set_index("type")
            if not ours and scheme not in BASELINE_SCHEMES:  # what more speed costs is no claim
                continue
            overall, seeds = rows.loc[OVERALL], int(rows.seeds.min())
            changes = {
                row.Index: Estimate(row.difference, row.low, row.high, row.seeds - 1) for row in rows.itertuples()
            }
            taken = measured.recipe[measured.scheme == scheme].dropna()
            if where or taken.empty:
                taken = pd.Series([1 / overall.speedup])
            aim, who = (FASTEST, "ours") if ours else (speed, f"{speed:g} times")
            types = {kind: change for kind, change in changes.items() if kind != OVERALL}
            worst = min(types, key=lambda kind: types[kind].mean)
            said = f"{percent(overall.accuracy)} of {percent(overall.baseline)}, {_points(changes[OVERALL])}"
            most = f"{worst} loses most: {_points(changes[worst])}"
            untuned = "" if ours else "; untuned here, its figure does not transfer to 200 steps"
            claims += [
                Claim(
                    f"`{scheme}` trains {aim:g} times faster{where}",
                    who,
                    _speed(taken),
                    verdicts.time(taken.tolist(), 1 / aim),
                    None,
                    command if where else TIMES,
                ),
                Claim(
                    f"`{scheme}` keeps {kept:.0%} of the accuracy{where}",
                    f"above {kept:.0%}" + (" (of `dualspeed`)" if ours else ""),
                    f"{percent(overall.accuracy / overall.baseline)}: {said}; {most}{untuned}",
                    verdicts.no_loss([changes[OVERALL]], margin=(1 - kept) * overall.baseline),
                    seeds,
                    command,
                ),
            ]
            if ours:
                verdict = verdicts.no_loss([changes[OVERALL]], list(types.values()))
                claims.append(
                    Claim(f"`{scheme}` loses nothing{where}", who, f"{said}; {most}", verdict, seeds, command)
                )
    return [*claims, *_equal_time(folder)]


def _equal_time(folder: Path) -> list[Claim]:
    """Schemes against training on all tokens for fewer steps, if recorded (``search.py --fewer``)."""
    claims = []
    for file in sorted(folder.glob("**/verdict-runs.csv")):
        runs = Runs(pd.read_csv(file))
        speed = pd.read_csv(file.with_name("verdict.csv")).groupby("scheme").speedup.first()
        controls = [name for name in speed.index if name.startswith("all-tokens")]
        for control in controls:
            for scheme in speed.index.difference(controls):
                if abs(speed[scheme] / speed[control] - 1) < 0.1:
                    change = runs.difference(scheme, control)
                    claims.append(
                        Claim(
                            f"`{scheme}` is better than all tokens for fewer steps, at equal time",
                            CONTROL,
                            f"{scheme} less {control}: {_points(change)} at {speed[scheme]:.2f} and "
                            f"{speed[control]:.2f} times the speed",
                            verdicts.better(change),
                            runs.seeds(scheme, control),
                            FASTER.format(options=" --fewer " + control.removeprefix("all-tokens-").replace("-", ":")),
                        )
                    )
    return claims


def _speed(taken: pd.Series) -> str:
    """The speed-up, from times relative to the baseline's."""
    text = f"{1 / taken.median():.2f} times faster"
    span = f" ({1 / taken.max():.2f} to {1 / taken.min():.2f} in {len(taken)} measurements)"
    return text if len(taken) == 1 else text + span


def _published(folder: Path) -> pd.Series:
    return pd.read_csv(folder / "published.csv").set_index(["claim", "quantity"]).value


def _step_times(folder: Path) -> Path:
    return folder.parent / "benchmarks" / times.FILE.name


def _trained(row: pd.Series) -> tuple[int, str]:
    """Seeds and command of a method that notebook 05 trained."""
    return int(row.seeds), COMPRESSORS.format(steps=int(row.steps), seeds=int(row.seeds))


def _trained_loss(row: pd.Series) -> str:
    return f"{_share(row)}, {_points(_change(row))} against no compression, both after {row.steps:.0f} steps"


def _of_trained(row: pd.Series) -> str:
    """The verdict on a claim that a trained method loses nothing."""
    return f"{verdicts.OPEN}: one seed" if row.seeds < 2 else verdicts.no_loss([_change(row)])


def _change(row: pd.Series) -> Estimate:
    df = row.seeds - 1 if row.seeds > 1 else Estimate.df
    return Estimate(row.difference, row.difference_low, row.difference_high, df)


def _apart(first: pd.Series, second: pd.Series) -> Estimate:
    """The difference of two accuracies whose pairs are not recorded, as if they were independent."""
    mean = first.accuracy - second.accuracy
    low = ((first.accuracy - first.low) ** 2 + (second.high - second.accuracy) ** 2) ** 0.5
    high = ((first.high - first.accuracy) ** 2 + (second.accuracy - second.low) ** 2) ** 0.5
    return Estimate(mean, mean - low, mean + high)


def _points(change: Estimate) -> str:
    if change.one_run:
        return f"{points(change.mean)} points"
    return f"{points(change.mean)} ({points(change.low)} to {points(change.high)}) points"


def _share(row: pd.Series) -> str:
    return f"{percent(row.accuracy)} ({percent(row.low)} to {percent(row.high)})"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.01 else f"{value:.2f}"


def results(folder: Path) -> str:
    """Render the README's table of schemes, from the figures in ``folder``.

    Schemes with fewer than three seeds are left out, because their intervals are too wide to say anything.
    """
    accuracies = pd.read_csv(folder / "compare-runs.csv")
    flops = pd.read_csv(folder / "compare-costs.csv").set_index("scheme").flops
    seeds = accuracies.groupby("scheme").seed.nunique()
    accuracies = accuracies[accuracies.scheme.map(seeds) >= 3]
    measured = times.recorded(_step_times(folder))
    tuning, recipe = (times.summary(column, measured) for column in ("tuning", "recipe"))
    lines = [
        "| scheme | accuracy | less the baseline's, points | tuning: time | FLOPs | with alignment: time | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table(accuracies).iterrows():
        low, high = points(row.difference_low), points(row.difference_high)
        change = "" if name == BASELINE else f"{points(row.difference)} ({low} to {high})"
        cost = f"{_range(tuning.loc[name])} | {flops[name]:.2f} | {_range(recipe.loc[name])}"
        lines.append(f"| `{name}` | {_share(row)} | {change} | {cost} | {seeds[name]} |")
    return "\n".join(lines)


def _range(row: pd.Series) -> str:
    middle, least, most = (f"{value:.2f}" for value in (row["median"], row.least, row.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def readme(text: str) -> str:
    """Return README's ``text`` with its table of results brought up to date.

    Raises:
        ClaimsError: The marks around the table are missing.
    """
    start, end = "<!-- results: python papers/claims.py -->\n", "\n<!-- end of results -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ClaimsError("README.md has lost the marks around its table of results")
    before, rest = text.split(start)
    return before + start + results(PAPERS / "llavolta") + end + rest.split(end)[1]


NANO = (
    "Pictures: the model `nano` (30 layers, 144 visual tokens, pretrained parts) on scenes of everyday objects;",
    "adapters and projector train, from one shared alignment, for 150 steps of 8 (`nano-tuned`: 1,050). All of it is",
    "made by `make nano-evidence`. The rows about redundancy are of the `nano-tuned` that is shipped.",
)
PAGES: dict[str, tuple[str, Callable[[Path], list[Claim]]]] = {
    "llavolta": ("LLaVolta", llavolta),
    "prumerge": ("PruMerge", prumerge),
    "llava-stf": ("LLaVA-STF", llava_stf),
    "faster": ("Faster training", faster),
    "nano": ("LLaVolta in two worlds", nano),
}


def render(paper: str) -> str:
    """Render a page of claims.

    Args:
        paper: A key of PAGES.

    Returns:
        Markdown.

    Raises:
        ClaimsError: Figures are missing.
    """
    title, claims = PAGES[paper]
    lines = [
        f"# {title}: claims and what we find",
        "",
        "Written by `python papers/claims.py` from the CSV files beside it; do not edit. Ours is the embedded scale",
        "(8 layers, 144 visual tokens, handwritten digits) unless said otherwise: it can support a claim or cast doubt",
        "on it, not settle it for 7B. Intervals are 95%: over seeds (Student's t; differences paired by seed), or over",
        "questions where a single model is looked at. Commands run in `notebooks/`, after `papermill`.",
        *(["", *NANO] if paper == "nano" else []),
        "",
        "| claim | published | ours (95% interval) | seeds | verdict | command |",
        "|---|---|---|---|---|---|",
    ]
    try:
        found = claims(PAPERS / paper)
    except (FileNotFoundError, KeyError) as error:
        raise ClaimsError(f"papers/{paper} lacks figures ({error}); run the notebooks that write them") from None
    for claim in found:
        cells = [claim.text, claim.published, claim.ours, "" if claim.seeds is None else str(claim.seeds)]
        lines.append("| " + " | ".join([*cells, claim.verdict, f"`{claim.command}`" if claim.command else ""]) + " |")
    return "\n".join(lines) + "\n\n" + verdicts.RULE


def check(pages: dict[Path, str]) -> list[str]:
    """Find everything that is wrong with the committed pages and figures.

    Args:
        pages: The text of each page as it should be.

    Returns:
        One line per fault.
    """
    found = [
        f"{page.relative_to(README.parent)} is out of date; run python papers/claims.py"
        for page, text in pages.items()
        if not page.exists() or page.read_text() != text
    ]
    found += times.faults(pd.read_csv(_step_times(PAPERS / "llavolta")))
    return found + prose.unstamped(PAPERS) + prose.unsourced(PAPERS, README)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages. Returns the exit code: 1 after an error, which is printed on stderr."""
    parser = argparse.ArgumentParser(prog="python papers/claims.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args(arguments)
    try:
        pages = {PAPERS / paper / "claims.md": render(paper) for paper in PAGES}
        pages[README] = readme(README.read_text())
        pages[PAPERS / "nano" / "README.md"] = nano_page.committed_page(PAPERS / "nano")
        if options.check:
            if found := check(pages):
                raise ClaimsError("\nerror: ".join(found))
            return 0
        for page, text in pages.items():
            page.write_text(text)
            print(f"written: {page.relative_to(README.parent)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
