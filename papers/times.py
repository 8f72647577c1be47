"""What each scheme takes of the time of training on all tokens: ``python papers/times.py``
measures it once and appends the measurement to papers/benchmarks/step-times.csv.

One measurement is one process. It times a training step under every plan of every recorded scheme,
in a new random order each round, on the same batches of the embedded model, with untrained weights.
Pages state the median and the range over all measurements, so run it at three different times at
least; some seven minutes on an idle core. With one thread, the default, seconds are of CPU time,
which equal those of the clock on an idle machine.
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
BELOW, APART = 0.03, 0.05  # how far a time may undercut its FLOPs, and two measurements of one scheme may differ


def measure(schemes: dict, config: TrainConfig, rounds: int) -> pd.DataFrame:
    """One measurement: by scheme, the time of tuning, of alignment and of both (recipe), and the FLOPs
    of tuning, each relative to training on all tokens.
    """
    load = os.getloadavg()[0]
    cost, _ = compare.costs(schemes, config, TINY_LLAVA, rounds)
    table = cost.rename(columns={"time": "tuning"}).reset_index()
    here = records.machine()
    return table.assign(
        source=SOURCE, when=here["date"], commit=here["commit"], threads=here["threads"], cpu=here["cpu"], load=load
    )


def append(table: pd.DataFrame, file: Path = FILE) -> pd.DataFrame:
    """All measurements of ``file`` with ``table`` as the next one, which is written, too."""
    before = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    number = 1 if before.empty else int(before.measurement.max()) + 1
    new = table.assign(measurement=number)[COLUMNS]
    both = new if before.empty else pd.concat([before, new])
    records.write(both, file, index=False)
    return both


def recorded(file: Path = FILE) -> pd.DataFrame:
    """The measurements that pages state: those of this command, or, before there are any, what was recorded before."""
    table = pd.read_csv(file)
    ours = table[table.source == SOURCE]
    return table if ours.empty else ours


def summary(column: str, table: pd.DataFrame) -> pd.DataFrame:
    """By scheme, of ``column`` ("tuning", "align" or "recipe"): median, least, most and number of measurements."""
    of = table.dropna(subset=column).groupby("scheme", sort=False)[column]
    return of.agg(median="median", least="min", most="max", count="count")


def faults(table: pd.DataFrame) -> list[str]:
    """What is wrong with measurements of this command: times below their FLOPs, and measurements that disagree."""
    found, ours = [], table[table.source == SOURCE]
    for scheme, of in ours.groupby("scheme", sort=False):
        for row in of[of.tuning < of.flops - BELOW].itertuples():
            below = f"takes {row.tuning:.3f} of the time but {row.flops:.3f} of the FLOPs"
            found.append(f"measurement {row.measurement}: {scheme} {below}")
        if (apart := of.tuning.max() - of.tuning.min()) > APART:
            found.append(f"measurements of {scheme} differ by {100 * apart:.1f} points")
    return found


def main(arguments: list[str] | None = None) -> int:
    import frontier  # which reads what this writes

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
