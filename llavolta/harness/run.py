"""Running lmms-eval so that a failure fails, and reading what it wrote."""

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
from llavolta.harness import JUDGED_TASKS
from llavolta.harness.local import HarnessError
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
    """Evaluate ``model`` under ``plan`` on ``tasks``; returns ``read_results`` of the new folder ``output``.

    include: a folder of further task files. limit: the first so many questions a task. model_args: further
    "name=value" for the plugin (see ``Llavolta``). processes: on this machine, each with a model of its own.
    The harness's output goes to ``output``/lmms-eval.log. Raises HarnessError, PlanError, JudgeError.
    """
    output, plan = Path(output), format_plan(parse_plan(plan))
    if output.exists() and any(output.iterdir()):
        raise HarnessError(f"{output} holds something already; name another folder, or remove it")
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
    command += [
        "--log_samples",
        "--verbosity",
        "DEBUG",
    ]  # at any other verbosity a failure exits with 0
    command += ["--include_path", str(include)] if include else []
    command += ["--limit", str(limit)] if limit else []
    home = {
        "HF_HOME": str(Path.home() / ".cache/huggingface")
    }  # some of its tasks cannot do without
    with (output / LOG).open("w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        code = subprocess.run(
            command, env=home | os.environ | (environment or {}), **options
        ).returncode
    if code:
        raise HarnessError(
            f"lmms-eval failed with exit code {code}: {_cause(output)}; see {output / LOG}"
        )
    check_results(output, tasks)
    return read_results(output)


def _cause(output: Path) -> str:
    """The exceptions that the log ends its tracebacks with."""
    lines = (output / LOG).read_text(errors="replace").splitlines()
    raised = [
        found[1]
        for line in lines
        if (found := re.match(r"(?:\[rank\d+\]: )?([\w.]+(?:Error|Model): .*)", line))
    ]
    return " | ".join(dict.fromkeys(raised)) or "it gave no reason"


def check_results(output: str | Path, tasks: Sequence[str]) -> None:
    """Raise HarnessError unless every task in ``output`` has all its answers and its scores, or a submission file."""
    results = _results(Path(output))
    for task in tasks:
        parts = results["group_subtasks"].get(task) or [task]
        for part in parts:
            scores = _scores(results, part)
            wanted = results["n-samples"].get(part, {}).get("effective", 0)
            answered = len(read_samples(output, part))
            if not wanted or answered != wanted:
                raise HarnessError(
                    f"{part}: {answered} answers to {wanted} questions; see {Path(output) / LOG}"
                )
            submitted = "submission" in scores and any((Path(output) / "submissions").glob("*"))
            numbers = {name: value for name, value in scores.items() if name != "submission"}
            bad = [name for name, value in numbers.items() if not _is_score(value)]
            if bad or not (numbers or submitted):
                raise HarnessError(f"{part}: no score {', '.join(bad)}; see {Path(output) / LOG}")


def _is_score(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _results(output: Path) -> dict:
    files = sorted(output.glob("**/*_results.json"))
    files = [file for file in files if "submissions" not in file.parts]
    if len(files) != 1:
        raise HarnessError(
            f"{output} holds {len(files)} result files of lmms-eval, not one; see its {LOG}"
        )
    return json.loads(files[0].read_text())


def _scores(results: dict, task: str) -> dict:
    """{metric: value} of the metrics that ``task`` declares, from lmms-eval's "metric,filter" entries."""
    declared = {
        entry["metric"] for entry in results["configs"].get(task, {}).get("metric_list", [])
    }
    named = {key.split(",")[0]: value for key, value in results["results"].get(task, {}).items()}
    return {name: value for name, value in named.items() if name in declared}


def read_results(output: str | Path) -> pd.DataFrame:
    """One row per task and metric of a run: model, plan, task, metric, value (none for a submission), questions,
    seconds (of answering, all tasks together, one process)."""
    results = _results(Path(output))
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
    """The logged samples of ``task`` in the order of its questions: doc_id, filtered_resps (the answer), scores."""
    files = sorted(Path(output).glob(f"**/*_samples_{task}.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda sample: sample["doc_id"])
