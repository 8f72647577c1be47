"""The script that compares two checkouts: equal to itself, and a copy that computes something else is told of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from compare_checkouts import _difference, main

HERE = Path(__file__).parent.parent
ONLY = r"^llava (sdpa|eager) (none|1:avgpool:3;3:avgpool:2|2:fastv:0.5) (train|generate|chunks)$"
ONLY += r"|^qwen2_5_vl of families sdpa 1:avgpool:3 train$|^gemma3 .* eager vision:.* forward$"


@pytest.mark.slow
def test_a_checkout_equals_itself(capfd):
    assert main([str(HERE), str(HERE), "--only", ONLY]) == 0
    assert "21 cases (2 of them errors), 0 differ" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sum(2) // at_least_one", "sum(2) // (at_least_one + 1)", "by up to"),
        ("count > 0, anchor, positions", "count > 9, anchor, positions", "tensors -> ValueError"),
    ],
)
def test_a_copy_that_computes_something_else_is_told_of(tmp_path, capfd, old, new, told):
    for folder in ("llavolta", "tests"):
        shutil.copytree(HERE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (changed,) = (tmp_path / "llavolta").rglob("avgpool.py")
    text = changed.read_text()
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new))
    only = r"^llava sdpa (none|1:avgpool:3;3:avgpool:2) (chunks|train)$"
    assert main([str(HERE), str(tmp_path), "--only", only]) == 1
    printed = capfd.readouterr().out
    cases = [line for line in printed.splitlines() if line.startswith("llava ")]
    assert cases == [f"llava sdpa 1:avgpool:3;3:avgpool:2 {name}" for name in ("chunks", "train")]
    assert told in printed and "4 cases" in printed


@pytest.mark.slow
def test_no_case_at_all_is_no_success():
    assert main([str(HERE), str(HERE), "--only", "^nothing"]) == 2


def test_tensors_are_compared_by_their_bits():
    nan, zero = torch.tensor([torch.nan, 1.0]), torch.zeros(2)
    assert not _difference(nan, nan.clone())
    assert _difference(zero, -zero) and _difference(zero, zero.double()) and _difference(zero, zero[:1])
    assert not _difference(torch.tensor(1.0), torch.tensor(1.0))
