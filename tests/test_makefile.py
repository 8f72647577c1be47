"""make's own part: what it runs, from a folder with blanks in its name too, and on an interpreter that cannot be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Says what it is asked to run, as the interpreter of a version; a virtual environment of it is another copy.
INTERPRETER = """#!/bin/sh
case "$1 $2" in
"-c "*) exec "{python}" -S -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function: what ``make TARGET`` prints in a folder with blanks in its name, on Python of ``version``."""
    folder = tmp_path / "my own papers" / "llavolta"
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-eval.txt"):
        shutil.copy(ROOT / name, folder)

    def make(target: str, version: tuple[int, int]) -> subprocess.CompletedProcess:
        interpreter = tmp_path / "python"
        interpreter.write_text(INTERPRETER.format(python=sys.executable, version=version))
        interpreter.chmod(0o755)
        command = ["make", "--no-print-directory", target, f"PYTHON={interpreter}"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return make


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_an_interpreter_without_packages_is_one_line_that_says_which_to_name(make, version):
    done = make("test", version)
    assert done.returncode and "ran:" not in done.stdout
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"error: Python {version[0]}.{version[1]}: ") and "make PYTHON=python3.13" in first


def test_a_path_with_blanks(make):
    done = make("test", (3, 13))
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran: ")]
    assert ran[0].startswith("ran: -m pip install") and ran[-1].endswith("-m not slow and not browser")
    assert any("ruff check" in line for line in ran)


def test_the_two_halves_are_all_tests(make):
    chosen = [make(target, (3, 11)).stdout.splitlines()[-1] for target in ("test", "test-rest", "test-all")]
    common = chosen[2]
    assert chosen[0] == f"{common} -m not slow and not browser" and chosen[1] == f"{common} -m slow or browser"
