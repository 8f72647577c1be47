"""Accuracy lost against speed-up, of all schemes that are recorded: ``python papers/frontier.py`` writes frontier.csv
and frontier.png to papers/faster.

The accuracies are what 04_compare_schemes recorded in papers/llavolta and papers/faster, and the verdicts of
papers/search.py, which stand in place of the former where a scheme has both. The speed-ups are of the whole recipe,
alignment and tuning, all measured side by side: the medians of papers/benchmarks/step-times.csv, which
``python papers/times.py`` appends to. Trains nothing.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
import search
import times

from llavolta.errors import UserError
from llavolta.paths import PAPERS
from llavolta.show import plots
from llavolta.studies import compare, records
from llavolta.train.schemes import BASELINE_SCHEMES, PAPER_SCHEMES, SCHEMES, Scheme

FOLDER = PAPERS / "faster"
BEYOND = FOLDER / "beyond" / "candidates.yaml"  # at 3 times and more
COLUMNS = ["group", "speedup", "difference", "difference_low", "difference_high", "seeds"]


def group(name: str) -> str:
    """Whose scheme it is."""
    if name in compare.CONTROLS or name.startswith("all-tokens"):
        return "control"
    return "LLaVolta" if name in PAPER_SCHEMES else "DualSpeed" if name in BASELINE_SCHEMES else "ours"


def schemes(num_layers: int) -> dict[str, Scheme]:
    """All that are recorded, and those of the package, for a model of ``num_layers`` layers."""
    named = compare.contestants([*SCHEMES], {}, num_layers)
    return named | search.candidates(FOLDER / "retired.yaml", num_layers) | search.candidates(BEYOND, num_layers)


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
    measured = 1 / times.summary("recipe", times.recorded())["median"]
    own = found.speedup if "speedup" in found else pd.Series(float("nan"), found.index)
    found["speedup"] = measured.reindex(found.index).fillna(own)  # controls of fewer steps are counted, not timed
    return found[COLUMNS].sort_values(["group", "speedup"])


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python papers/frontier.py", description=__doc__.split("\n")[0]).parse_args(arguments)
    try:
        table = recorded()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    records.write(table, FOLDER / "frontier.csv", dtype="none")
    plots.frontier(table).savefig(FOLDER / "frontier.png", dpi=120)
    print(table.to_string(float_format="{:.3f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
