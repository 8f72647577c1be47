"""Figures that pages are made from: a CSV, and beside it in stamps.yaml where its numbers come from."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import yaml
from filelock import FileLock

from llavolta.paths import ROOT

STAMPS = "stamps.yaml"
PACKAGES = ("torch", "transformers", "numpy")
FIELDS = ("commit", "date", "versions", "cpu", "threads", "dtype", "data", "command")


def write(
    table: pd.DataFrame,
    file: Path,
    *,
    data: Iterable[Path] = (),
    dtype: str = "float32",
    threads: int | None = None,
    command: str | None = None,
    **options,
) -> None:
    """Write ``table`` to the CSV ``file``, and its stamp to ``stamps.yaml`` in the same folder.

    Args:
        data: Files that were trained on or asked; the stamp has the digest of their bytes.
        dtype: Precision of the computation.
        threads: Of each process; None: of this one.
        command: None: the command line of this process.
        options: Of ``DataFrame.to_csv``; floats have 4 digits after the point unless they say otherwise.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, **({"float_format": "%.4f"} | options))
    stamp = dict(machine(), dtype=dtype, data=digest(data), command=command or _command())
    if threads is not None:
        stamp["threads"] = threads
    with FileLock(file.parent / f".{STAMPS}.lock"):
        stamps = read_stamps(file.parent) | {file.name: {name: stamp[name] for name in FIELDS}}
        text = yaml.safe_dump(dict(sorted(stamps.items())), sort_keys=False, width=100)
        (file.parent / STAMPS).write_text(text)


def write_answers(answers: pd.DataFrame, file: Path, by: Sequence[str], **options) -> None:
    """Write which questions were answered right, a row per ``by`` and question, to the gzipped CSV ``file``."""
    numbered = answers.assign(correct=answers.correct.astype(int))
    numbered["question"] = numbered.groupby([*by], sort=False).cumcount()
    packed = dict(
        compression={"method": "gzip", "mtime": 0}, index=False
    )  # the same bytes for the same answers
    write(numbered[[*by, "question", "type", "correct"]], file, **packed, **options)


def read_stamps(folder: Path) -> dict[str, dict]:
    """The stamps of ``folder`` by name of the CSV; empty where it has none."""
    file = folder / STAMPS
    return yaml.safe_load(file.read_text()) if file.exists() else {}


def machine() -> dict:
    """Commit, date, versions, CPU and threads of this process."""
    return dict(
        commit=commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        versions=f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        cpu=f"{processor()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
    )


def commit() -> str:
    """The commit of the checkout, and whether files differ from it; "not recorded" outside one."""
    try:
        run = dict(cwd=ROOT, check=True, capture_output=True, text=True)
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py", "*.yaml"], **run
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not recorded"
    return f"{head} with changes" if changed.strip() else head


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def digest(files: Iterable[Path]) -> str:
    """One digest of the bytes of ``files``; "none" where there are none."""
    found = hashlib.blake2b(digest_size=6)
    files = list(files)
    for file in files:
        found.update(Path(file).read_bytes())
    return found.hexdigest() if files else "none"


def _command() -> str:
    return " ".join(
        ["python", *(Path(part).name if os.path.isabs(part) else part for part in sys.argv)]
    )
