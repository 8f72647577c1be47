"""Make the papers' tables from lmms-eval's result files: benchmarks, average, training time and CR.

A value that was not measured is NaN, and shown as "not run".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import yaml

from llavolta.errors import DataError
from llavolta.harness.run import read_results
from llavolta.paths import PUBLISHED, given_path
from llavolta.train.trainer import read_metrics

# By column: lmms-eval's task, its metric, and the factor that makes it percent. MME's perception
# score is at most 2000.
IMAGE = {
    "GQA": ("gqa", "exact_match", 100),
    "MM-Vet": ("mmvet", "gpt_eval_score", 1),
    "SQA-I": ("scienceqa_img", "exact_match", 100),
    "MME": ("mme", "mme_perception_score", 0.05),
    "TextVQA": ("textvqa_val", "exact_match", 100),
    "POPE": ("pope", "pope_f1_score", 100),
    "MMBench": ("mmbench_en_dev_static", "gpt_eval_score", 1),
    "MMBench-CN": ("mmbench_cn_dev", "gpt_eval_score", 1),
    "VQAv2": ("vqav2_val", "exact_match", 100),
    "LLaVA-W": ("llava_in_the_wild", "gpt_eval_llava_all", 1),
    "VizWiz": ("vizwiz_vqa_val", "exact_match", 100),
    "SEED-I": ("seedbench", "seed_image", 100),
}
VIDEO = {
    "MSVD-QA": ("msvd_qa", "exact_match", 100),
    "MSRVTT-QA": ("msrvtt_qa", "exact_match", 100),
    "ActivityNet-QA": ("activitynetqa", "gpt_eval_accuracy", 1),
}
DIGITS = {
    "digits as GQA": ("gqa_digits", "exact_match", 100),
    "digits as VQAv2": ("vqav2_digits", "exact_match", 100),
    "digits as POPE": ("pope_digits", "pope_f1_score", 100),
}
COLUMNS = IMAGE | VIDEO | DIGITS
AVERAGE, HOURS, RATIO = "average", "training hours", "CR"


def paper_table(
    runs: Mapping[str, Sequence[str | Path]], columns: Sequence[str] = tuple(COLUMNS)
) -> pd.DataFrame:
    """Make a table of benchmark scores.

    Args:
        runs: By name of the row, folders that ``python -m llavolta.harness run`` wrote.
        columns: Keys of COLUMNS.

    Returns:
        One row per name. Scores are in percent; NaN was not run. average is over the columns that
        every row has, so that rows are comparable. "training hours" and "CR" are read from the
        model's folder, if it is a run folder; else NaN.

    Raises:
        DataError: A folder does not exist, or the folders of a row are of different models or
            plans, or have a benchmark twice.
        ConfigError: A folder has no result file, or several.
    """
    rows = {
        name: _row(name, [given_path(folder) for folder in folders], columns)
        for name, folders in runs.items()
    }
    table = pd.DataFrame.from_dict(
        rows, orient="index", columns=[*columns, AVERAGE, HOURS, RATIO], dtype=float
    )
    # Not ``mean(axis=1)`` of all columns, which would average over other benchmarks in each row.
    common = [column for column in columns if len(table) and table[column].notna().all()]
    if common:
        table[AVERAGE] = table[common].mean(axis=1)
    return table


def _row(name: str, folders: list[Path], columns: Sequence[str]) -> dict:
    """The values of one row by column."""
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(
            f"{name}: no folder {', '.join(missing)}; run python -m llavolta.harness run first"
        )
    found = pd.concat([read_results(folder) for folder in folders])
    if len(kinds := found[["model", "plan"]].drop_duplicates()) > 1:
        raise DataError(
            f"{name} mixes {' and '.join(f'{m} under {p}' for m, p in kinds.to_numpy())}; "
            "a row is one"
        )
    values: dict[str, float] = {}
    for column in columns:
        task, metric, scale = COLUMNS[column]
        score = found[(found.task == task) & (found.metric == metric)].value.dropna()
        if len(score) > 1:
            raise DataError(f"{name} has {column} {len(score)} times; name one folder for it")
        values[column] = score.item() * scale if len(score) else math.nan
    return values | training(Path(found.model.iloc[0]))


def training(model: Path) -> dict[str, float]:
    """Read training time and compression ratio from a run folder.

    Args:
        model: The folder of a model.

    Returns:
        "training hours" and "CR"; NaN where the folder does not tell.
    """
    # ``seconds`` of a line is the time of one step, and holds since the line before.
    rows, steps, hours = read_metrics(model / "metrics.jsonl"), 0, 0.0
    for row in rows:
        hours += row["seconds"] * (row["step"] - steps) / 3600
        steps = row["step"]
    if not rows or not (model / "config.yaml").exists():
        return {HOURS: math.nan, RATIO: math.nan}
    stages = yaml.safe_load((model / "config.yaml").read_text())["resolved_stages"]
    by_plan = {row["plan"]: row["tokens_per_layer"] for row in rows}
    # Stages are not trained yet, or are so short that no line was logged in them.
    if set(by_plan) != {stage["plan"] for stage in stages}:
        return {HOURS: hours, RATIO: math.nan}
    used = sum(stage["share"] * sum(by_plan[stage["plan"]]) for stage in stages)
    whole = next((row["visual_tokens"] for row in rows if "visual_tokens" in row), math.nan)
    # Older logs lack visual_tokens. Then a plan that leaves layer 0 all tokens gives their number.
    for plan, tokens in by_plan.items():
        if math.isnan(whole) and not any(
            part.strip().startswith(("0:", "vision:")) for part in plan.split(";")
        ):
            whole = tokens[0]
    return {
        HOURS: hours,
        RATIO: whole * len(rows[0]["tokens_per_layer"]) / used if used else math.nan,
    }


def published() -> pd.DataFrame:
    """Read the paper's own rows: the average over its 13 image benchmarks, and training hours."""
    held = pd.read_csv(PUBLISHED).set_index(["claim", "quantity"]).value
    time = held["training time"]
    return pd.DataFrame(
        {
            AVERAGE: {
                "published: no compression": math.nan,
                "published: four stages": held["accuracy", "four-stage average over 13 benchmarks"],
            },
            HOURS: {
                "published: no compression": time["LLaVA-1.5-7B without compression"],
                "published: four stages": time["four-stage scheme"],
            },
        }
    ).astype(float)


def show(table: pd.DataFrame):
    """Style a table of ``paper_table`` for a notebook, with "not run" in place of NaN."""
    return table.style.format("{:.1f}", na_rep="not run").format(
        "{:.2f}", na_rep="", subset=[HOURS, RATIO]
    )


def runs_in(folder: str | Path) -> dict[str, list[Path]]:
    """Find all results below a folder.

    Args:
        folder: A folder that ``python -m llavolta.harness run`` wrote folders to.

    Returns:
        By "model, plan", the folders of results, as ``paper_table`` takes them.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(Path(folder).glob("*/**/*_results.json")):
        arguments = dict(
            part.split("=", 1)
            for part in json.loads(file.read_text())["config"]["model_args"].split(",")
        )
        # lmms-eval writes below the output folder of the run, which is the first part of the path.
        run = Path(folder) / file.relative_to(folder).parts[0]
        found.setdefault(
            f"{Path(arguments['pretrained']).name}, {arguments.get('plan', 'none')}", []
        ).append(run)
    return found
