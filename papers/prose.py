"""Whether the numbers in the prose of README.md and papers/ stand in a CSV, and whether each CSV has its stamp.

A figure is a number with a decimal point, or one of percent, points, times or hours. It has to be a value, or a hundred
times a value, of the CSVs or generated pages that belong to its page (``SOURCES``), rounded as it is written; of step
times also the inverse, and what is missing to one. Figures of others and what we chose stand in papers/cited.yaml, with
the reason. Blocks of code, inline code, links and generated tables are no prose.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from llavolta.studies.records import FIELDS, read_stamps

GENERATED = ("claims.md", "scaling.md", "gpu-nvidia-h100-80gb-hbm3.md", "nano/README.md")
PARTLY = "REPRODUCE.md"  # its figures stand in a block that papers/scaling.py writes
CITED = "cited.yaml"
SOURCES = {  # besides the CSVs and generated pages of the page's own folder
    "README.md": [
        "llavolta/claims.md",
        "faster/*",
        "nano/accuracy.csv",
        "benchmarks/step-times.csv",
        "benchmarks/gpu*",
    ],
    "papers/REPRODUCE.md": ["llavolta/published.csv", "faster/published.csv"],
    "papers/faster/README.md": ["faster/beyond/*", "benchmarks/step-times.csv", "REPRODUCE.md"],
    "papers/neighbours.md": ["*/published.csv"],
}
INVERSE = ("step-times.csv", "frontier.csv")  # whose values also are read as speed-ups, and as what is saved
UNIT = r"%|\s*(?:percent\b|points?\b|times\b|hours?\b|h\b)"
NUMBER = re.compile(rf"(?<![\w.])([-+]?\d[\d,]*(?:\.\d+)?)(?:(?=({UNIT}))|(?!\w))")
NO_PROSE = re.compile(r"```.*?```|<!-- (\w+):.*?<!-- end of \1 -->|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
IDENTIFIER = re.compile(
    r"\b\d{4}\.\d{4,5}(?:v\d)?\b|\b[A-Za-z][\w]*(?:-[\w]+)*-?\d[\w.-]*|\b\d+(?:\.\d+){2,}\b|\bPython \d\.\d+"
)  # of papers, models, versions


def unstamped(papers: Path) -> list[str]:
    """CSVs without a whole stamp, and stamps without a CSV. Published figures are cited, and have none."""
    found = []
    for folder in sorted({file.parent for file in papers.rglob("*.csv")}):
        stamps, files = read_stamps(folder), {file.name for file in folder.glob("*.csv*")} - {"published.csv"}
        place = folder.relative_to(papers.parent)
        found += [f"{place}/{name} has no stamp" for name in sorted(files - stamps.keys())]
        found += [f"{place}/stamps.yaml speaks of {name}, which is not there" for name in sorted(stamps.keys() - files)]
        for name, stamp in stamps.items():
            if missing := [field for field in FIELDS if not str(stamp.get(field) or "")]:
                found.append(f"the stamp of {place}/{name} lacks {', '.join(missing)}")
    return found


def unsourced(papers: Path, readme: Path) -> list[str]:
    """Every figure in prose that stands in none of its page's sources, and every citation that nothing uses."""
    cited = yaml.safe_load((papers / CITED).read_text())
    pages = [readme, *sorted(page for page in papers.rglob("*.md") if not _generated(page))]
    found = []
    for page in pages:
        name = page.relative_to(papers.parent).as_posix()
        allowed, used = cited.get(name) or {}, set()
        values, texts = _sources(papers, page, name)
        for line, text, digits in figures(page.read_text()):
            if text in allowed:
                used.add(text)
            elif not stands(text, digits, values, texts):
                found.append(f"{name}:{line}: {text} stands in no CSV of this page and is not in papers/{CITED}")
        found += [f"papers/{CITED} has {text} for {name}, which is not there" for text in allowed if text not in used]
    return found


def figures(text: str) -> list[tuple[int, str, int]]:
    """(line, figure, digits after the point) of each figure in the prose of ``text``."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    prose = IDENTIFIER.sub(blank, NO_PROSE.sub(blank, text))
    found = []
    for number, line in enumerate(prose.splitlines(), 1):
        for match in NUMBER.finditer(line):
            value, unit = match[1], (match[2] or "").strip()
            if "." in value or unit:
                digits = len(value.partition(".")[2])
                found.append((number, value.rstrip(",").lstrip("+-") + ("%" if unit == "%" else ""), digits))
    return found


def stands(text: str, digits: int, values: np.ndarray, texts: set[str]) -> bool:
    """Whether the figure ``text`` is one of ``texts``, or one of ``values`` rounded to as many digits."""
    plain = text.rstrip("%").replace(",", "")
    if text in texts or plain in texts:
        return True
    return bool((np.abs(values - float(plain)) <= 0.5 * 10.0**-digits * (1 + 1e-6)).any())


def _generated(page: Path) -> bool:
    return page.as_posix().endswith(GENERATED)


def _sources(papers: Path, page: Path, name: str) -> tuple[np.ndarray, set[str]]:
    patterns = SOURCES.get(name, [])
    own = [] if page.parent in (papers, papers.parent) else sorted(page.parent.iterdir())
    files = [*own, *(file for pattern in patterns for file in sorted(papers.glob(pattern)))]
    values, texts = [np.zeros(0)], set()
    for file in files:
        if file.suffix == ".csv" and not file.stem.endswith(("-curves", "-correct", "-answers")):
            values.append(_forms(file))
        elif file.suffix == ".txt" or file.name == PARTLY or _generated(file):
            texts |= {match.lstrip("+-") for match in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", file.read_text())}
    return np.concatenate(values), texts


@cache
def _forms(file: Path) -> np.ndarray:
    """Every number of a CSV, as it is and as a percentage; of INVERSE, also what is missing to one, and its inverse."""
    numbers = pd.to_numeric(pd.read_csv(file).to_numpy().ravel(), errors="coerce").astype(float)
    value = np.abs(numbers[np.isfinite(numbers)])
    share = value[(value <= 1) & (value > 0)] if file.name in INVERSE else np.zeros(0)
    return np.concatenate([value, 100 * value, 100 * (1 - share), 1 - share, 1 / share])
