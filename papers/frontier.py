"""Accuracy lost against speed-up, of all schemes that are recorded: ``python papers/frontier.py`` writes frontier.csv
and frontier.png to papers/faster.

The accuracies are what 04_compare_schemes recorded in papers/llavolta and papers/faster, and the verdicts of
papers/search.py, which stand in place of the former where a scheme has both. The speed-ups are of the whole recipe,
alignment and tuning, all measured side by side: ``python papers/frontier.py --measure``, which writes speedups.csv;
a few minutes, and it needs a trained model of the search. Trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import search

from llavolta.errors import UserError
from llavolta.paths import PAPERS, RUNS, given_path
from llavolta.show import plots
from llavolta.studies import compare
from llavolta.train import build
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import NAMED, NEIGHBOURS, SCHEMES, Scheme

FOLDER = PAPERS / "faster"
BEYOND = FOLDER / "beyond" / "candidates.yaml"  # at 3 times and more
COLUMNS = ["group", "speedup", "difference", "difference_low", "difference_high", "seeds"]


def group(name: str) -> str:
    """Whose scheme it is."""
    if name in compare.CONTROLS:
        return "control"
    return "LLaVolta" if name in SCHEMES else "DualSpeed" if name in NEIGHBOURS else "ours"


def schemes(num_layers: int) -> dict[str, Scheme]:
    """All that are recorded, and those of the package, for a model of ``num_layers`` layers."""
    named = compare.contestants([*NAMED, *compare.CONTROLS], {}, num_layers)
    return named | search.candidates(FOLDER / "retired.yaml", num_layers) | search.candidates(BEYOND, num_layers)


def measure(config: TrainConfig, model: Path, rounds: int = 5) -> pd.DataFrame:
    """What every scheme takes of the time of training on all tokens: of tuning, of alignment, of both (recipe)."""
    depth = build.prepare(compare.neutral(config)).num_layers
    cost, _ = compare.costs(schemes(depth), config, model, rounds)
    return cost.rename(columns=dict(time="tuning"))[["tuning", "align", "recipe"]]


def recorded() -> pd.DataFrame:
    """Every scheme once, by name: the stricter figure of one that has several."""
    parts = []
    for file in sorted(FOLDER.glob("**/verdict.csv")):
        verdict = pd.read_csv(file).query("type == 'overall'").set_index("scheme")
        verdict = verdict.rename(columns=dict(low="difference_low", high="difference_high"))
        parts.append(verdict.assign(group=[f"{group(name)}, fresh seeds" for name in verdict.index]))
    for folder in (PAPERS / "llavolta", FOLDER):
        runs = pd.read_csv(folder / "compare-runs.csv")
        table = compare.table(runs).drop(index=compare.BASELINE)
        table = table.assign(seeds=runs.groupby("scheme").seed.nunique())
        parts.append(table.assign(group=[group(name) for name in table.index]))
    found = pd.concat(parts)
    found = found[~found.index.duplicated()]
    found["speedup"] = 1 / pd.read_csv(FOLDER / "speedups.csv", index_col="scheme").recipe[found.index]
    return found[COLUMNS].sort_values(["group", "speedup"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python papers/frontier.py", description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="the speed-ups anew")
    trained = RUNS / "search" / "0" / compare.BASELINE
    parser.add_argument("--model", type=given_path, default=trained, help="a trained one")
    options = parser.parse_args(arguments)
    try:
        if options.measure:
            config = TrainConfig.from_preset("embedded", output=str(options.model))
            measure(config, options.model).to_csv(FOLDER / "speedups.csv", float_format="%.4f")
        table = recorded()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table.to_csv(FOLDER / "frontier.csv", float_format="%.4f")
    plots.frontier(table).savefig(FOLDER / "frontier.png", dpi=120)
    print(table.to_string(float_format="{:.3f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
