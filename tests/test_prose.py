"""papers/prose.py: a figure in the prose stands in a CSV of its page, or is cited; every CSV has a stamp."""

from __future__ import annotations

import prose
import pytest
import yaml

from llavolta.paths import PAPERS
from llavolta.studies.records import FIELDS


def test_committed_prose_and_stamps_are_sound():
    assert prose.unsourced(PAPERS, PAPERS.parent / "README.md") == prose.unstamped(PAPERS) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It loses 1.1 (0.6 to 1.6) points.", ["1.1", "0.6", "1.6"]),
        ("At 2,916 tokens 8 layers and 200 steps are no figures; 12 points and 2.5 times are.", ["12", "2.5"]),
        ("70% of 576, -3%", ["70%", "3%"]),
        ("LLaVA-1.5-7B ([2406.20092](https://arxiv.org/abs/2406.20092)), `2:avgpool:8`, torch 2.11.0, Python 3.11", []),
        ("```\n0.5\n```\n<!-- hours: x -->\n0.7\n<!-- end of hours -->\n0.9 kept", ["0.9"]),
    ],
)
def test_figures_are_told_from_other_numbers(text, found):
    assert [figure for _, figure, _ in prose.figures(text)] == found


def test_a_figure_must_stand_in_a_csv_or_be_cited(tmp_path):
    papers = tmp_path / "papers"
    (papers / "one").mkdir(parents=True)
    (papers / "one" / "a.csv").write_text("scheme,share\nmine,0.1234\n")
    (papers / "cited.yaml").write_text("papers/one/README.md: {'7.5': a paper}\n")
    page, readme = papers / "one" / "README.md", tmp_path / "README.md"
    readme.write_text("nothing")
    page.write_text("It is 12.3%, 0.12, 0.123 or 12 points; cited 7.5.")
    assert prose.unsourced(papers, readme) == []
    page.write_text("It is 12.4%.")
    wrong, unused = prose.unsourced(papers, readme)
    assert wrong.startswith("papers/one/README.md:1: 12.4% stands in no CSV") and "has 7.5 for" in unused


def test_a_csv_without_a_whole_stamp_is_a_fault(tmp_path):
    folder = tmp_path / "papers" / "one"
    folder.mkdir(parents=True)
    for name in ("a.csv", "b.csv.gz", "published.csv"):
        (folder / name).touch()
    stamps = {"a.csv": dict.fromkeys(FIELDS, "x") | {"commit": ""}, "gone.csv": dict.fromkeys(FIELDS, "x")}
    (folder / "stamps.yaml").write_text(yaml.safe_dump(stamps))
    assert prose.unstamped(tmp_path / "papers") == [
        "papers/one/b.csv.gz has no stamp",
        "papers/one/stamps.yaml speaks of gone.csv, which is not there",
        "the stamp of papers/one/a.csv lacks commit",
    ]
