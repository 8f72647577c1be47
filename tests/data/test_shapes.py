"""Images of shapes that a family's processor refuses are named before training, by the processor's own word."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from processors_tiny import WITH_PROCESSOR, write

from llavolta.data import Collator, DataError, LlavaData, find_too_long
from llavolta.data.__main__ import main
from llavolta.train.build import open_data
from llavolta.train.config import TrainConfig
from llavolta.worlds import backbones

SHAPES = [(1, 1), (3, 3), (1, 201), (1, 199), (700, 3), (31, 639), (96, 48)]
NEEDLE = 2  # of SHAPES, which Qwen-VL refuses, as it does the one at 4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for width, height in SHAPES:
        Image.new("RGB", (width, height), "green").save(folder / f"{width}x{height}.png")
        turns = [{"from": "human", "value": "<image>\nIs there a 3 ?"}, {"from": "gpt", "value": "no"}]
        rows.append({"image": f"{width}x{height}.png", "conversations": turns})
    (folder / "shapes.json").write_text(json.dumps(rows))
    return folder / "shapes.json"


def processor_of(family: str):
    if family == "llava":
        return backbones.processor()
    return WITH_PROCESSOR[family]()[1]


@pytest.mark.parametrize("family", ["llava", *WITH_PROCESSOR])
def test_what_a_processor_refuses_is_named_before_training(family, shapes):
    processor = processor_of(family)
    data, collate = LlavaData(shapes), Collator(processor, max_length=100_000)
    refused = []
    for index, size in enumerate(SHAPES):
        try:
            processor(text=[processor.image_token], images=[[Image.new("RGB", size)]], return_tensors="pt")
        except Exception:  # whatever it raises
            refused.append(index)
            with pytest.raises(
                DataError, match=f"shapes.json entry {index} .* refuses an image of {size[0]} x {size[1]}"
            ):
                collate([data[6], data[index]])
    assert (NEEDLE in refused) == family.startswith("qwen")
    found = find_too_long(data, collate, progress=False)
    assert list(found) == refused and all(f"entry {index} " in why for index, why in found.items())


def test_the_check_and_training_leave_out_what_the_processor_refuses(shapes, tmp_path, capsys):
    folder = write("qwen2_5_vl", tmp_path / "model")
    assert main(["check", str(shapes), "--json"]) == 0
    capsys.readouterr()
    assert main(["check", str(shapes), "--json", "--model", str(folder)]) == 1
    assert list(json.loads(capsys.readouterr().out)["bad"]) == ["2", "4"]
    collate = Collator(processor_of("qwen2_5_vl"), max_length=100_000)
    config = TrainConfig(model=str(folder), data=str(shapes), output=str(tmp_path / "run"), bad_entries="skip")
    assert open_data(config, shapes, None, collate).skipped == [2, 4]
    with pytest.raises(
        DataError, match=r"refuses an image of 1 x 201 .*too long or refused: 2 of 7; 'bad_entries: skip'"
    ):
        open_data(config.changed(bad_entries="fail"), shapes, None, collate)
