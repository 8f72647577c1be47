"""The faults of tests/mutants.py can be planted: each line is there, once, and is Python with the fault in it, too."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from mutants import MUTANTS, ROOT, main, plant


def test_each_fault_can_be_planted():
    for file in {mutant.file for mutant in MUTANTS}:
        text = (ROOT / "llavolta" / file).read_text()
        stock = ast.dump(ast.parse(text))
        for mutant in MUTANTS:
            if mutant.file == file:
                assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r}"
                assert ast.dump(ast.parse(text.replace(mutant.old, mutant.new))) != stock, mutant.name


def test_the_list_is_long_and_names_tests_that_exist():
    assert len(MUTANTS) >= 60 and max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert {"compression", "train", "data", "studies"} == {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert all((ROOT / "tests" / part).exists() for mutant in MUTANTS for part in mutant.tests)


def test_a_line_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sampler.py").write_text("nothing")
    sampler = next(mutant for mutant in MUTANTS if mutant.file == "data/sampler.py")
    with pytest.raises(SystemExit, match="stands 0 times"):
        plant(sampler, tmp_path)
    assert main(["--only", "^no such mutant"]) == 2
