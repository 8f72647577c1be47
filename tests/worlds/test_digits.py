"""The embedded data set: real scans, split apart, the same for the same seed, with answers that are right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llavolta.data import LlavaData
from llavolta.worlds import backbones, digits
from llavolta.worlds.digits import build_once


def test_training_and_heldout_scans_are_disjoint():
    train, heldout = (digits.scans(split)[0] for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 1797
    same = (train.flatten(1)[:, None] == heldout.flatten(1)[None]).all(-1)
    assert not same.any()


def test_the_builder_is_deterministic(tmp_path):
    first, second, other = (
        digits.build(tmp_path / name, scenes=5, heldout=3, seed=seed) for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 5 + 3 + 4
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert (first / "train.json").read_text() != (other / "train.json").read_text()
    assert digits.build(first, scenes=5, heldout=3, seed=4) == first
    with pytest.raises(FileExistsError, match="something else"):
        digits.build(first, scenes=6, heldout=3, seed=4)


def test_answers_are_right(scenes):
    """Recomputed from the caption, which lists the cells."""
    aligned = json.loads((scenes / "align.json").read_text())
    captions = {entry["id"]: entry["conversations"][1]["value"].split() for entry in aligned}
    checked = 0
    for entry in json.loads((scenes / "train.json").read_text()):
        cells = captions[entry["id"]]
        at = dict(zip(digits.PLACES, cells, strict=True))
        assert len(cells) == 9 and sorted(entry["types"]) == sorted(digits.QUESTION_TYPES)
        for asked, answered in zip(entry["conversations"][::2], entry["conversations"][1::2], strict=True):
            question, answer = asked["value"].removeprefix("<image>\n"), answered["value"]
            if match := re.fullmatch(r"Which digit is (.*)\?", question):
                assert answer == at[match[1]] != "none"
            elif match := re.fullmatch(r"How often does (\d) occur\?", question):
                assert answer == str(cells.count(match[1]))
            elif match := re.fullmatch(r"Is there a (\d)\?", question):
                assert answer == ("yes" if match[1] in cells else "no")
            else:
                match = re.fullmatch(r"Is (.*) larger than (.*)\?", question)
                assert answer == ("yes" if int(at[match[1]]) > int(at[match[2]]) else "no")
            checked += 1
    assert checked == 48 * 4


def test_the_picture_shows_the_digits_where_the_layout_says(scenes):
    layout = digits.Scenes.sample(20, np.random.default_rng(0))
    pictures = layout.render("train", np.random.default_rng(1))
    cells = pictures.unfold(2, 32, 32).unfold(3, 32, 32).reshape(20, 3, 9, -1)
    contrast = cells.std(-1).mean(1)
    full = torch.tensor(layout.digits != digits.NONE)
    assert contrast[full].min() > 2 * contrast[~full].max()
    assert LlavaData(scenes / "heldout.json")[0].images[0].size == (96, 96)


def test_every_word_is_known(scenes):
    words = backbones.tokenizer()
    entries = [entry for name in ("train", "align") for entry in json.loads((scenes / f"{name}.json").read_text())]
    text = " ".join(turn["value"] for entry in entries for turn in entry["conversations"])
    ids = words(text.replace("<image>", "")).input_ids
    assert words.unk_token_id not in ids
    assert words("What is this?").input_ids.count(words.unk_token_id) == 2  # and others are not


def test_questions_of_a_type_that_does_not_exist():
    with pytest.raises(ValueError, match="unknown question type 'sum'"):
        digits.ask("sum", np.zeros(9, int), np.random.default_rng(0))


def test_two_processes_that_build_one_folder(tmp_path):
    """The second finds the folder filled by the time it has written its own, and keeps the first's."""
    folder = tmp_path / "data"
    folder.mkdir()  # an empty one is taken

    def write(part: Path, name: str) -> None:
        (part / "second").touch()
        (folder / "first").touch()  # the other process is quicker
        (folder / "make.json").write_text(json.dumps({"name": "a"}))

    assert build_once(folder, {"name": "a"}, write) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["first", "make.json"]
    assert not list(tmp_path.glob("*.part*"))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(FileExistsError, match="something else"):  # the quicker one's is another data set
        build_once(folder, {"name": "b"}, write)
