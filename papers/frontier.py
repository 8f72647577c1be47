"""Draw the accuracy lost against the speed-up, of all recorded schemes.

``python papers/frontier.py`` writes frontier.csv and frontier.png to papers/faster. It trains nothing. The accuracies
were recorded by notebook 04 (in papers/llavolta and papers/faster) and by papers/search.py (verdict.csv), whose figures
come first where a scheme has both. The speed-ups are of alignment and tuning together: the medians of
papers/benchmarks/step-times.csv, which ``python papers/times.py`` measures.
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
BEYOND = FOLDER / "beyond" / "candidates.yaml"  # schemes that are 3 times faster and more
COLUMNS = ["group", "speedup", "difference", "difference_low", "difference_high", "seeds"]


def group(name: str) -> str:
    """Return the group of a scheme: "control", "LLaVolta", "DualSpeed" or "ours"."""
    if name in compare.CONTROLS or name.startswith("all-tokens"):
        return "control"
    return "LLaVolta" if name in PAPER_SCHEMES else "DualSpeed" if name in BASELINE_SCHEMES else "ours"


def schemes(num_layers: int) -> dict[str, Scheme]:
    """Return the recorded schemes and those of the package, for a model of ``num_layers`` layers."""
    named = compare.contestants([*SCHEMES], {}, num_layers)
    return named | search.candidates(FOLDER / "retired.yaml", num_layers) | search.candidates(BEYOND, num_layers)


def recorded() -> pd.DataFrame:
    """Read the figures of every scheme.

    Returns:
        One row per scheme with COLUMNS. Figures of papers/search.py, whose seeds and questions are fresh, come before
        those of notebook 04.
    """
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
    found = found[~found.index.duplicated()]  # the first one stays: verdicts stand before runs
    measured = 1 / times.summary("recipe", times.recorded())["median"]
    own = found.speedup if "speedup" in found else pd.Series(float("nan"), found.index)
    found["speedup"] = measured.reindex(found.index).fillna(own)  # controls of fewer steps are counted, not timed
    return found[COLUMNS].sort_values(["group", "speedup"])


def main(arguments: list[str] | None = None) -> int:
    """Write the table and the figure. Returns the exit code: 1 after an error, which is printed on stderr."""
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
