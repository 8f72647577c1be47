"""Benchmarks through lmms-eval: run them, make tasks of MSVD-QA and MSRVTT-QA, evaluate the embedded model."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import datasets
import pandas as pd

from llavolta.errors import UserError
from llavolta.harness import TASKS
from llavolta.harness.local import DIGITS, HarnessError, write_digits
from llavolta.harness.run import read_samples, run
from llavolta.harness.video import CLIP_NAMES, prepare
from llavolta.paths import RUNS, given_path
from llavolta.studies.evaluation import evaluate
from llavolta.studies.opening import embedded_llava, open_study
from llavolta.train.checkpoints import RECORD
from llavolta.train.config import TrainConfig
from llavolta.train.run import train
from llavolta.train.schemes import scale_plan

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
STAGE_I = "2:avgpool:8"  # of a model of 32 layers


def embedded(
    model: str | None, output: Path, plans: list[str] | None, limit: int, batch_size: int = 64
) -> None:
    """Evaluate a model on the digits by lmms-eval and by ``llavolta.studies``; HarnessError unless all answers agree.

    plans: without, and the paper's "2:avgpool:8" scaled to the model's depth, unless given.
    """
    model = model or str(_trained())
    for old in (output / "tasks", output / "cache", *output.glob("plan-*")):
        shutil.rmtree(old, ignore_errors=True)
    datasets.disable_progress_bars()
    study = open_study(model)
    order = write_digits(output / "tasks", study.data, limit)
    plans = plans or ["none", scale_plan(STAGE_I, study.depth)]
    for number, plan in enumerate(plans):
        start, folder = time.perf_counter(), output / f"plan-{number}"
        cache = OFFLINE | {"LMMS_EVAL_DATASETS_CACHE": str(output / "cache")}
        table = run(
            model,
            list(DIGITS),
            folder,
            plan,
            batch_size,
            include=output / "tasks",
            environment=cache,
        )
        samples = pd.DataFrame([sample for task in DIGITS for sample in read_samples(folder, task)])
        own = evaluate(
            study.model, study.processor, study.data, plan, limit, batch_size, progress=False
        ).iloc[order]
        compare(samples, own)
        print(
            f"\nplan {plan}: {len(own)} answers agree with llavolta.studies, accuracy {own.correct.mean():.1%}"
        )
        print(
            table[["task", "metric", "value", "questions"]].to_string(
                index=False, float_format="{:.4f}".format
            )
        )
        print(f"{time.perf_counter() - start:.0f} s; result files in {folder}", flush=True)


def _trained() -> Path:
    """The embedded LLaVA where it is trained already, else one tuned for 60 steps: two scorers agree on any model."""
    if (RUNS / "single-stage" / RECORD).exists():
        return embedded_llava()
    print("training the embedded LLaVA for a short while; about 3 minutes on 2 cores", flush=True)
    return train(TrainConfig(output=str(RUNS / "eval-model"), scheme="heavy", max_steps=60))


def compare(samples: pd.DataFrame, own: pd.DataFrame) -> None:
    """Raise HarnessError unless the harness has the answers and verdicts of ``own``, question by question."""
    said, truth = samples.filtered_resps.map(_text), own.prediction.str.strip()
    differ = (said.to_numpy() != truth.to_numpy()).nonzero()[0]
    if len(differ):
        first = differ[0]
        raise HarnessError(
            f"{len(differ)} of {len(own)} answers differ from llavolta.studies; question {own.index[first]}: "
            f"{said.iloc[first]!r} by lmms-eval, {truth.iloc[first]!r} by us"
        )
    right = samples.apply(_verdict, axis=1).to_numpy()
    if (right != own.correct.to_numpy()).any():
        raise HarnessError(
            f"{(right != own.correct.to_numpy()).sum()} answers are scored differently by lmms-eval"
        )


def _text(answer) -> str:
    return (answer if isinstance(answer, str) else answer[0]).strip()


def _verdict(sample: pd.Series) -> bool:
    score = sample.get("exact_match")
    if not isinstance(score, (int, float)) or pd.isna(score):
        score = sample["pope_accuracy"]["score"]
    return score == 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llavolta.harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser(
        "run", help="tasks of lmms-eval with any checkpoint and plan; exits with 1 on failure"
    )
    runs.add_argument("--model", required=True, help="folder or hub name")
    runs.add_argument(
        "--tasks",
        required=True,
        help=f"lmms-eval's names, with commas between; the papers': {', '.join(TASKS)}",
    )
    runs.add_argument("--output", required=True, type=given_path, help="a new folder")
    runs.add_argument("--plan", default="none")
    runs.add_argument("--batch-size", type=int, default=16)
    runs.add_argument("--processes", type=int, default=1, help="on this machine, one a GPU")
    runs.add_argument("--include", type=given_path, help="a folder of further task files")
    runs.add_argument("--limit", type=int, help="the first so many questions a task")
    runs.add_argument(
        "--model-args",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="such as pad_to_square=true",
    )
    video = commands.add_parser(
        "video", help="make tasks of MSVD-QA or MSRVTT-QA from the published files"
    )
    video.add_argument("task", choices=list(CLIP_NAMES))
    video.add_argument(
        "questions", type=given_path, help="test_qa.json, or test_q.json with --answers"
    )
    video.add_argument("--answers", type=given_path, help="test_a.json")
    video.add_argument("--videos", type=given_path, required=True, help="folder of the clips")
    video.add_argument(
        "--output", type=given_path, required=True, help="folder for the task files, for --include"
    )
    local = commands.add_parser(
        "embedded", help="the embedded model on the digits, compared with llavolta.studies"
    )
    local.add_argument("--model", help="a trained folder instead of the embedded one")
    local.add_argument(
        "--output", type=given_path, default=RUNS / "eval", help="an earlier one there is replaced"
    )
    local.add_argument(
        "--plans", nargs="+", help=f"none, and {STAGE_I} scaled to the model's depth, unless given"
    )
    local.add_argument("--limit", type=int, default=600, help="the first so many of 1200 questions")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "run":
            table = run(**options | {"tasks": options["tasks"].split(",")})
            print(table.to_string(index=False))
        elif command == "video":
            folder = prepare(**options)
            print(f"task files in {folder}; run --tasks {options['task']} --include {folder}")
        else:
            embedded(**options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
