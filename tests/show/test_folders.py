"""What the notebooks train by default never collides: one folder, one run, whichever notebook comes first."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import IPython
import pandas as pd
import pytest

from llavolta import paths
from llavolta.studies import compare, opening
from llavolta.train import build, run
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.schemes import SCHEMES
from llavolta.worlds import WORLDS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def claim(config: TrainConfig) -> None:
    """As ``train`` does before it trains, and as if it had saved a step."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    run._claim(output, config, build.prepare(config))
    (output / "scheme.json").touch()


class Enough(Exception):
    """The notebook has said all that it trains."""


@pytest.fixture
def opened(scenes, clip_data, tmp_path, monkeypatch):
    """A function: the configurations that a notebook's own cells train with, under parameters; nothing is trained."""
    asked: list[TrainConfig] = []
    for module in (paths, opening):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    for name, folder in (("digits", scenes), ("clips", clip_data)):
        monkeypatch.setitem(WORLDS, name, replace(WORLDS[name], build=lambda *_, folder=folder: folder))
    for module in (opening, compare):
        monkeypatch.setattr(module, "train", lambda config, *_, **__: asked.append(config) or Path(config.output))
    monkeypatch.setattr(opening, "load_model", lambda *_, **__: (_ for _ in ()).throw(Enough))
    monkeypatch.setattr(compare, "_run", lambda config, *_: asked.append(config) or pd.DataFrame({"correct": [True]}))
    monkeypatch.setattr(compare, "accuracies", lambda *_: (_ for _ in ()).throw(Enough))

    def opened(name: str, **parameters) -> list[TrainConfig]:
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        names = {"In": code[:1]}
        monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=names))
        exec(code[0], names)
        names |= parameters
        asked.clear()
        for cell in [code[1], *(cell for cell in code[2:] if "compare.compare(" in cell)]:
            try:
                exec(cell, names)
            except Enough:
                continue
        return [*asked, *([names["settings"]] if "settings" in names else [])]

    return opened


def test_no_two_notebooks_hold_different_runs_in_one_folder(opened):
    runs = {name: opened(name) for name in ("01_redundancy", "02_compressor_design")}
    for preset in ("embedded", "small"):
        for scheme in SCHEMES:
            runs[f"03 {preset} {scheme}"] = opened("03_train_stage", preset=preset, scheme=scheme, stage=1)
    runs["04"] = opened("04_compare_schemes", controls=True, workers=1, seeds=2)
    runs["05"] = opened("05_compare_compressors", workers=1)
    runs["06"] = opened("06_video", workers=1)
    counts = {name: len(held) for name, held in runs.items()}
    assert counts["01_redundancy"] == 1 and counts["04"] == 2 * 11 and counts["05"] > 10 and counts["06"] == 3
    folders: dict[str, dict[str, TrainConfig]] = {}
    for name, held in runs.items():
        for config in held:
            folders.setdefault(config.output, {})[name] = config
    shared = [list(held.values()) for held in folders.values() if len(held) > 1]
    assert any(len(held) == 4 for held in shared)  # single-stage: 01, 02, 03 and 05
    for held in shared:
        for first, second in permutations(held, 2):
            claim(first)
            claim(second)  # ConfigError if it is another run


def test_a_run_whose_steps_are_said_in_other_words_is_the_same(scenes, small_model, tmp_path, monkeypatch):
    monkeypatch.setitem(WORLDS, "digits", replace(WORLDS["digits"], build=lambda *_: scenes, steps=3))
    shared = dict(output=str(tmp_path / "run"), model=str(small_model), scheme="single-stage", batch_size=4)
    config = TrainConfig(**shared, align_steps=0, log_steps=1)
    weights = run.train(config, progress=False) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    for other in (dict(max_steps=3), dict(epochs=3 * 4 / 48)):
        assert run.train(config.changed(**other), progress=False) == tmp_path / "run"
    assert weights.stat().st_mtime_ns == written
    for other in (dict(max_steps=4), dict(epochs=5.0), dict(learning_rate=1e-3)):
        with pytest.raises(ConfigError, match="holds another run"):
            claim(config.changed(**other))
