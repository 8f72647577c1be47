"""CONTRIBUTING.md's recipes, run from the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tiny import ragged_batch, tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavolta import COMPRESSORS, compress
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.run import train
from llavolta.train.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
RECIPES = dict(re.findall(r"```python (\w+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S))


def written(recipe: str) -> dict:
    """The names that the page's code of ``recipe`` defines."""
    module = sys.modules.setdefault(f"recipe_{recipe}", ModuleType(f"recipe_{recipe}"))  # dataclasses look it up
    exec("import torch\n" + RECIPES[recipe], vars(module))
    return vars(module)


def test_the_page_has_the_four_recipes():
    assert RECIPES.keys() == {"compressor", "family", "scheme", "projector"}


def pytest_with(tmp_path, recipe: str, tests: str, chosen: str) -> None:
    """Run ``tests`` in a process of its own, with the page's code of ``recipe`` in force."""
    (tmp_path / f"recipe_{recipe}.py").write_text("import torch\n" + RECIPES[recipe])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", f"recipe_{recipe}", "-p", "no:cacheprovider", "-k", chosen, tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed and int(passed[1]) > 8, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.slow
def test_the_compressor_keeps_the_contract_of_all(tmp_path):
    pytest_with(tmp_path, "compressor", "tests/compression/test_compressors.py", "oddest")


def test_the_compressor_keeps_the_oddest_of_each_window():
    oddest = written("compressor")["Oddest"]
    try:
        seen, model = [], tiny_llava()
        with compress(model, "1:oddest:4", observe=lambda *call: seen.append(call)):
            model(**ragged_batch([[3, 4]]))
        ((layer, tokens, out),) = seen
        assert layer == 1 and out.hidden.shape[1] == 4
        far = (tokens.hidden - tokens.hidden.mean(1, keepdim=True)).norm(dim=-1)[0]
        assert out.anchor[0].tolist() == [max(range(i, i + 4), key=lambda j: far[j]) for i in range(0, 16, 4)]
    finally:
        COMPRESSORS.pop(oddest.name)


@pytest.mark.slow
def test_the_family_passes_the_tests_of_families(tmp_path):
    pytest_with(tmp_path, "family", "tests/compression/test_families.py", "vipllava")


@pytest.fixture
def settings(scenes, small_model, tmp_path):
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    return dict(output=str(tmp_path / "run"), model=str(small_model), align_steps=1, batch_size=4, log_steps=1, **data)


def test_the_scheme_trains(settings, tmp_path):
    try:
        written("scheme")
        run = train(TrainConfig(**{**settings, "align_steps": 0}, scheme="late", max_steps=4), progress=False)
        stages = yaml.safe_load((run / "config.yaml").read_text())["resolved_stages"]
        assert [stage["plan"] for stage in stages] == ["1:avgpool:8", "2:avgpool:4", "none"]
    finally:
        SCHEMES.pop("late", None)


def test_the_projector_trains_and_loads(settings, small_model, tmp_path):
    names = written("projector")
    model, processor = load_model(str(small_model))
    new = names["with_linear"](model)
    before = new.model.multi_modal_projector.linear.weight.clone()
    assert torch.equal(new.lm_head.weight, model.lm_head.weight)
    for part in (new, processor):
        part.save_pretrained(tmp_path / "linear")
    run = train(TrainConfig(**{**settings, "model": str(tmp_path / "linear"), "max_steps": 3}), progress=False)
    held = AutoModelForImageTextToText.from_pretrained(run)
    assert type(held) is names["LlavaLinearForConditionalGeneration"] and AutoProcessor.from_pretrained(run)
    assert not torch.equal(held.model.multi_modal_projector.linear.weight, before)
