"""Measure the training time of each scheme, relative to training on all tokens.

``python papers/times.py`` measures once and appends to papers/benchmarks/step-times.csv, in about seven minutes on an
idle core. One measurement is one process. It times a training step under every plan of every recorded scheme, in a new
random order each round, on the same batches of the embedded model with untrained weights. Pages state the median and
the range of all measurements, so run it at three different times at least. With one thread, the default, seconds are of
CPU time, which equals wall-clock time on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pandas as pd
import torch

from llavolta.errors import UserError
from llavolta.paths import PAPERS, TINY_LLAVA
from llavolta.studies import compare, records
from llavolta.train import build
from llavolta.train.config import TrainConfig

FILE = PAPERS / "benchmarks" / "step-times.csv"
SOURCE = "papers/times.py"
COLUMNS = ["measurement", "source", "when", "commit", "threads", "cpu", "load"]
COLUMNS += ["scheme", "tuning", "align", "recipe", "flops"]
# How far a time may be below its FLOPs, and how far two measurements of one scheme may differ.
BELOW, APART = 0.03, 0.05


def measure(schemes: dict, config: TrainConfig, rounds: int) -> pd.DataFrame:
    """Measure once.

    Args:
        schemes: The schemes by name.
        config: The configuration of the runs.
        rounds: Times that each step is measured.

    Returns:
        One row per scheme: the time of tuning, of align and of both (recipe), and the flops of tuning, each relative to
        training on all tokens; and where and when this was measured.
    """
    load = os.getloadavg()[0]  # before the measurement itself adds to it
    cost, _ = compare.costs(schemes, config, TINY_LLAVA, rounds)
    table = cost.rename(columns={"time": "tuning"}).reset_index()
    here = records.machine()
    return table.assign(
        source=SOURCE, when=here["date"], commit=here["commit"], threads=here["threads"], cpu=here["cpu"], load=load
    )


def append(table: pd.DataFrame, file: Path = FILE) -> pd.DataFrame:
    """Append a measurement to a file.

    Args:
        table: From ``measure``.
        file: The CSV file, which is made if it does not exist.

    Returns:
        All measurements of the file, the new one last.
    """
    before = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    number = 1 if before.empty else int(before.measurement.max()) + 1
    new = table.assign(measurement=number)[COLUMNS]
    both = new if before.empty else pd.concat([before, new])
    records.write(both, file, index=False)
    return both


def recorded(file: Path = FILE) -> pd.DataFrame:
    """Read the measurements that pages state: those of this command, or all of the file if it has none."""
    table = pd.read_csv(file)
    ours = table[table.source == SOURCE]
    return table if ours.empty else ours


def summary(column: str, table: pd.DataFrame) -> pd.DataFrame:
    """Summarise measurements.

    Args:
        column: "tuning", "align" or "recipe".
        table: From ``recorded``.

    Returns:
        One row per scheme: median, least, most, and count (of measurements).
    """
    of = table.dropna(subset=column).groupby("scheme", sort=False)[column]
    return of.agg(median="median", least="min", most="max", count="count")


def faults(table: pd.DataFrame) -> list[str]:
    """Find times that are below their FLOPs, and measurements that disagree, among those of this command.

    Returns:
        One line per fault.
    """
    found, ours = [], table[table.source == SOURCE]
    for scheme, of in ours.groupby("scheme", sort=False):
        for row in of[of.tuning < of.flops - BELOW].itertuples():
            below = f"takes {row.tuning:.3f} of the time but {row.flops:.3f} of the FLOPs"
            found.append(f"measurement {row.measurement}: {scheme} {below}")
        if (apart := of.tuning.max() - of.tuning.min()) > APART:
            found.append(f"measurements of {scheme} differ by {100 * apart:.1f} points")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure and append. Returns the exit code: 1 after an error, which is printed on stderr."""
    import frontier  # imports this module

    parser = argparse.ArgumentParser(prog="python papers/times.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="as the comparisons train: one a run, two runs at a time"
    )
    options = parser.parse_args(arguments)
    try:
        torch.set_num_threads(options.threads)
        config = TrainConfig.from_preset("embedded", output=str(TINY_LLAVA))
        depth = build.prepare(compare.neutral(config)).num_layers
        table = measure(frontier.schemes(depth), config, options.rounds)
        append(table)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table[["scheme", "tuning", "align", "recipe", "flops"]].to_string(index=False, float_format="{:.3f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
