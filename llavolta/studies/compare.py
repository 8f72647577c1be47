"""Compare training schemes: same seeds, data order and number of steps, then the same questions.

``compare`` trains and asks, ``costs`` measures the training cost, ``table`` summarises both.
Every run is a run folder of ``llavolta.train``. Finished runs and saved answers are used again, so
an interrupted comparison continues where it stopped.
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
from llavolta.errors import ConfigError
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

BASELINE = "single-stage"  # training without compression
CONTROLS = CONTROL_SCHEMES


def contestants(
    names: Sequence[str], own: Mapping[str, Sequence], num_layers: int
) -> dict[str, Scheme]:
    """Collect the schemes to compare, the baseline first.

    Args:
        names: Names of schemes.SCHEMES. These are scaled to the model's depth.
        own: Further schemes by name. Each is a list of plans, which share the steps equally, or a
            list of {plan, share}. These are not scaled.
        num_layers: Decoder layers of the model.

    Returns:
        The schemes by name.

    Raises:
        ConfigError: An unknown name, or a name in ``own`` that exists already.
        ConfigError: Stages that form no scheme.
        PlanError: A plan that cannot be read, or names a layer that the model does not have.
    """
    unknown = [name for name in names if name not in SCHEMES]
    if unknown:
        raise ConfigError(
            f"unknown scheme {', '.join(map(repr, unknown))}; choose from {', '.join(SCHEMES)}"
        )
    chosen = {name: SCHEMES[name].scaled(num_layers) for name in dict.fromkeys([BASELINE, *names])}
    for name, stages in own.items():
        if name in SCHEMES:
            raise ConfigError(f"a scheme of your own cannot be called {name!r}; that one exists")
        chosen[name] = scheme = Scheme.of(name, stages)
        # Named schemes fit by scaling, while these may name layers that do not exist.
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
    """Train every scheme with its seeds, and ask each model the same held-out questions.

    Projector alignment runs once for each seed and way of aligning, in a folder of its own.

    Args:
        schemes: Schemes by name; see ``contestants``.
        seeds: Seeds by scheme; see ``seed_lists``.
        config: The configuration that the runs share. Each run is written to
            ``<output>/<seed>/<scheme>``.
        heldout: LLaVA JSON with the questions; None: the held-out file of the generated data that
            is trained on.
        questions: Number of questions to ask, from the first.
        workers: Runs at a time. Several run in processes of their own, with equal shares of the
            CPU cores.
        progress: Show a progress bar.
        plans: By scheme, the plan in force while answering; default: "none".
        changes: By scheme, parameters of the configuration that differ, such as
            ``{"projector": "stf:2"}`` or ``{"max_steps": 83, "align_steps": 99}``.
        max_new_tokens: See ``evaluation.evaluate``.

    Returns:
        One row per scheme, seed and question. Columns are those of ``evaluation.evaluate``, and
        scheme and seed. Images are padded as in training.

    Raises:
        ConfigError: ``workers`` is no whole number of at least 1, or a worker process was killed.
            Errors of ``train`` and ``evaluate`` are raised at once. Finished runs stay.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers must be a whole number of at least 1, not {workers!r}")
    setup = build.prepare(neutral(config))  # builds the data once, before the workers need it
    heldout = Path(heldout) if heldout else build.heldout_file(config)
    LlavaData(heldout)  # raises for unusable questions before anything is trained
    root, plans, changes = Path(config.output), plans or {}, changes or {}
    aligned, runs = {}, {}
    # Seed by seed, the baseline first: after an interruption the finished runs are comparable.
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
            # The folder is named by the projector, the scheme's plan of alignment and its steps.
            kind = "" if own.projector == OWN else "-" + own.projector.replace(":", "-")
            align = schemes[name].align
            if align is not None:
                of = "" if align.share == 1 else f" {align.share:g} of the steps"
                kind += "-" + re.sub(r"[^\w.]+", "-", f"{align}{of}")
            if own.align_steps != config.align_steps:
                kind += f"-{own.align_steps}-steps"
            if others := {k: v for k, v in change.items() if k not in ("max_steps", "align_steps")}:
                # Such as another precision, in which alignment is another one as well.
                kind += "-" + re.sub(r"[^\w.]+", "-", str(sorted(others.items()))).strip("-")
            first = root / f"{seed}" / f"{build.ALIGN}{kind}"
            # Alignment ignores the stages. Neutral ones let schemes share an alignment run.
            stages = (
                ["none"]
                if align is None
                else replace(Scheme.equal("any", "none"), align=align).written
            )
            aligned[first] = own.changed(output=str(first), stage=0, plan=None, scheme=stages)
            # The run starts from the aligned model, so it must not align again.
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
    """Return ``config`` with a scheme of one stage, which fits any number of steps."""
    return config.changed(scheme=["none"], stage=None, plan=None)


def _begin_worker(threads: int) -> None:
    """Set up a worker process: its number of threads, and its end when the parent process ends.

    A worker that outlives the parent would write into the folders of the next comparison.
    """
    torch.set_num_threads(threads)

    # os._exit ends the process at once, also within a training step.
    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_pool(
    pool, aligned: dict, runs: dict, heldout: Path, questions: int, plans, max_new_tokens, progress
) -> dict:
    """The answers of every run, by scheme and seed. After a failure no further run starts."""
    frames = {}
    with tqdm(total=len(aligned) + len(runs), desc="runs", disable=not progress) as bar:
        try:
            for done in as_completed(
                [pool.submit(train, config, False) for config in aligned.values()]
            ):
                done.result()
                bar.update()
            # Runs start from aligned models, so alignment must be finished by now.
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
                raise ConfigError(
                    "a run was killed, perhaps for want of memory; lower workers and go on"
                ) from None
            raise
    return frames


def _run(
    config: TrainConfig, heldout: Path, questions: int, plan: str, max_new_tokens: int | None = None
) -> pd.DataFrame:
    """Train one run and answer the questions, unless its folder has the model or the answers."""
    output = Path(config.output)
    # Raises if the folder belongs to another run; returns at once if the run is finished.
    train(config, progress=False)
    data = LlavaData(heldout)
    asked = asked_digest(data, list(islice(data.questions(), questions)))
    # The file's name is a digest of all that the answers depend on, besides the model.
    depends = repr([plan, max_new_tokens, config.pad_to_square]).encode()
    file = output / f"answers-{hashlib.blake2b(depends + asked, digest_size=6).hexdigest()}.csv"
    if file.exists():
        return pd.read_csv(file, dtype=_TEXT, keep_default_na=False)
    study = open_study(output, heldout, pad_to_square=config.pad_to_square)
    limits = dict(limit=questions, progress=False, max_new_tokens=max_new_tokens)
    answers = evaluate(study.model, study.processor, study.data, plan, **limits)
    part = file.with_suffix(".part")  # renamed when complete, so that no partial file is read
    answers.to_csv(part, index=False)
    part.replace(file)
    for checkpoint in output.glob("checkpoint-*"):  # the folder has the finished model as well
        shutil.rmtree(checkpoint)
    return answers


# An answer such as "7" must stay text when it is read from the CSV.
_TEXT = {"question": str, "answer": str, "prediction": str}


def costs(
    schemes: Mapping[str, Scheme],
    config: TrainConfig,
    model: str | Path,
    rounds: int = 5,
    progress: bool = True,
    batches: int = 2,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure what the schemes cost relative to no compression.

    All plans are timed in turn on the same batches, so that the noise of the machine cancels.

    Args:
        schemes: Schemes by name.
        config: The configuration that the runs share.
        model: A trained model of the comparison, on which steps are timed.
        rounds: Measurements of each plan.
        progress: Show a progress bar.
        batches: Number of batches, from the first of training.

    Returns:
        Two tables. The first has one row per scheme. Its columns time and flops are those of
        instruction tuning, the mean over the stages weighted by their shares; 1 is no compression.
        If the runs align the projector, it has three more columns. align: the time of alignment
        relative to alignment without compression. recipe: the time of both phases relative to no
        compression. align_share: the share of alignment in the time of the recipe without
        compression. The second table is ``bench.step_times`` of all stages of tuning.

    Raises:
        ConfigError: The model or the configuration cannot be used.
        DataError: The data cannot be read.
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
        # A stage may occur several times, as in shuffled schemes; loc repeats its row.
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
        # Seconds of both phases without compression, the weights of the recipe's mean.
        align = (
            build.count_steps(config, "align", *build.align_data(config)) * of_plan.seconds["none"]
        )
        tuning = setup.total_steps * by_plan.seconds["none"]
        table["recipe"] = (align * table["align"] + tuning * table.time) / (align + tuning)
        table["align_share"] = align / (align + tuning)
    return table, steps


def _batches(data: LlavaData, collate: Collator, size: int, seed: int, count: int) -> list[dict]:
    """The first ``count`` batches of ``data`` in the order of training."""
    order = list(GroupedSampler(data.lengths, data.medium, size, seed))
    # Small data sets start again from the first example.
    parts = [[order[i % len(order)] for i in range(k * size, (k + 1) * size)] for k in range(count)]
    return [collate([data[i] for i in part]) for part in parts]


def accuracies(answers: pd.DataFrame) -> pd.DataFrame:
    """Measure the accuracy per scheme, seed and question type.

    Args:
        answers: From ``compare``.

    Returns:
        One row each: scheme, seed, type ("overall" among them), accuracy.
    """
    groups = with_overall(answers).groupby(["scheme", "seed", "type"], sort=False)
    return groups.correct.mean().rename("accuracy").reset_index()


def table(
    runs: pd.DataFrame, cost: pd.DataFrame | None = None, kind: str = "overall"
) -> pd.DataFrame:
    """Summarise runs of several seeds: accuracy and its difference to the baseline's.

    The 95% intervals are Student's t over seeds. Differences are paired by seed, because two runs
    of one seed share their initial weights and the order of their data.

    Args:
        runs: From ``accuracies``, of at least two seeds per scheme.
        cost: The first table of ``costs``, whose columns are appended.
        kind: The question type.

    Returns:
        One row per scheme: accuracy, low, high, difference, difference_low, difference_high, and
        the columns of ``cost``.

    Raises:
        ConfigError: A scheme has fewer than two seeds.
    """
    wide = runs.query("type == @kind").pivot(index="seed", columns="scheme", values="accuracy")
    return _against_baseline(wide[list(dict.fromkeys(runs.scheme))], mean_interval, cost)


def table_of_one_seed(answers: pd.DataFrame, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Summarise runs of one seed, as ``table`` does for several.

    The 95% intervals are bootstrapped over the questions. Differences are paired by question.

    Args:
        answers: From ``compare``, of one seed.
        cost: The first table of ``costs``, whose columns are appended.

    Returns:
        One row per scheme, with the columns of ``table``.
    """
    wide = answers.assign(number=answers.groupby("scheme").cumcount())
    wide = wide.pivot(index="number", columns="scheme", values="correct").astype(float)
    return _against_baseline(wide[list(dict.fromkeys(answers.scheme))], interval, cost)


def _against_baseline(wide: pd.DataFrame, interval_of, cost: pd.DataFrame | None) -> pd.DataFrame:
    """One row per scheme from ``wide``: a row per seed or question, a column per scheme."""
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
    """Compare two schemes by one value, paired by seed.

    Args:
        runs: One row per scheme and seed, such as one type of ``accuracies``, or ``roughness``.
        first: A scheme of ``runs``.
        second: The scheme whose value is subtracted.
        value: The column to compare.

    Returns:
        The mean difference over seeds, and the ends of its 95% interval.

    Raises:
        ConfigError: The two schemes have fewer than two seeds in common.
    """
    wide = runs.pivot(index="seed", columns="scheme", values=value)
    return tuple(paired_difference(wide[first], wide[second], mean_interval).values())


def curves(seeds: Mapping[str, Sequence[int]], config: TrainConfig) -> pd.DataFrame:
    """Read the training logs of every run.

    Args:
        seeds: Seeds by scheme.
        config: The configuration that the runs share.

    Returns:
        The rows of every metrics.jsonl (step, stage, plan, loss, grad_norm, ...), and scheme and
        seed.
    """
    frames = []
    for name, numbers in seeds.items():
        for seed in numbers:
            rows = read_metrics(Path(config.output) / f"{seed}" / name / "metrics.jsonl")
            frames.append(pd.DataFrame(rows).assign(scheme=name, seed=seed))
    return pd.concat(frames, ignore_index=True)


def roughness(curves: pd.DataFrame) -> pd.DataFrame:
    """Measure how unsteady the training of each run was.

    Args:
        curves: From ``curves``.

    Returns:
        One row per scheme and seed. loss: the standard deviation of the change of the logged loss
        from one log line to the next, in nats per token. Changes between two stages do not count.
        grad_norm: the mean gradient norm before clipping.
    """
    # Without the first log line of each stage, whose change is NaN and does not count.
    steps = curves.sort_values(["scheme", "seed", "step"])
    change = steps.groupby(["scheme", "seed", "stage"], sort=False).loss.diff()
    return (
        steps.assign(change=change)
        .groupby(["scheme", "seed"], sort=False)
        .agg(loss=("change", "std"), grad_norm=("grad_norm", "mean"))
        .reset_index()
    )


def seed_lists(seeds: int | Mapping[str, int], schemes: Iterable[str]) -> dict[str, list[int]]:
    """List the seeds of each scheme, counted from 0.

    The baseline gets as many seeds as the scheme with most, because every scheme is compared with
    it seed by seed.

    Args:
        seeds: Number of seeds of every scheme; or numbers by scheme, where the others have one.
        schemes: Names of the schemes.

    Returns:
        The seeds by scheme.

    Raises:
        ConfigError: A number below 1, or a scheme in ``seeds`` that is not compared.
    """
    given = dict(seeds) if isinstance(seeds, Mapping) else {}
    counts = {name: given.get(name, 1) if given else seeds for name in schemes}
    unknown = given.keys() - counts.keys()
    if unknown or any(
        isinstance(count, bool) or not isinstance(count, int) or count < 1
        for count in counts.values()
    ):
        raise ConfigError(
            f"seeds must be a whole number of at least 1, or one for each scheme, not {seeds!r}"
        )
    if BASELINE in counts:  # every seed of another scheme needs its pair
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
    """Write the figures of a comparison as CSV, which papers/claims.py reads.

    Args:
        folder: The folder of the files ``compare-*.csv``.
        runs: From ``accuracies``.
        cost: The first table of ``costs``.
        steps: The second table of ``costs``.
        curves: From ``curves``.
        answers: From ``compare``. If ``runs`` has one seed, the result of each question is saved,
            because intervals are then over questions.
        stamp: Options of ``records.write``: data, threads, command.
    """
    write = partial(records.write, **stamp)
    write(runs, folder / "compare-runs.csv", index=False, float_format="%.6f")
    write(cost, folder / "compare-costs.csv")
    write(steps, folder / "compare-steps.csv", index=False)
    if answers is not None and runs.seed.nunique() == 1:
        numbered = answers.assign(
            question=answers.groupby("scheme").cumcount(), correct=answers.correct.astype(int)
        )
        # One row per question, one column per scheme, in the order of ``answers``.
        wide = numbered.pivot(index=["question", "type"], columns="scheme", values="correct")
        write(wide[list(dict.fromkeys(answers.scheme))], folder / "compare-correct.csv")
    columns = ["scheme", "seed", "step", "stage", "plan", "loss", "grad_norm"]
    write(curves[columns], folder / "compare-curves.csv", index=False)


def headline(table: pd.DataFrame, seeds: Mapping[str, Sequence[int]]) -> str:
    """Summarise a comparison in Markdown: the time that each scheme saves, and its accuracy.

    A difference counts as a loss or a gain only if its whole interval does. One seed settles
    nothing.

    Args:
        table: From ``table`` or ``table_of_one_seed``, with ``cost``.
        seeds: Seeds by scheme.

    Returns:
        One line per scheme other than the baseline.
    """
    lines = ["Against training without compression:"]
    for name, row in table.drop(index=BASELINE).iterrows():
        low, high, count = row.difference_low, row.difference_high, len(seeds[name])
        open_text = f"not settled, at most {100 * max(-low, 0):.1f} points lost"
        # A loss or gain needs an interval that does not contain 0.
        verdict = "a loss" if high < 0 else "a gain" if low > 0 else open_text
        verdict = (
            f"not settled by one seed ({verdict} over its questions)" if count == 1 else verdict
        )
        lines.append(
            f"- `{name}` ({count} seed{'s' if count > 1 else ''}): "
            f"{1 - row.time:.0%} less tuning time, accuracy {points(row.difference)} points "
            f"({points(low)} to {points(high)}): {verdict}"
        )
    return "\n".join(lines)
