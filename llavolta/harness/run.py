"""Run lmms-eval, raise an error when it fails, and read its result files.

lmms-eval itself may end without an error although a task failed, so the results are checked.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from llavolta.compression.plan import format_plan, parse_plan
from llavolta.errors import ConfigError
from llavolta.harness import JUDGED_TASKS
from llavolta.harness.video import require_judge

LOG = "lmms-eval.log"


def run(
    model: str,
    tasks: Sequence[str],
    output: str | Path,
    plan: str = "none",
    batch_size: int = 16,
    processes: int = 1,
    include: str | Path | None = None,
    limit: int | None = None,
    model_args: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Evaluate a model on tasks of lmms-eval.

    Args:
        model: A folder, a hub name, or a model that comes with the package.
        tasks: lmms-eval's names of the tasks.
        output: A new folder for the results. lmms-eval's output goes to lmms-eval.log there.
        plan: The plan in force while answering.
        batch_size: Questions in a batch.
        processes: Processes on this machine, each with a copy of the model.
        include: A folder of further task files.
        limit: Number of questions of each task, from the first; None: all.
        model_args: Further options "name=value" of the plugin; see ``plugin.Llavolta``.
        environment: Environment variables to set for lmms-eval.

    Returns:
        The results; see ``read_results``.

    Raises:
        ConfigError: The folder is not empty, lmms-eval failed, or answers or scores are missing.
        PlanError: The plan cannot be read.
        ConfigError: A task needs a judge, and the environment names none.
    """
    output, plan = Path(output), format_plan(parse_plan(plan))
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} holds something already; name another folder, or remove it")
    judged = [task for task in tasks if task in JUDGED_TASKS]
    if judged:
        require_judge(", ".join(judged))
    output.mkdir(parents=True, exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable,
        *(launch if processes > 1 else []),
        "-m",
        "lmms_eval",
        "--model",
        "llavolta",
    ]
    command += ["--model_args", ",".join([f"pretrained={model}", f"plan={plan}", *model_args])]
    command += [
        "--tasks",
        ",".join(tasks),
        "--batch_size",
        str(batch_size),
        "--output_path",
        str(output),
    ]
    # At any other verbosity, lmms-eval exits with 0 after a failure.
    command += ["--log_samples", "--verbosity", "DEBUG"]
    command += ["--include_path", str(include)] if include else []
    command += ["--limit", str(limit)] if limit else []
    # Some tasks read this variable and fail without it. The user's own value comes first.
    home = {"HF_HOME": str(Path.home() / ".cache/huggingface")}
    with (output / LOG).open("w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        code = subprocess.run(
            command, env=home | os.environ | (environment or {}), **options
        ).returncode
    if code:
        raise ConfigError(
            f"lmms-eval failed with exit code {code}: {_cause(output)}; see {output / LOG}"
        )
    check_results(output, tasks)
    return read_results(output)


def _cause(output: Path) -> str:
    """The exceptions of the tracebacks in the log."""
    lines = (output / LOG).read_text(errors="replace").splitlines()
    # "[rank0]: " of torchrun, then an exception such as ValueError or UnsupportedModel.
    raised = [
        found[1]
        for line in lines
        if (found := re.match(r"(?:\[rank\d+\]: )?([\w.]+(?:Error|Model): .*)", line))
    ]
    return " | ".join(dict.fromkeys(raised)) or "it gave no reason"


def check_results(output: str | Path, tasks: Sequence[str]) -> None:
    """Check that every task has all its answers, and its scores or a submission file.

    Args:
        output: The folder of the results.
        tasks: Names of the tasks.

    Raises:
        ConfigError: Something is missing.
    """
    results = _results(Path(output))
    for task in tasks:
        parts = results["group_subtasks"].get(task) or [task]
        for part in parts:  # a group of tasks has no samples of its own
            scores = _scores(results, part)
            wanted = results["n-samples"].get(part, {}).get("effective", 0)
            answered = len(read_samples(output, part))
            if not wanted or answered != wanted:
                raise ConfigError(
                    f"{part}: {answered} answers to {wanted} questions; see {Path(output) / LOG}"
                )
            submitted = "submission" in scores and any((Path(output) / "submissions").glob("*"))
            numbers = {name: value for name, value in scores.items() if name != "submission"}
            # A judge that failed leaves no number, or NaN.
            bad = [name for name, value in numbers.items() if not _is_score(value)]
            if bad or not (numbers or submitted):
                raise ConfigError(f"{part}: no score {', '.join(bad)}; see {Path(output) / LOG}")


def _is_score(value) -> bool:
    """Whether a metric is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _results(output: Path) -> dict:
    """The content of the one result file in a folder."""
    files = sorted(output.glob("**/*_results.json"))
    # Submission files may end the same way.
    files = [file for file in files if "submissions" not in file.parts]
    if len(files) != 1:
        raise ConfigError(
            f"{output} holds {len(files)} result files of lmms-eval, not one; see its {LOG}"
        )
    return json.loads(files[0].read_text())


def _scores(results: dict, task: str) -> dict:
    """The metrics that ``task`` declares, by name."""
    declared = {
        entry["metric"] for entry in results["configs"].get(task, {}).get("metric_list", [])
    }
    # lmms-eval's keys are "metric,filter".
    named = {key.split(",")[0]: value for key, value in results["results"].get(task, {}).items()}
    return {name: value for name, value in named.items() if name in declared}


def read_results(output: str | Path) -> pd.DataFrame:
    """Read the results of a run.

    Args:
        output: The folder of the results.

    Returns:
        One row per task and metric: model, plan, task, metric, value (NaN for a submission file),
        questions (their number), seconds (of answering all tasks, in one process).

    Raises:
        ConfigError: The folder has no result file, or several.
    """
    results = _results(Path(output))
    # The model's options as they were given to lmms-eval.
    arguments = dict(part.split("=", 1) for part in results["config"]["model_args"].split(","))
    shared = {"model": arguments["pretrained"], "plan": arguments.get("plan", "none")}
    seconds = results.get("throughput", {}).get("total_elapsed_time", math.nan)
    rows = [
        {**shared, "task": task, "metric": metric, "value": value if _is_score(value) else math.nan}
        | {"questions": results["n-samples"][task]["effective"], "seconds": seconds}
        for task in results["n-samples"]
        for metric, value in _scores(results, task).items()
    ]
    return pd.DataFrame(rows)


def read_samples(output: str | Path, task: str) -> list[dict]:
    """Read the logged samples of a task.

    Args:
        output: The folder of the results.
        task: The task's name.

    Returns:
        One dictionary per question, in order: doc_id, filtered_resps (the answer), scores, ...
    """
    files = sorted(Path(output).glob(f"**/*_samples_{task}.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda sample: sample["doc_id"])
