import json

import pytest
import torch
from PIL import Image
from tiny import write_small_llava
from transformers import LlavaForConditionalGeneration

from llavolta.data import index as data_index
from llavolta.paths import TINY_LLAVA
from llavolta.worlds import backbones, clips, digits


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small digits data set: 48 training and 12 held-out scenes."""
    return digits.build(tmp_path_factory.mktemp("data") / "digits", scenes=48, heldout=12, seed=1)


@pytest.fixture(scope="session")
def mixed(scenes, tmp_path_factory):
    """Square, wide and tall pictures, two pictures, and none, beside each other."""
    folder = tmp_path_factory.mktemp("mixed")
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
    return folder / "mixed.json"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("model") / "small-llava")


@pytest.fixture(scope="session")
def clip_data(tmp_path_factory):
    """24 clips and stills to train on, 8 held-out clips."""
    return clips.build(tmp_path_factory.mktemp("data") / "clips", clips=24, heldout=8, seed=1)


@pytest.fixture(scope="session")
def video_model(tmp_path_factory):
    """The folder of the embedded Video-LLaVA."""
    source = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("model") / "video"
    return backbones.save(backbones.video_llava(source), folder, words=backbones.video_processor())


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What data sets keep about themselves stays out of data/cache."""
    folder = tmp_path_factory.getbasetemp() / "data-cache"
    monkeypatch.setattr(data_index, "CACHE", folder)
    return folder
