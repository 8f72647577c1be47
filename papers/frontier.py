"""Accuracy lost against speed-up, of all schemes that are recorded: ``python papers/frontier.py`` writes frontier.csv
and frontier.png to papers/faster.

From what 04_compare_schemes recorded in papers/llavolta and papers/faster, and from the verdict of papers/search.py
where there is one. Speed-up is of tuning; of the verdict, of the whole recipe. Trains nothing.
"""

from __future__ import annotations

import pandas as pd

from llavolta.paths import PAPERS
from llavolta.show import plots
from llavolta.studies import compare
from llavolta.train.schemes import NEIGHBOURS, SCHEMES

FOLDER = PAPERS / "faster"
COLUMNS = ["group", "speedup", "difference", "difference_low", "difference_high", "seeds"]


def group(name: str) -> str:
    """Whose scheme it is."""
    if name in compare.CONTROLS:
        return "control"
    return "LLaVolta" if name in SCHEMES else "DualSpeed" if name in NEIGHBOURS else "ours"


def recorded() -> pd.DataFrame:
    """Every scheme once, by name; where both folders have one, that of papers/llavolta."""
    parts = []
    for folder in (PAPERS / "llavolta", FOLDER):
        runs = pd.read_csv(folder / "compare-runs.csv")
        table = compare.table(runs, pd.read_csv(folder / "compare-costs.csv", index_col="scheme"))
        table = table.drop(index=compare.BASELINE).assign(seeds=runs.groupby("scheme").seed.nunique())
        parts.append(table.assign(speedup=1 / table.time, group=[group(name) for name in table.index]))
    if (FOLDER / "verdict.csv").exists():
        verdict = pd.read_csv(FOLDER / "verdict.csv").query("type == 'overall'").set_index("scheme")
        verdict = verdict.rename(columns=dict(low="difference_low", high="difference_high"))
        groups = [f"{group(name)}, fresh seeds" for name in verdict.index]
        parts.insert(0, verdict.assign(group=groups))  # the stricter figure, of a scheme that has both
    found = pd.concat(parts)
    return found[~found.index.duplicated()][COLUMNS].sort_values(["group", "speedup"])


def main() -> None:
    table = recorded()
    table.to_csv(FOLDER / "frontier.csv", float_format="%.4f")
    plots.frontier(table).savefig(FOLDER / "frontier.png", dpi=120)
    print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
