"""How large the package and its tests are: ``python tests/size.py`` prints a table by folder.

A code line holds code: no blanks, comments and docstrings. ``test_size.py`` keeps the package from growing.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Size:
    """What ``measure`` counts in a file.

    Attributes:
        lines: Lines of the file.
        code: Lines that hold code.
        comments: Lines that hold a comment, beside code or alone.
        long: Lines above 100 characters.
        functions: Code lines of each function, by its name.
    """

    lines: int
    code: int
    comments: int
    long: int
    functions: dict[str, int]


def measure(file: Path) -> Size:
    """The size of one Python file."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    functions = {
        node.name: len(code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    }
    lines = text.splitlines()
    long = sum(len(line) > 100 for line in lines)
    return Size(len(lines), len(code), len(comments), long, functions)


def measure_all(folder: Path) -> dict[str, Size]:
    """The size of every Python file below ``folder``, by its path there."""
    return {str(file.relative_to(folder)): measure(file) for file in sorted(folder.rglob("*.py"))}


def by_folder(sizes: dict[str, Size]) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Rows of the table: folder, files, lines, code lines, comment lines, lines above 100 characters."""
    folders = sorted({path.rpartition("/")[0].split("/")[0] for path in sizes})
    for folder in [*folders, None]:
        chosen = [s for path, s in sizes.items() if folder in (None, path.rpartition("/")[0].split("/")[0])]
        totals = [sum(getattr(size, name) for size in chosen) for name in ("lines", "code", "comments", "long")]
        yield ("all" if folder is None else folder or ".", len(chosen), *totals)


def main() -> None:
    for name in ("llavolta", "tests"):
        print(f"{name:<14} {'files':>6} {'lines':>7} {'code':>7} {'comments':>9} {'long':>6}")
        for folder, *counts in by_folder(measure_all(ROOT / name)):
            print(f"{folder:<14} {counts[0]:>6} {counts[1]:>7} {counts[2]:>7} {counts[3]:>9} {counts[4]:>6}")
        print()
    package = measure_all(ROOT / "llavolta")
    large = {path: size.code for path, size in package.items() if size.code > 400}
    deep = {
        f"{path} {name}": lines
        for path, size in package.items()
        for name, lines in size.functions.items()
        if lines > 60
    }
    print("files above 400 code lines:", large or "none")
    print("functions above 60 code lines:", deep or "none")


if __name__ == "__main__":
    main()
