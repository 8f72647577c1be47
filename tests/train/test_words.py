"""A projector fitted to words: objects' patches come near their names, and what cannot be fitted says so."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image, ImageDraw

from llavolta.data import LlavaData
from llavolta.errors import ConfigError
from llavolta.train import words
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.run import train

COLOURS = {"1": "red", "2": "lime", "3": "blue"}  # words that the small model knows


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Coloured boxes on grey, each colour with a number for its name, and the places of all."""
    folder, generator = tmp_path_factory.mktemp("boxes"), torch.Generator().manual_seed(0)
    entries = []
    for number in range(60):
        picture, shown = Image.new("RGB", (96, 96), "gray"), []
        for cell in torch.randperm(9, generator=generator)[:3].tolist():
            name = list(COLOURS)[int(torch.randint(3, (1,), generator=generator))]
            x, y = cell % 3 * 32, cell // 3 * 32
            ImageDraw.Draw(picture).rectangle([x, y, x + 31, y + 31], fill=COLOURS[name])
            shown.append(dict(name=name, box=[x, y, x + 32, y + 32]))
        picture.save(folder / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nread all digits ."}, {"from": "gpt", "value": "1 2 3"}]
        entries.append(dict(id=str(number), image=f"{number}.png", conversations=said, objects=shown))
    (folder / "align.json").write_text(json.dumps(entries))
    return folder / "align.json"


def test_patches_are_labelled_by_the_smallest_box_over_their_centre():
    numbers = {}
    objects = [
        dict(name="a", box=[0, 0, 10, 10]),
        dict(name="b", box=[100, 0, 200, 100]),
        dict(name="c", box=[150, 50, 200, 100]),
    ]
    label = words._labels(objects, (200, 100), 4, 8, numbers).view(4, 4)  # the middle square, 50..150, is what is seen
    names = {number: name for name, number in numbers.items()} | {-1: "."}
    assert ["".join(names[int(n)] for n in row) for row in label] == ["..bb", "..bb", "..bb", "..bb"]
    label = words._labels(objects, (200, 200), 4, 8, numbers).view(4, 4)
    assert ["".join(names[int(n)] for n in row) for row in label] == ["..bb", "..bc", "....", "...."]


def test_patches_are_named_after_the_fit_and_nothing_but_the_projector_moves(boxes, small_model):
    model, processor = load_model(str(small_model))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = words.fit_to_words(model, processor, LlavaData(boxes), steps=150, seed=0, progress=False)
    assert named > 0.9  # chance: a third
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)


PLACES = (("4", "5", "6"), ("7", "8", "9"), ("read", "all", "digits"))  # words that the model knows


def test_places_are_the_words_of_the_corners_and_of_what_lies_between(small_model, monkeypatch):
    monkeypatch.setattr(words, "PLACES", PLACES)
    model, processor = load_model(str(small_model))
    named = words._embeddings(model, processor, [name for row in PLACES for name in row])
    assert words._places(model, processor, 3).allclose(named, atol=1e-6)


@pytest.mark.slow
def test_patches_say_where_they_are_too(boxes, small_model, monkeypatch):
    """What is left of a fitted token without its name is nearest to the words of its place."""
    monkeypatch.setattr(words, "PLACES", PLACES)
    model, processor = load_model(str(small_model))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    tower = dict(model.model.vision_tower.named_parameters())
    (places,) = (value for name, value in tower.items() if name.endswith("position_embedding.weight"))
    with torch.no_grad():  # this tower never learnt anything, so that it has to be told
        row, column = (torch.arange(144) // 12 - 5.5) / 4, (torch.arange(144) % 12 - 5.5) / 4
        places[1:, :2] = torch.stack([row, column], 1)
    data = LlavaData(boxes)
    words.fit_to_words(model, processor, data, steps=1500, seed=0, progress=False)
    patches = words._patches(model, processor, data, 0, False)
    projector, shown = model.model.multi_modal_projector, patches.label >= 0
    names = words._embeddings(model, processor, patches.names)
    with torch.no_grad():
        rest = projector(patches.features[shown].float()) - names[patches.label[shown]]
    said = [name for row in PLACES for name in row]
    corners = [0, 2, 6, 8]
    places = words._embeddings(model, processor, said)
    row, column = patches.place[shown] // patches.side, patches.place[shown] % patches.side
    edge = patches.side // 6  # so near to a corner that its words are right alone
    for number, corner in enumerate(corners):
        down, right = divmod(number, 2)
        there = (row >= patches.side - edge if down else row < edge) & (
            column >= patches.side - edge if right else column < edge
        )
        nearest = (rest[there][:, None] - places[corners]).norm(dim=-1).argmin(1)
        assert there.any() and (nearest == number).float().mean() > 0.7, said[corner]  # chance: a quarter


def test_it_comes_before_alignment_and_runs_are_the_same_again(boxes, small_model, tmp_path, capsys):
    shared = dict(
        model=str(small_model), data=str(boxes), align_data=str(boxes), align_words=20, align_steps=1, stage=0
    )
    first, second = (
        train(TrainConfig(output=str(tmp_path / name), batch_size=4, **shared), progress=name == "a") for name in "ab"
    )
    assert "patches named right" in capsys.readouterr().out
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_data_without_objects_and_projectors_that_merge_are_refused(scenes, boxes, small_model, tmp_path):
    shared = dict(output=str(tmp_path / "run"), model=str(small_model), align_words=5, align_steps=1, stage=0)
    shared["scheme"] = "single-stage"
    with pytest.raises(ConfigError, match="needs entries with 'objects', which align.json has not; set it to 0"):
        train(
            TrainConfig(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"), **shared),
            progress=False,
        )
    shared["output"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="patch by patch; set it to 0 for this projector"):
        train(TrainConfig(data=str(boxes), align_data=str(boxes), projector="stf:2", **shared), progress=False)
