"""Run benchmarks with lmms-eval, make tasks of MSVD-QA and MSRVTT-QA, or test a model on digits."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import datasets
import pandas as pd

from llavolta.errors import ConfigError, UserError
from llavolta.harness import TASKS
from llavolta.harness.local import DIGITS, write_digits
from llavolta.harness.run import read_samples, run
from llavolta.harness.video import CLIP_NAMES, prepare
from llavolta.paths import RUNS, given_path
from llavolta.studies.evaluation import evaluate
from llavolta.studies.opening import embedded_llava, open_study
from llavolta.train.checkpoints import RECORD
from llavolta.train.config import TrainConfig
from llavolta.train.run import train
from llavolta.train.schemes import scale_plan

# The digits are local files, so that nothing needs the hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
STAGE_I = "2:avgpool:8"  # the paper's heaviest plan, for 32 decoder layers


def embedded(
    model: str | None, output: Path, plans: list[str] | None, limit: int, batch_size: int = 64
) -> None:
    """Evaluate a model on the digits questions by lmms-eval and by ``llavolta.studies``.

    Both must give the same answers and scores. This tests the plugin, tasks and result files.

    Args:
        model: The model; None: the embedded LLaVA, which is trained if necessary.
        output: The folder to write to. Tasks, caches and results of an earlier call are replaced.
        plans: The plans to evaluate under; None: "none", and STAGE_I scaled to the model's depth.
        limit: Number of questions, from the first.
        batch_size: Questions in a batch.

    Raises:
        ConfigError: Answers or scores differ, or lmms-eval failed.
    """
    model = model or str(_trained())
    for old in (output / "tasks", output / "cache", *output.glob("plan-*")):
        shutil.rmtree(old, ignore_errors=True)
    datasets.disable_progress_bars()  # the tables are small, and the bars would hide the figures
    study = open_study(model)
    order = write_digits(output / "tasks", study.data, limit)
    plans = plans or ["none", scale_plan(STAGE_I, study.depth)]
    for number, plan in enumerate(plans):
        start, folder = time.perf_counter(), output / f"plan-{number}"
        # A cache of its own, so that tasks of an earlier call are not read from it.
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
        # Tasks order the questions by type; ``order`` brings ours into the same order.
        own = evaluate(
            study.model, study.processor, study.data, plan, limit, batch_size, progress=False
        ).iloc[order]
        compare(samples, own)
        print(
            f"\nplan {plan}: {len(own)} answers agree with llavolta.studies, "
            f"accuracy {own.correct.mean():.1%}"
        )
        print(
            table[["task", "metric", "value", "questions"]].to_string(
                index=False, float_format="{:.4f}".format
            )
        )
        print(f"{time.perf_counter() - start:.0f} s; result files in {folder}", flush=True)


def _trained() -> Path:
    """The embedded LLaVA if it is trained already, else one that is trained for 60 steps.

    A short training does, because the scores of any model must agree.
    """
    if (RUNS / "single-stage" / RECORD).exists():
        return embedded_llava()
    print("training the embedded LLaVA for a short while; about 3 minutes on 2 cores", flush=True)
    return train(TrainConfig(output=str(RUNS / "eval-model"), scheme="heavy", max_steps=60))


def compare(samples: pd.DataFrame, own: pd.DataFrame) -> None:
    """Check that lmms-eval has the same answers and scores, question by question.

    Args:
        samples: The logged samples of lmms-eval; see ``run.read_samples``.
        own: Rows of ``evaluation.evaluate``, in the same order.

    Raises:
        ConfigError: An answer or a score differs.
    """
    said, truth = samples.filtered_resps.map(_text), own.prediction.str.strip()
    differ = (said.to_numpy() != truth.to_numpy()).nonzero()[0]
    if len(differ):
        first = differ[0]
        raise ConfigError(
            f"{len(differ)} of {len(own)} answers differ from llavolta.studies; "
            f"question {own.index[first]}: {said.iloc[first]!r} by lmms-eval, "
            f"{truth.iloc[first]!r} by us"
        )
    right = samples.apply(_verdict, axis=1).to_numpy()
    if (right != own.correct.to_numpy()).any():
        raise ConfigError(
            f"{(right != own.correct.to_numpy()).sum()} answers are scored differently by lmms-eval"
        )


def _text(answer) -> str:
    """The answer of a sample, which is text or a list of one."""
    return (answer if isinstance(answer, str) else answer[0]).strip()


def _verdict(sample: pd.Series) -> bool:
    """Whether lmms-eval scores a sample as correct."""
    # POPE has a score of its own form. Samples of all tasks share one table, hence the NaN.
    score = sample.get("exact_match")
    if not isinstance(score, (int, float)) or pd.isna(score):
        score = sample["pope_accuracy"]["score"]
    return score == 1


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        The exit code: 1 after an error, which is printed on stderr.
    """
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
