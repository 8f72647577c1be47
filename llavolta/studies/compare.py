"""Schemes side by side: trained with the same seeds, data order and number of steps, then asked the same questions.

Every run is a folder of ``llavolta.train``; what is finished is not done again, so an interrupted comparison goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from llavolta.compression.plan import check_layers
from llavolta.cost import bench
from llavolta.data import Collator, GroupedSampler, LlavaData
from llavolta.errors import UserError
from llavolta.studies import records
from llavolta.studies.evaluation import asked_digest, evaluate
from llavolta.studies.opening import open_model, open_study
from llavolta.studies.statistics import (
    interval,
    mean_interval,
    paired_difference,
    points,
    with_overall,
)
from llavolta.train import build
from llavolta.train.config import TrainConfig
from llavolta.train.projectors import OWN
from llavolta.train.run import train
from llavolta.train.schemes import CONTROL_SCHEMES, SCHEMES, Scheme
from llavolta.train.trainer import read_metrics

BASELINE = "single-stage"
CONTROLS = CONTROL_SCHEMES


class CompareError(UserError, ValueError):
    """A comparison that cannot be made; the message says why."""


def contestants(
    names: Sequence[str], own: Mapping[str, Sequence], num_layers: int
) -> dict[str, Scheme]:
    """Schemes by name, for a model of ``num_layers`` layers, the baseline first.

    names: of schemes.SCHEMES, scaled to the model's depth. own: more, each a list of plans (equal
    shares) or of {plan, share}, taken as they are.
    """
    unknown = [name for name in names if name not in SCHEMES]
    if unknown:
        raise CompareError(
            f"unknown scheme {', '.join(map(repr, unknown))}; choose from {', '.join(SCHEMES)}"
        )
    chosen = {name: SCHEMES[name].scaled(num_layers) for name in dict.fromkeys([BASELINE, *names])}
    for name, stages in own.items():
        if name in SCHEMES:
            raise CompareError(f"a scheme of your own cannot be called {name!r}; that one exists")
        chosen[name] = scheme = Scheme.of(name, stages)
        for stage in (*scheme.stages, *([scheme.align] if scheme.align else [])):
            for plan in stage.choices:
                check_layers(plan, num_layers)
    return chosen


def compare(
    schemes: Mapping[str, Scheme],
    seeds: Mapping[str, Sequence[int]],
    config: TrainConfig,
    heldout: str | Path | None = None,
    questions: int = 1200,
    workers: int = 1,
    progress: bool = True,
    plans: Mapping[str, str] | None = None,
    changes: Mapping[str, dict] | None = None,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Train every scheme with its ``seeds`` and ask each model the first ``questions`` held-out questions.

    config: what the runs share; its output is the folder that holds them all, as ``<seed>/<scheme>``. Projector
    alignment is done once a seed. heldout: LLaVA JSON; None: that of the generated data trained on. workers: runs at
    a time, each in a process of its own (on the CPU with its share of the cores). plans: by scheme, the plan in force
    while answering (default: none). changes: by scheme, what differs in its configuration: ``{"projector": "stf:2"}``,
    or fewer steps of tuning and alignment, ``{"max_steps": 83, "align_steps": 99}``.
    max_new_tokens: see evaluation.evaluate; pictures are padded as the runs pad them.
    Returns one row per scheme, seed and question: see evaluation.evaluate. Raises what ``train`` raises, at once; what
    is finished stays.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise CompareError(f"workers must be a whole number of at least 1, not {workers!r}")
    setup = build.prepare(neutral(config))  # builds the data once, before the workers need it
    heldout = Path(heldout) if heldout else build.heldout_file(config)
    LlavaData(heldout)  # refuses what cannot be asked, before anything is trained
    root, plans, changes = Path(config.output), plans or {}, changes or {}
    aligned, runs = {}, {}
    # Seed by seed, each in the order of the schemes: what is finished can be compared, the baseline first.
    for seed, name in (
        (number, key) for number in sorted(set().union(*seeds.values())) for key in schemes
    ):
        if seed not in seeds[name]:
            continue
        change = dict(changes.get(name, {}))
        steps = change.pop("max_steps", setup.total_steps)
        own = config.changed(seed=seed, **change)
        start = {}
        if own.aligns:
            kind = "" if own.projector == OWN else "-" + own.projector.replace(":", "-")
            align = schemes[name].align
            if align is not None:
                of = "" if align.share == 1 else f" {align.share:g} of the steps"
                kind += "-" + re.sub(r"[^\w.]+", "-", f"{align}{of}")
            if own.align_steps != config.align_steps:
                kind += f"-{own.align_steps}-steps"
            first = root / f"{seed}" / f"{build.ALIGN}{kind}"
            # Under stages that play no part in it, so that schemes which are aligned alike share one.
            stages = (
                ["none"]
                if align is None
                else replace(Scheme.equal("any", "none"), align=align).written
            )
            aligned[first] = own.changed(output=str(first), stage=0, plan=None, scheme=stages)
            start = dict(model=str(first), align_steps=0, align_epochs=None, projector=OWN)
        run = own.changed(output=str(root / f"{seed}" / name), stage=None, plan=None, **start)
        written = schemes[name].written
        runs[name, seed] = run.changed(scheme=written, pivots=None, max_steps=steps, epochs=None)
    if workers == 1:
        for first in aligned.values():
            train(first, progress=False)
        bar = tqdm(runs.items(), desc="runs", disable=not progress)
        frames = {
            key: _run(run, heldout, questions, plans.get(key[0], "none"), max_new_tokens)
            for key, run in bar
        }
    else:
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
        ) as pool:
            frames = _in_pool(
                pool, aligned, runs, heldout, questions, plans, max_new_tokens, progress
            )
    order = [(name, seed) for name in schemes for seed in seeds[name]]
    return pd.concat(
        [frames[name, seed].assign(scheme=name, seed=seed) for name, seed in order],
        ignore_index=True,
    )


def neutral(config: TrainConfig) -> TrainConfig:
    """``config`` with a scheme that fits any number of steps; its own plays no part here."""
    return config.changed(scheme=["none"], stage=None, plan=None)


def _begin_worker(threads: int) -> None:
    """Use so many threads, and end with the parent: a worker left alone would train on into the next run's folders."""
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_pool(
    pool, aligned: dict, runs: dict, heldout: Path, questions: int, plans, max_new_tokens, progress
) -> dict:
    """The answers of every run; what cannot start any more after a failure is given up."""
    frames = {}
    with tqdm(total=len(aligned) + len(runs), desc="runs", disable=not progress) as bar:
        try:
            for done in as_completed(
                [pool.submit(train, config, False) for config in aligned.values()]
            ):
                done.result()
                bar.update()
            waiting = {
                pool.submit(
                    _run, run, heldout, questions, plans.get(key[0], "none"), max_new_tokens
                ): key
                for key, run in runs.items()
            }
            for done in as_completed(waiting):
                frames[waiting[done]] = done.result()
                bar.set_postfix_str(" ".join(map(str, waiting[done])))
                bar.update()
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise CompareError(
                    "a run was killed, perhaps for want of memory; lower workers and go on"
                ) from None
            raise
    return frames


def _run(
    config: TrainConfig, heldout: Path, questions: int, plan: str, max_new_tokens: int | None = None
) -> pd.DataFrame:
    """Train ``config`` unless its folder holds the trained model already, and its answers under ``plan`` likewise."""
    output = Path(config.output)
    train(
        config, progress=False
    )  # which refuses another run's folder, and does nothing for a finished one
    data = LlavaData(heldout)
    asked = asked_digest(data, list(islice(data.questions(), questions)))
    depends = repr([plan, max_new_tokens, config.pad_to_square]).encode()
    file = output / f"answers-{hashlib.blake2b(depends + asked, digest_size=6).hexdigest()}.csv"
    if file.exists():
        return pd.read_csv(file, dtype=_TEXT, keep_default_na=False)
    study = open_study(output, heldout, pad_to_square=config.pad_to_square)
    limits = dict(limit=questions, progress=False, max_new_tokens=max_new_tokens)
    answers = evaluate(study.model, study.processor, study.data, plan, **limits)
    part = file.with_suffix(".part")
    answers.to_csv(part, index=False)
    part.replace(file)
    for checkpoint in output.glob("checkpoint-*"):  # the finished model stands beside them
        shutil.rmtree(checkpoint)
    return answers


_TEXT = {"question": str, "answer": str, "prediction": str}


def costs(
    schemes: Mapping[str, Scheme],
    config: TrainConfig,
    model: str | Path,
    rounds: int = 5,
    progress: bool = True,
    batches: int = 2,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the schemes cost relative to no compression, and the steps that this is summed from.

    The first table has one row per scheme: time and flops (1 for no compression) of instruction tuning, each the mean
    over its stages by their shares; where the runs are aligned, too, align, the time of projector alignment relative to
    that on all tokens, recipe, that of both together, and align_share, the share of alignment in the recipe without
    compression. The second is ``bench.step_times`` of all plans of tuning,
    timed in turn on the same ``batches``, as training has them, so that the noise of the machine cancels. model: a
    trained one of them.
    """
    setup = build.prepare(neutral(config))
    trained, processor, _ = open_model(model)
    collate = Collator(processor, config.max_length)
    data = build.open_data(config, setup.data, setup.images, collate, progress)
    seen = _batches(data, collate, config.batch_size, config.seed, batches)
    stages = [stage for scheme in schemes.values() for stage in scheme.stages]
    steps = bench.step_times(trained, seen, stages, rounds, progress=progress, config=config)
    by_plan = steps.set_index("plan")
    rows = []
    for name, scheme in schemes.items():
        share = pd.Series([stage.share for stage in scheme.stages], list(map(str, scheme.stages)))
        mean = (
            by_plan.loc[share.index, ["ratio", "flops_ratio"]].mul(share.to_numpy(), axis=0)
        ).sum()
        rows.append(dict(scheme=name, time=mean.ratio, flops=mean.flops_ratio))
    table = pd.DataFrame(rows).set_index("scheme")
    if config.aligns:
        captions = build.open_data(config, *build.align_data(config), collate, progress)
        seen = _batches(
            captions, collate, config.align_batch_size or config.batch_size, config.seed, batches
        )
        chosen = {name: config.align_stage(scheme) for name, scheme in schemes.items()}
        aligning = bench.step_times(
            trained, seen, list(chosen.values()), rounds, "align", progress, config
        )
        of_plan = aligning.set_index("plan")
        table["align"] = [stage.share * of_plan.ratio[str(stage)] for stage in chosen.values()]
        align = (
            build.count_steps(config, "align", *build.align_data(config)) * of_plan.seconds["none"]
        )
        tuning = setup.total_steps * by_plan.seconds["none"]
        table["recipe"] = (align * table["align"] + tuning * table.time) / (align + tuning)
        table["align_share"] = align / (align + tuning)
    return table, steps


def _batches(data: LlavaData, collate: Collator, size: int, seed: int, count: int) -> list[dict]:
    """The first ``count`` batches of ``data`` as training has them."""
    order = list(GroupedSampler(data.lengths, data.medium, size, seed))
    parts = [[order[i % len(order)] for i in range(k * size, (k + 1) * size)] for k in range(count)]
    return [collate([data[i] for i in part]) for part in parts]


def accuracies(answers: pd.DataFrame) -> pd.DataFrame:
    """Accuracy per scheme, seed and question type ("overall" among them); answers: from ``compare``."""
    groups = with_overall(answers).groupby(["scheme", "seed", "type"], sort=False)
    return groups.correct.mean().rename("accuracy").reset_index()


def table(
    runs: pd.DataFrame, cost: pd.DataFrame | None = None, kind: str = "overall"
) -> pd.DataFrame:
    """Per scheme: accuracy, its difference to the baseline's, and their 95% intervals; beside it ``cost``.

    runs: from ``accuracies``, at least two seeds. Intervals are Student's t over seeds; differences are paired by seed,
    as two runs of one seed share their initial weights and the order of their data.
    """
    wide = runs.query("type == @kind").pivot(index="seed", columns="scheme", values="accuracy")
    return _against_baseline(wide[list(dict.fromkeys(runs.scheme))], mean_interval, cost)


def table_of_one_seed(answers: pd.DataFrame, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """As ``table``, from the answers of a single seed: intervals are bootstrapped over the questions, paired."""
    wide = answers.assign(number=answers.groupby("scheme").cumcount())
    wide = wide.pivot(index="number", columns="scheme", values="correct").astype(float)
    return _against_baseline(wide[list(dict.fromkeys(answers.scheme))], interval, cost)


def _against_baseline(wide: pd.DataFrame, interval_of, cost: pd.DataFrame | None) -> pd.DataFrame:
    rows = {}
    for name in wide:
        values = wide[name].dropna()  # a scheme may have fewer seeds than others
        low, high = interval_of(values)
        rows[name] = dict(accuracy=values.mean(), low=low, high=high)
        rows[name] |= paired_difference(wide[name], wide[BASELINE], interval_of)
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis("scheme")
    return result if cost is None else result.join(cost)


def paired(
    runs: pd.DataFrame, first: str, second: str, value: str = "accuracy"
) -> tuple[float, float, float]:
    """Mean over seeds of ``first`` less ``second``, paired by seed, and its 95% interval.

    runs: a row per scheme and seed, such as one type of ``accuracies``, or ``roughness``.
    """
    wide = runs.pivot(index="seed", columns="scheme", values=value)
    return tuple(paired_difference(wide[first], wide[second], mean_interval).values())


def curves(seeds: Mapping[str, Sequence[int]], config: TrainConfig) -> pd.DataFrame:
    """The rows of every run's metrics.jsonl (step, stage, plan, loss, grad_norm, ...), by scheme and seed."""
    frames = []
    for name, numbers in seeds.items():
        for seed in numbers:
            rows = read_metrics(Path(config.output) / f"{seed}" / name / "metrics.jsonl")
            frames.append(pd.DataFrame(rows).assign(scheme=name, seed=seed))
    return pd.concat(frames, ignore_index=True)


def roughness(curves: pd.DataFrame) -> pd.DataFrame:
    """How unsteadily each run trained: one row per scheme and seed.

    loss: the standard deviation of the change of the logged loss from one log to the next, nats per token, within
    stages (the jump between two stages is no unrest). grad_norm: the mean gradient norm before clipping.
    """
    steps = curves.sort_values(["scheme", "seed", "step"])
    change = steps.groupby(["scheme", "seed", "stage"], sort=False).loss.diff()
    return (
        steps.assign(change=change)
        .groupby(["scheme", "seed"], sort=False)
        .agg(loss=("change", "std"), grad_norm=("grad_norm", "mean"))
        .reset_index()
    )


def seed_lists(seeds: int | Mapping[str, int], schemes: Iterable[str]) -> dict[str, list[int]]:
    """0, 1, ... of so many ``seeds`` for each of ``schemes``; a mapping gives some of them a number of their own.

    The baseline has as many as any, because every other scheme is compared with it seed by seed.
    """
    given = dict(seeds) if isinstance(seeds, Mapping) else {}
    counts = {name: given.get(name, 1) if given else seeds for name in schemes}
    unknown = given.keys() - counts.keys()
    if unknown or any(
        isinstance(count, bool) or not isinstance(count, int) or count < 1
        for count in counts.values()
    ):
        raise CompareError(
            f"seeds must be a whole number of at least 1, or one for each scheme, not {seeds!r}"
        )
    if BASELINE in counts:
        counts[BASELINE] = max(counts.values())
    return {name: list(range(count)) for name, count in counts.items()}


def record(
    folder: Path,
    runs: pd.DataFrame,
    cost: pd.DataFrame,
    steps: pd.DataFrame,
    curves: pd.DataFrame,
    answers: pd.DataFrame | None = None,
    **stamp,
) -> None:
    """Write a comparison's figures to ``folder`` as CSV: what ``papers/claims.py`` is made from.

    answers: from ``compare``; of a single seed, whose intervals are over questions, each question's result is saved.
    stamp: of ``records.write``: data, threads, command.
    """
    write = partial(records.write, **stamp)
    write(runs, folder / "compare-runs.csv", index=False, float_format="%.6f")
    write(cost, folder / "compare-costs.csv")
    write(steps, folder / "compare-steps.csv", index=False)
    if answers is not None and runs.seed.nunique() == 1:
        numbered = answers.assign(
            question=answers.groupby("scheme").cumcount(), correct=answers.correct.astype(int)
        )
        wide = numbered.pivot(index=["question", "type"], columns="scheme", values="correct")
        write(wide[list(dict.fromkeys(answers.scheme))], folder / "compare-correct.csv")
    columns = ["scheme", "seed", "step", "stage", "plan", "loss", "grad_norm"]
    write(curves[columns], folder / "compare-curves.csv", index=False)


def headline(table: pd.DataFrame, seeds: Mapping[str, Sequence[int]]) -> str:
    """The comparison in words: what each scheme saves and what it changes.

    A loss or gain is one where the whole interval says so, and of one seed none is settled.
    """
    lines = ["Against training without compression:"]
    for name, row in table.drop(index=BASELINE).iterrows():
        low, high, count = row.difference_low, row.difference_high, len(seeds[name])
        open_text = f"not settled, at most {100 * max(-low, 0):.1f} points lost"
        verdict = "a loss" if high < 0 else "a gain" if low > 0 else open_text
        verdict = (
            f"not settled by one seed ({verdict} over its questions)" if count == 1 else verdict
        )
        lines.append(
            f"- `{name}` ({count} seed{'s' if count > 1 else ''}): {1 - row.time:.0%} less tuning time, "
            f"accuracy {points(row.difference)} points ({points(low)} to {points(high)}): {verdict}"
        )
    return "\n".join(lines)
