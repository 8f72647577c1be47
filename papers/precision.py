"""Compare the accuracy of tuning in float32 with that under autocast to bfloat16.

``python papers/precision.py`` writes papers/benchmarks/precision-accuracy.csv and prints it, in about eight minutes on
2 cores. An interrupted run continues. The embedded model is tuned without compression, with three seeds in each
precision, and asked 1,200 held-out questions. Differences are paired by seed. ``bf16: auto`` picks autocast on GPUs and
on CPUs that have instructions for it.
"""

from __future__ import annotations

import os

import pandas as pd

from llavolta.paths import PAPERS, RUNS
from llavolta.studies import compare
from llavolta.studies.records import write
from llavolta.train import build
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import Scheme

SEEDS, WORKERS = [0, 1, 2], 2
FULL, AUTOCAST = compare.BASELINE, "autocast"  # differences are to the first, which compare calls its baseline


def main() -> None:
    """Train, ask, and write the table."""
    config = TrainConfig.from_preset("embedded", output=str(RUNS / "precision"), bf16=False)
    schemes = {name: Scheme.equal(name, "none") for name in (FULL, AUTOCAST)}
    seeds = dict.fromkeys(schemes, SEEDS)
    answers = compare.compare(schemes, seeds, config, workers=WORKERS, changes={AUTOCAST: {"bf16": True}})
    data = [build.prepare(config).data, build.heldout_file(config)]
    runs = compare.accuracies(answers)
    rows = []
    for kind in ["overall", *dict.fromkeys(answers.type)]:
        table = compare.table(runs, kind=kind)
        rows.append(table.loc[AUTOCAST].to_dict() | dict(type=kind, float32=table.accuracy[FULL], seeds=len(SEEDS)))
    columns = ["type", "float32", "accuracy", "low", "high", "difference", "difference_low", "difference_high", "seeds"]
    table = pd.DataFrame(rows)[columns].rename(columns=dict(accuracy="autocast"))
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    write(table, PAPERS / "benchmarks" / "precision-accuracy.csv", index=False, threads=threads, data=data)
    print(table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
