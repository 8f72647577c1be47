"""The package does not grow: lines, comments and code lines as ``tests/size.py`` counts them."""

from __future__ import annotations

from size import ROOT, measure, measure_all

CODE = 14_400  # code lines of the package at 100 characters a line; lower it when code goes


def test_the_package_stays_as_small_and_as_explained_as_it_is():
    sizes = measure_all(ROOT / "llavolta").values()
    lines, code, comments, long = (
        sum(getattr(size, name) for size in sizes) for name in ("lines", "code", "comments", "long")
    )
    assert code <= CODE
    assert comments >= 0.04 * (code + comments) and lines > code
    assert long == 0


def test_what_counts_as_code(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        '"""Two\nlines."""\n\n\ndef f(x):  # why\n    """One."""\n    # alone\n    return (\n        x\n    )\n'
    )
    size = measure(file)
    assert (size.lines, size.code, size.comments, size.long) == (10, 4, 2, 0)
    assert size.functions == {"f": 4}
