"""Claims of the papers beside our figures: ``python papers/claims.py`` writes papers/*/claims.md from the CSV there,
and the README's table of results.

Every figure and verdict is computed from those files, which the notebooks write (``-p record ../papers/llavolta``);
``--check`` only says whether a page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from llavolta.errors import UserError
from llavolta.paths import PAPERS
from llavolta.studies.compare import BASELINE, paired, roughness, table, table_of_one_seed
from llavolta.studies.statistics import paired_difference
from llavolta.train.schemes import NEIGHBOURS, OURS, SCHEMES, compression_ratio, plan_compression_ratio

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
FASTEST, NOTHING = 2.5, 0.005  # what our own fastest scheme is held to: times, and the loss that counts as none
YES, PARTLY, NO, OPEN = "reproduced", "in part", "not reproduced", "not tested"
UNSETTLED = "not settled: no loss shown, but the intervals are wide"
MARGIN = 0.02  # a loss that is below it throughout its interval counts as none


class ClaimsError(UserError, ValueError):
    """A page of claims that cannot be made or is out of date."""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper: what it says, its figure, ours with interval, how sure and where ours comes from."""

    text: str
    published: str
    ours: str
    verdict: str
    seeds: int | None = None
    command: str = ""


def llavolta(folder: Path) -> list[Claim]:
    """The claims of LLaVolta (arXiv 2406.20092), from the figures in ``folder``."""
    published = pd.read_csv(folder / "published.csv").set_index(["claim", "quantity"]).value
    runs = pd.read_csv(folder / "compare-runs.csv").query("type == 'overall'")
    costs = pd.read_csv(folder / "compare-costs.csv").set_index("scheme")
    curves = pd.read_csv(folder / "compare-curves.csv")
    result = table(runs, costs)
    seeds = runs.groupby("scheme").seed.nunique()
    command = COMPARE.format(seeds=seeds[BASELINE])
    above = float(published["stage I", "compression ratio above"])
    ratios = [compression_ratio(32, 576, 2, 8), plan_compression_ratio("1:avgpool:8", 8, 144)]
    return [
        _redundancy(folder, published, REDUNDANCY),
        _attention(pd.read_csv(folder / "attention.csv"), REDUNDANCY),
        Claim(
            f"Stage I compresses visual tokens by more than {above:.0f}%",
            f"> {above:.0f}%",
            f"{ratios[0]:.1%} for 32 layers and 576 tokens; embedded model (8 layers, 144 tokens) {ratios[1]:.1%}",
            YES if ratios[0] > above / 100 else NO,  # claimed of the larger of the two
        ),
        *_training(result, published, seeds, command),
        *_order(partial(paired, runs), seeds, command),
        _stability(roughness(curves), runs, seeds, command),
        Claim(
            "Best on 9 of 13 image benchmarks", "9 of 13; average 61.9%", "needs the 7B model and the benchmarks", OPEN
        ),
        *_video(folder, published),
    ]


def nano(folder: Path) -> list[Claim]:
    """LLaVolta's claims in both worlds: digits on the embedded model, and pictures on nano, from the figures in
    ``folder``: a single seed, so that nano's intervals are over questions."""
    published = pd.read_csv(folder.parent / "llavolta" / "published.csv").set_index(["claim", "quantity"]).value
    right = pd.read_csv(folder / "compare-correct.csv").drop(columns="type").set_index("question")
    answers = right.melt(var_name="scheme", value_name="correct")
    result = table_of_one_seed(answers, pd.read_csv(folder / "compare-costs.csv").set_index("scheme"))
    seeds = pd.Series(1, result.index)

    asked = pd.read_csv(folder / "accuracy.csv").set_index(["type", "vendor", "plan"])
    constant = asked.loc[("overall", "seen", "none"), "constant"]
    known = result.accuracy[BASELINE] >= 1.5 * constant
    unlearnt = f"{OPEN}: {BASELINE} is hardly above constant answers ({constant:.1%}), so nothing can be lost"

    def difference(first: str, second: str) -> tuple[float, float, float]:
        return tuple(paired_difference(right[first], right[second]).values())

    digits = {claim.text: claim for claim in llavolta(folder.parent / "llavolta")}
    return [
        Claim(
            claim.text,
            claim.published,
            f"digits: {digits[claim.text].ours}. Pictures: {claim.ours}",
            f"digits: {digits[claim.text].verdict}; pictures: "
            + (claim.verdict if known or claim.seeds is None else unlearnt),
            claim.seeds,
            claim.command,
        )
        for claim in (
            _redundancy(folder, published, NANO_EVIDENCE),
            _attention(pd.read_csv(folder / "attention.csv"), NANO_EVIDENCE),
            *_training(result, published, seeds, NANO_EVIDENCE),
            *_order(difference, seeds, NANO_EVIDENCE),
        )
    ]


def _redundancy(folder: Path, published: pd.Series, command: str) -> Claim:
    lost = pd.read_csv(folder / "redundancy.csv").set_index("layer")
    limit = float(published["redundancy", "accuracy lost on GQA"]) / 100
    return Claim(
        "70% of the visual tokens pooled away at test time cost 3% of the accuracy",
        "-3% (GQA, LLaVA-1.5-7B)",
        "; ".join(f"layer {k}: {_points(-r.lost, -r.high, -r.low)}" for k, r in lost.iterrows()),
        _all(lost.high <= limit),
        None,
        command,
    )


def _attention(attention: pd.DataFrame, command: str) -> Claim:
    visual = attention.query("kind == 'visual'").sort_values("layer")
    first, last = visual.iloc[0], visual.iloc[-1]
    turn = YES if last.high < first.low else f"{NO}: it rises here" if last.low > first.high else f"{NO}: no trend"
    return Claim(
        "Visual tokens get less attention from the answer position in deeper layers",
        "falls with depth (LLaVA-1.5-7B)",
        "; ".join(f"layer {row.layer}: {row.share:.0%}" for row in visual.itertuples())
        + f" of the attention ({visual.tokens_share.mean():.0%} of the prompt's tokens)",
        turn,
        None,
        command,
    )


def _training(result: pd.DataFrame, published: pd.Series, seeds: pd.Series, command: str) -> list[Claim]:
    four = [name for name in ("four-stage-wider", "four-stage-deeper") if name in result.index]
    staged = ["three-stage", *four]
    saved = float(published["training time", "less training time"]) / 100
    claims = [
        Claim(
            "Staged compression takes 16% less training time",
            "15.3 h to 12.8 h: -16%",
            "; ".join(f"{name}: {result.time[name] - 1:+.0%} (FLOPs {result.flops[name] - 1:+.0%})" for name in staged),
            _all(1 - result.time[four or staged] >= saved),
            None,
            command,
        ),
        Claim(
            "Nothing is lost at the end of training",
            "better than the baseline on average",
            f"{BASELINE}: {_share(result.loc[BASELINE])}; "
            + "; ".join(
                f"{name}: {_points(*result.loc[name, ['difference', 'difference_low', 'difference_high']])}"
                for name in staged
            ),
            _kept(result.loc[staged]),
            int(seeds[staged].min()),
            command,
        ),
    ]
    if not four:
        return claims
    best = result.loc[four].accuracy.idxmax()
    others = [name for name in SCHEMES if name not in four]
    return [
        *claims,
        Claim(
            "Four stages are the best of the schemes",
            "best average",
            "; ".join(f"{name}: {_share(result.loc[name])}" for name in result.index if name in SCHEMES),
            YES if all(result.low[best] > result.high[name] for name in others) else f"{NO}: within the noise",
            int(seeds[four].min()),
            command,
        ),
    ]


def _order(difference_of: Callable, seeds: pd.Series, command: str) -> list[Claim]:
    """difference_of: of two schemes, mean and interval of the first less the second."""
    claims = []
    for control, what in (
        ("three-stage-reversed", "the same stages in reverse order (same cost)"),
        ("three-stage-shuffled", "the same stages in random order (same cost)"),
        ("constant", "one light plan to the end"),
    ):
        if control in seeds.index:
            difference = difference_of("three-stage", control)
            claims.append(
                Claim(
                    f"Heavy first and light later is better than {what}",
                    "claimed, no figure",
                    f"three-stage less {control}: {_points(*difference)}",
                    _sign(difference),
                    int(seeds[control]),
                    command,
                )
            )
    return claims


def _stability(rough: pd.DataFrame, runs: pd.DataFrame, seeds: pd.Series, command: str) -> Claim:
    pooled, pruned = "three-stage", "three-stage-pruned"
    unrest = paired(rough, pruned, pooled, "loss")
    better = paired(runs, pooled, pruned)
    means = rough.groupby("scheme").loss.mean()
    return Claim(
        "Pooling trains more steadily than attention-based pruning",
        "claimed, no figure",
        f"change of the loss from log to log (standard deviation): pooled {means[pooled]:.4f}, pruned "
        f"{means[pruned]:.4f} nats, difference {unrest[0]:+.4f} ({unrest[1]:+.4f} to {unrest[2]:+.4f}); "
        f"accuracy, pooled less pruned: {_points(*better)}",
        _sign(unrest),
        int(seeds[pruned]),
        command,
    )


def _video(folder: Path, published: pd.Series) -> list[Claim]:
    runs = pd.read_csv(folder / "video-runs.csv").query("type == 'overall'")
    time = pd.read_csv(folder / "video-costs.csv").set_index("scheme").loc["three-stage"]
    scores, seeds = runs.pivot(index="seed", columns="scheme", values="accuracy"), runs.seed.nunique()
    change = scores["three-stage"] - scores[BASELINE]
    better, verdict = f"{100 * change.mean():+.1f} points", "not settled: one seed"
    if seeds > 1:
        difference = paired(runs, "three-stage", BASELINE)
        better, verdict = _points(*difference), _sign(difference)
    saved, command = float(published["video", "less training time than Video-LLaVA"]) / 100, VIDEO.format(seeds=seeds)
    return [
        Claim(
            "On video, too, staged compression takes less training time",
            f"-{saved:.0%} (Video-LLaVA)",
            f"three-stage: {time.time - 1:+.0%} (FLOPs {time.flops - 1:+.0%})",
            YES if 1 - time.time >= saved else NO,
            None,
            command,
        ),
        Claim(
            "On video staged training scores better",
            "better on three benchmarks",
            f"{BASELINE}: {scores[BASELINE].mean():.1%}; three-stage: {better}",
            verdict,
            seeds,
            command,
        ),
    ]


def prumerge(folder: Path) -> list[Claim]:
    """The claims of PruMerge (arXiv 2403.15388) and of two studies that doubt such methods."""
    trained = pd.read_csv(folder.parent / "compressors" / "trained.csv").set_index("scheme")
    free = pd.read_csv(folder.parent / "compressors" / "training-free.csv")
    adaptive, plus = trained.loc["PruMerge (adaptive)"], trained.loc["PruMerge+"]
    return [
        Claim(
            "14 times fewer visual tokens with comparable accuracy after fine-tuning (PruMerge)",
            "5.5% of the tokens",
            f"{adaptive.tokens:.1%} of the tokens ({1 / adaptive.tokens:.0f} times fewer), trained with it: "
            f"{_loss(adaptive)}",
            _kept(adaptive.to_frame().T),
            *_trained(adaptive),
        ),
        Claim(
            "4 times fewer visual tokens with comparable accuracy after fine-tuning (PruMerge+)",
            "25% of the tokens",
            f"{plus.tokens:.0%} of the tokens, trained with it: {_loss(plus)}",
            _kept(plus.to_frame().T),
            *_trained(plus),
        ),
        _baseline_is_strong("random drop", "Random drop is a strong baseline (UniPruneBench)", free),
        _baseline_is_strong("downsampling", "Downsampling beats many methods (VTC-Bench)", free),
    ]


def _baseline_is_strong(baseline: str, text: str, free: pd.DataFrame) -> Claim:
    """Which methods a simple baseline beats by more than both intervals, and which beat it, without training."""
    said, wins, losses = [], 0, 0
    for budget, part in free.groupby("budget"):
        rows = part.set_index("method")
        own = rows.loc[baseline]
        rest = rows.drop(index=[baseline, "no compression"])
        beaten, better = rest[rest.high < own.low], rest[rest.low > own.high]
        wins, losses = wins + len(beaten), losses + len(better)
        said.append(f"{budget:.0%}: {_share(own)}, beats {len(beaten)}, loses to {len(better)} of {len(rest)}")
    verdict = YES if wins > losses else PARTLY if wins else NO
    return Claim(text, "claimed over many models", "training-free, " + "; ".join(said), verdict, None, UNTRAINED)


def llava_stf(folder: Path) -> list[Claim]:
    """The claims of LLaVA-STF (arXiv 2506.07138)."""
    trained = pd.read_csv(folder.parent / "compressors" / "trained.csv").set_index("scheme")
    stf, both, pooled = (trained.loc[name] for name in ("STF", "MBTF + STF", "average pooling"))
    return [
        Claim(
            "A quarter of the tokens, accuracy comparable or better",
            "GQA 61.9 against 62.0, POPE 86.0 against 85.9, MMB 66.2 against 64.3",
            f"STF: {_loss(stf)}; MBTF + STF: {_loss(both)}",
            _kept(pd.DataFrame([stf, both])),
            *_trained(stf),
        ),
        Claim(
            "Better than average pooling to a quarter of the tokens",
            "VQAv2 78.1 against 77.0, VizWiz 51.1 against 44.0; GQA 61.9 against 62.1",
            f"STF {_share(stf)}, average pooling {_share(pooled)}, both after {stf.steps:.0f} steps",
            _apart(stf, pooled),
            *_trained(stf),
        ),
        Claim(
            "Fusing several blocks of the tower (MBTF) adds to STF",
            "claimed, ablation",
            f"MBTF + STF {_share(both)}, STF {_share(stf)}, both after {stf.steps:.0f} steps",
            _apart(both, stf),
            *_trained(stf),
        ),
    ]


def faster(folder: Path) -> list[Claim]:
    """The fastest training that is published, DualSpeed (arXiv 2602.03815), and the winner of our search, with seeds
    and questions that the search did not see; speed is that of the whole recipe."""
    published = pd.read_csv(folder / "published.csv").set_index("quantity").value
    speed, kept = published["training of LLaVA-1.5 faster by"], published["performance kept above"] / 100
    claims = []
    for file, where, options in (
        (folder / "beyond" / "verdict.csv", "", OTHERS),
        (folder / "verdict.csv", "", ""),
        (folder.parent / "nano" / "verdict.csv", " (pictures, `nano`)", OTHER_WORLD),
    ):
        if not file.exists():
            continue
        table = pd.read_csv(file)
        worst = table[table.type != "overall"].groupby("scheme").difference.min()
        for row in table[table.type == "overall"].itertuples():
            if row.scheme in NEIGHBOURS:
                text = f"`{row.scheme}` trains {speed:g} times faster at above {kept:.0%} of the accuracy{where}"
                source, times, allowed = f"{speed:g} times, above {kept:.0%}", speed, (1 - kept) * row.baseline
                verdict = NO if row.high < -allowed else YES if row.low >= -allowed else UNSETTLED
            elif row.scheme in OURS:
                text = f"`{row.scheme}` trains {FASTEST:g} times faster with nothing lost: less than {100 * NOTHING:g} "
                text += f"points, and {200 * NOTHING:g} of any question type{where}"
                source, times, nothing = "ours", FASTEST, row.low > -NOTHING and worst[row.scheme] > -2 * NOTHING
                verdict = YES if nothing else NO if row.high < 0 else UNSETTLED
            else:  # what more speed costs is no claim
                continue
            change = _points(row.difference, row.low, row.high)
            said = f"{row.speedup:.2f} times faster, {row.accuracy:.1%} of {row.baseline:.1%}, {change}; "
            said += f"the type that loses most: {100 * worst[row.scheme]:+.1f}"
            verdict = verdict if row.speedup >= times else NO
            claims.append(Claim(text, source, said, verdict, int(row.seeds), FASTER.format(options=options)))
    return claims


def _trained(row: pd.Series) -> tuple[int, str]:
    """Seeds and command of a method that 05 trained."""
    return int(row.seeds), COMPRESSORS.format(steps=int(row.steps), seeds=int(row.seeds))


def _loss(row: pd.Series) -> str:
    change = _points(row.difference, row.difference_low, row.difference_high)
    return f"{_share(row)}, {change} against no compression, both after {row.steps:.0f} steps"


def _kept(rows: pd.DataFrame) -> str:
    """The verdict on a claim that nothing is lost, from the intervals of the differences to no compression."""
    lost, kept = rows.difference_high < 0, rows.difference_low >= -MARGIN
    if kept.all():
        return YES
    return PARTLY if lost.any() and kept.any() else NO if lost.any() else UNSETTLED


def _apart(first: pd.Series, second: pd.Series) -> str:
    """The verdict on a claim that ``first`` is more accurate, from two intervals."""
    if first.low > second.high:
        return YES
    return f"{NO}: the opposite holds" if first.high < second.low else f"{NO}: within the noise"


def _sign(difference: tuple[float, float, float]) -> str:
    """The verdict on a claim that a difference is above 0, from its interval."""
    _, low, high = difference
    return YES if low > 0 else f"{NO}: the opposite holds" if high < 0 else f"{NO}: within the noise"


def _all(holds: pd.Series) -> str:
    return YES if holds.all() else PARTLY if holds.any() else NO


def _points(middle: float, low: float, high: float) -> str:
    return f"{100 * middle:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) points"


def _share(row: pd.Series) -> str:
    return f"{row.accuracy:.1%} ({row.low:.1%} to {row.high:.1%})"


def results(folder: Path) -> str:
    """The table of schemes in the README: accuracy, its difference to the baseline's, and cost, from ``folder``.

    Schemes with fewer than three seeds are left out: their intervals say nothing.
    """
    runs = pd.read_csv(folder / "compare-runs.csv")
    costs = pd.read_csv(folder / "compare-costs.csv").set_index("scheme")
    seeds = runs.groupby("scheme").seed.nunique()
    runs = runs[runs.scheme.map(seeds) >= 3]
    lines = [
        "| scheme | accuracy | less the baseline's, points | training time | FLOPs | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table(runs, costs).iterrows():
        change = _points(row.difference, row.difference_low, row.difference_high).removesuffix(" points")
        change = "" if name == BASELINE else change
        lines.append(f"| `{name}` | {_share(row)} | {change} | {row.time:.2f} | {row.flops:.2f} | {seeds[name]} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """README's ``text`` with its table of results brought up to date."""
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
    """The page of ``paper`` as Markdown."""
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
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python papers/claims.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args(arguments)
    try:
        pages = {PAPERS / paper / "claims.md": render(paper) for paper in PAGES}
        pages[README] = readme(README.read_text())
        for page, text in pages.items():
            name = page.relative_to(README.parent)
            if not options.check:
                page.write_text(text)
                print(f"written: {name}")
            elif not page.exists() or page.read_text() != text:
                raise ClaimsError(f"{name} is out of date; run python papers/claims.py")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
