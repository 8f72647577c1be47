"""Train one model for several budgets, and compare it with a model trained without compression.

``python papers/matryoshka.py`` writes papers/compressors/matryoshka.csv and prints it, in about five minutes on 2
cores. An interrupted run continues. One embedded model is trained without compression, the other with a pooling that is
sampled anew for each step (``0:avgpool2d:1|2|3|4``). Matryoshka Multimodal Models (arXiv 2405.17430) sums the losses of
all poolings instead. Both train for the same steps, from one alignment, and are asked under each pooling.
"""

from __future__ import annotations

import pandas as pd

from llavolta.data import LlavaData
from llavolta.paths import PAPERS, RUNS
from llavolta.studies import compare
from llavolta.studies.evaluation import evaluate
from llavolta.studies.opening import open_model
from llavolta.studies.records import write
from llavolta.studies.statistics import interval, paired_difference
from llavolta.train import build
from llavolta.train.build import heldout_file
from llavolta.train.config import TrainConfig

KERNELS, QUESTIONS = (1, 2, 3, 4), 1200
DRAWN = f"0:avgpool2d:{'|'.join(map(str, KERNELS))}"


def main() -> None:
    """Train, ask, and write the table."""
    config = TrainConfig.from_preset("embedded", output=str(RUNS / "matryoshka"))
    schemes = compare.contestants([], {"drawn": [DRAWN]}, 8)
    compare.compare(schemes, compare.seed_lists(1, schemes), config, questions=QUESTIONS, workers=2)
    data, rows = LlavaData(heldout_file(config)), []
    models = {name: open_model(RUNS / "matryoshka" / "0" / name)[:2] for name in schemes}
    for k in KERNELS:
        plan = f"0:avgpool2d:{k}"
        correct = {
            name: evaluate(*held, data, plan, QUESTIONS, progress=False).correct for name, held in models.items()
        }
        row = dict(plan=plan, tokens=(-(-12 // k)) ** 2)  # of 12 x 12, with a smaller last window
        for name, right in correct.items():
            low, high = interval(right)
            row |= {name: right.mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row | paired_difference(correct["drawn"], correct[compare.BASELINE]))
    table = pd.DataFrame(rows)
    files = [build.prepare(compare.neutral(config)).data, heldout_file(config)]
    write(table, PAPERS / "compressors" / "matryoshka.csv", index=False, data=files)
    print(table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
