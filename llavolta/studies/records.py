"""Write measured figures as CSV, and their provenance to ``stamps.yaml`` beside them.

A stamp has the commit, date, versions, CPU, threads, precision, data and command. Pages in papers/
are made from these files.
"""

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
    """Write a table to a CSV file, and its stamp to ``stamps.yaml`` in the same folder.

    Args:
        table: The figures.
        file: The CSV file. Its folder is made if it does not exist.
        data: Files of the training data or questions. The stamp has the digest of their bytes.
        dtype: Precision of the computation.
        threads: Threads of each process; None: of this process.
        command: The command; None: the command line of this process.
        options: Options of ``DataFrame.to_csv``. By default floats have 4 digits after the point.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, **({"float_format": "%.4f"} | options))
    stamp = dict(machine(), dtype=dtype, data=digest(data), command=command or _command())
    if threads is not None:
        stamp["threads"] = threads
    # Several processes may add to one file of stamps.
    with FileLock(file.parent / f".{STAMPS}.lock"):
        stamps = read_stamps(file.parent) | {file.name: {name: stamp[name] for name in FIELDS}}
        text = yaml.safe_dump(dict(sorted(stamps.items())), sort_keys=False, width=100)
        (file.parent / STAMPS).write_text(text)


def write_answers(answers: pd.DataFrame, file: Path, by: Sequence[str], **options) -> None:
    """Write which questions were answered correctly, as a gzipped CSV.

    Args:
        answers: One row per question, with type, correct and the columns ``by``.
        file: The gzipped CSV file.
        by: Columns that tell runs apart. Questions are numbered from 0 in each.
        options: Options of ``write``: data, dtype, threads, command.
    """
    numbered = answers.assign(correct=answers.correct.astype(int))
    numbered["question"] = numbered.groupby([*by], sort=False).cumcount()
    # Without a time stamp the file has the same bytes for the same answers.
    packed = dict(compression={"method": "gzip", "mtime": 0}, index=False)
    write(numbered[[*by, "question", "type", "correct"]], file, **packed, **options)


def read_stamps(folder: Path) -> dict[str, dict]:
    """Read the stamps of a folder, by the name of the CSV file; empty if it has none."""
    file = folder / STAMPS
    return yaml.safe_load(file.read_text()) if file.exists() else {}


def machine() -> dict:
    """Return commit, date (UTC), versions, CPU and threads of this process."""
    return dict(
        commit=commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        versions=f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        cpu=f"{processor()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
    )


def commit() -> str:
    """Return the checkout's commit, and whether Python or YAML files differ from it.

    It is "not recorded" outside a checkout or without git.
    """
    try:
        run = dict(cwd=ROOT, check=True, capture_output=True, text=True)
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **run).stdout.strip()
        # Only these files change what is computed; the results themselves are CSV.
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py", "*.yaml"], **run
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not recorded"
    return f"{head} with changes" if changed.strip() else head


def processor() -> str:
    """Return the name of the CPU."""
    # platform.processor() gives only the architecture on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def digest(files: Iterable[Path]) -> str:
    """Compute one digest of the bytes of all ``files``; "none" without files."""
    found = hashlib.blake2b(digest_size=6)
    files = list(files)
    for file in files:
        found.update(Path(file).read_bytes())
    return found.hexdigest() if files else "none"


def _command() -> str:
    """The command line of this process."""
    # Without the folders of absolute paths, which differ between machines.
    return " ".join(
        ["python", *(Path(part).name if os.path.isabs(part) else part for part in sys.argv)]
    )
