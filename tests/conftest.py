"""What all tests share: small data sets and models, written once a run, whichever worker asks first."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import write_small_llava
from transformers import LlavaForConditionalGeneration

from llavolta.data import index as data_index
from llavolta.paths import TINY_LLAVA
from llavolta.worlds import backbones, clips, digits


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a module that share a fixture of the module or of a class run in one worker, which makes it once."""
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        shared = sorted(
            name
            for name, definitions in (fixtures.name2fixturedefs if fixtures else {}).items()
            if definitions[-1].scope in ("module", "class")
        )
        if shared and not item.get_closest_marker("xdist_group"):
            chosen = getattr(getattr(item, "callspec", None), "params", {})
            group = "-".join([item.path.stem, *(str(chosen[name]) for name in shared if name in chosen)])
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """A Trainer collects garbage several times a run; what imports have made is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function: the folder of a name, which the first worker that asks for it fills with ``write(folder)``."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    base.mkdir(exist_ok=True)

    def folder_of(name: str, write: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                write(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def scenes(once):
    """A small digits data set: 48 training and 12 held-out scenes."""
    return once("digits", lambda folder: digits.build(folder, scenes=48, heldout=12, seed=1))


@pytest.fixture(scope="session")
def mixed(scenes, once):
    """Square, wide and tall pictures, two pictures, and none, beside each other."""

    def write(folder: Path) -> None:
        folder.mkdir()
        entries = json.loads((scenes / "train.json").read_text())[:24]
        for number, one in enumerate(entries):
            picture = Image.open(scenes / one["image"])
            first, turns = one["conversations"][0], one["conversations"]
            if number % 4 == 3:
                del one["image"]
                first["value"] = first["value"].replace("<image>", "").strip()
                continue
            size = ((96, 96), (120, 60), (40, 100))[number % 3]
            picture.resize(size).save(folder / f"{number}.png")
            one["image"] = f"{number}.png"
            if number % 4 == 2:
                one["image"] = [one["image"], "0.png"]
                turns[2]["value"] = "<image>" + turns[2]["value"]
        (folder / "mixed.json").write_text(json.dumps(entries))

    return once("mixed", write) / "mixed.json"


@pytest.fixture(scope="session")
def small_model(once):
    return once("small-llava", write_small_llava)


@pytest.fixture(scope="session")
def clip_data(once):
    """24 clips and stills to train on, 8 held-out clips."""
    return once("clips", lambda folder: clips.build(folder, clips=24, heldout=8, seed=1))


@pytest.fixture(scope="session")
def video_model(once):
    """The folder of the embedded Video-LLaVA."""

    def write(folder: Path) -> None:
        source = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
        backbones.save(backbones.video_llava(source), folder, words=backbones.video_processor())

    return once("video", write)


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What data sets keep about themselves stays out of data/cache."""
    folder = tmp_path_factory.getbasetemp() / "data-cache"
    monkeypatch.setattr(data_index, "CACHE", folder)
    return folder
