"""Check that the numbers in the prose of README.md and papers/ are values of a CSV, and that each CSV has its stamp.

A figure is a number with a decimal point, or one in percent, points, times or hours. It must be a value of the CSVs or
generated pages that belong to its page (``SOURCES``), or a hundred times a value, rounded as it is written. Step times
may also be given as 1 / value (a speed-up) or 1 - value (the share saved). Figures from the literature and chosen
constants are listed in papers/cited.yaml, with the reason. Code blocks, inline code, links and generated tables are not
checked.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from llavolta.studies.records import FIELDS, read_stamps

# Ends of the paths of generated pages, whose figures need no check.
GENERATED = ("claims.md", "scaling.md", "gpu-nvidia-h100-80gb-hbm3.md", "nano/README.md")
PARTLY = "REPRODUCE.md"  # has a block of figures that papers/scaling.py writes
CITED = "cited.yaml"
SOURCES = {  # in addition to the CSVs and generated pages in the page's folder
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
INVERSE = ("step-times.csv", "frontier.csv")  # values v are also given as 1 / v and 1 - v
UNIT = r"%|\s*(?:percent\b|points?\b|times\b|hours?\b|h\b)"
NUMBER = re.compile(rf"(?<![\w.])([-+]?\d[\d,]*(?:\.\d+)?)(?:(?=({UNIT}))|(?!\w))")
NO_PROSE = re.compile(r"```.*?```|<!-- (\w+):.*?<!-- end of \1 -->|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
IDENTIFIER = re.compile(
    r"\b\d{4}\.\d{4,5}(?:v\d)?\b|\b[A-Za-z][\w]*(?:-[\w]+)*-?\d[\w.-]*|\b\d+(?:\.\d+){2,}\b|\bPython \d\.\d+"
)  # of papers, models, versions


def unstamped(papers: Path) -> list[str]:
    """Find CSV files without a complete stamp, and stamps without a CSV file.

    published.csv has no stamp, because its figures are cited.

    Args:
        papers: The folder papers/.

    Returns:
        One line per fault.
    """
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
    """Find figures in prose without a source, and entries of cited.yaml that no page uses.

    Args:
        papers: The folder papers/.
        readme: The file README.md.

    Returns:
        One line per fault.
    """
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
    """Find the figures in the prose of a page.

    Args:
        text: The page, in Markdown.

    Returns:
        (line, figure, digits after the point) each.
    """
    # Blanks in place of what is no prose, so that line numbers stay.
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
    """Return whether a figure has a source.

    Args:
        text: The figure.
        digits: Its digits after the point.
        values: Values that it may be, rounded to these digits.
        texts: Figures of generated pages, which it may be literally.
    """
    plain = text.rstrip("%").replace(",", "")
    if text in texts or plain in texts:
        return True
    return bool((np.abs(values - float(plain)) <= 0.5 * 10.0**-digits * (1 + 1e-6)).any())


def _generated(page: Path) -> bool:
    return page.as_posix().endswith(GENERATED)


def _sources(papers: Path, page: Path, name: str) -> tuple[np.ndarray, set[str]]:
    """The values and the literal figures that a page may have."""
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
    """Every number of a CSV, as it is and as a percentage; for INVERSE, 1 - value and 1 / value as well."""
    numbers = pd.to_numeric(pd.read_csv(file).to_numpy().ravel(), errors="coerce").astype(float)
    value = np.abs(numbers[np.isfinite(numbers)])
    share = value[(value <= 1) & (value > 0)] if file.name in INVERSE else np.zeros(0)
    return np.concatenate([value, 100 * value, 100 * (1 - share), 1 - share, 1 / share])
