"""The pictures world: answers that follow from the scene, vendors kept apart, drawings with their licences."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from llavolta.data import LlavaData
from llavolta.errors import DataError
from llavolta.worlds import pictures
from llavolta.worlds.pictures import KIND_NAMES, KINDS, NUMBERS, SIDES, Scene


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pictures.build(tmp_path_factory.mktemp("pictures") / "p", scenes=120, heldout=20, seed=1)


def test_the_builder_is_deterministic(tmp_path):
    first, second, other = (
        pictures.build(tmp_path / name, scenes=4, heldout=2, seed=seed) for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 4 + 2 + 2 + 5
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert (first / "train.json").read_text() != (other / "train.json").read_text()


def place(box) -> str | None:
    """Where a person would say the box is; None where it is on a line between two places."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    names = []
    for at, words in ((y, ("top", "middle", "bottom")), (x, ("left", "middle", "right"))):
        if min(abs(at - 56), abs(at - 112)) < 6:
            return None
        names.append(words[int(at // 56)])
    return "center" if names == ["middle", "middle"] else " ".join(names)


def right_answers(question: str, things: list[dict]) -> set[str] | None:
    """Every answer that the recorded scene allows, worked out from names and boxes alone; None: not understood."""
    table = pictures.objects().set_index("name")
    named = {thing["name"]: thing["box"] for thing in things}
    of_kind = {kind: [t["name"] for t in things if table.loc[t["name"], kind]] for kind in KINDS}
    where = re.search(r" in the ((?:top|middle|bottom) (?:left|middle|right)|center)\b", question)
    there = {t["name"] for t in things if where and place(t["box"]) in (where[1], None)}
    if re.match(r"What kind|Is the thing", question):
        return {KIND_NAMES[kind] for kind in KINDS if table.loc[next(iter(there)), kind]} if len(there) == 1 else None
    if where and "Where" not in question:
        return there
    if match := re.search(r"(?:Where (?:is|are|can you see)|In which part (?:is|are)) the (.*)\?", question):
        return {place(named[match[1]])}
    side = next((side for side in SIDES if f" {side} the " in question), None)
    if side:
        (a, b), (dx, dy) = re.split(f" (?:just |directly )?{side} the ", question.rstrip("?")), SIDES[side]
        axis, sign = (0, dx) if dx else (1, dy)

        def beyond(one, other):
            return (one[axis] - other[axis]) * sign > 0

        if a in ("What is", "Which object is"):
            return {t["name"] for t in things if beyond(t["box"], named[b])}  # next to it: one of these
        name = re.sub(r"^(Is|Are|Can you see) the ", "", a)
        return {"yes" if beyond(named[name], named[b]) else "no"}
    if match := re.search(r"(?:How many|Count the) (.*?)(?: are there| do you see)?[?.]$", question):
        kinds = [names for kind, names in of_kind.items() if KINDS[kind] == match[1]]
        counted = kinds[0] if kinds else [t["name"] for t in things if table.loc[t["name"], "plural"] == match[1]]
        return {NUMBERS[len(counted)]}
    if match := re.search(r"(?:Is there|Are there|Do you see|Does the picture show) (?:an?|some|the) (.*)\?", question):
        return {"yes" if match[1] in named else "no"}
    if match := re.search(r"color (?:is|are) the (.*)\?", question):
        return {table.loc[match[1], "colour"]}
    if match := re.search(r"is not (.*?)[?.]", question):
        kind = next(kind for kind, words in KIND_NAMES.items() if words == match[1])
        return {t["name"] for t in things if t["name"] not in of_kind[kind]}
    return None


@pytest.mark.parametrize("file", ["train.json", "heldout.json", "unseen.json"])
def test_every_question_has_one_right_answer(made, file):
    kinds = Counter()
    for entry in json.loads((made / file).read_text()):
        asked, told = entry["conversations"][::2], entry["conversations"][1::2]
        for kind, question, answer in zip(entry["types"], asked, told, strict=True):
            if kind == "caption":
                assert all(thing["name"] in answer["value"] for thing in entry["objects"])
                continue
            text, kinds[kind] = question["value"].removeprefix("<image>\n"), kinds[kind] + 1
            allowed = right_answers(text, entry["objects"])
            assert allowed and answer["value"] in allowed, (text, answer, entry["objects"])
            assert kind == "neighbour" or len(allowed) == 1, (text, allowed)
    assert len(kinds) >= 8 and (file != "train.json" or kinds.keys() == set(pictures.TYPES))


def test_neighbours_are_next_to_each_other():
    rng, checked = np.random.default_rng(0), 0
    while checked < 50:
        scene = Scene.sample(rng, pictures.TRAINED)
        asked = pictures.ask("neighbour", scene, rng)
        if asked is None:
            continue
        side, cells = next(side for side in SIDES if side in asked[0]), {t.cell: t.name for t in scene.things}
        name = re.search(f"{side} the (.*)\\?", asked[0])[1]
        (x, y), (dx, dy) = next(t.cell for t in scene.things if t.name == name), SIDES[side]
        assert cells[x + dx, y + dy] == asked[1]
        checked += 1


def test_vendors_are_kept_apart(made):
    vendors = {file: set() for file in ("train.json", "align.json", "heldout.json", "unseen.json")}
    for file in vendors:
        for entry in json.loads((made / file).read_text()):
            vendors[file] |= {thing["vendor"] for thing in entry["objects"]}
    trained = {"noto", "twemoji"}
    assert list(vendors.values()) == [trained, trained, trained, {"fluent3d"}]


@pytest.mark.slow
def test_no_constant_answers_much():
    rng, answers = np.random.default_rng(0), defaultdict(Counter)
    for _ in range(600):
        for kind, _, answer in pictures.turns(Scene.sample(rng, pictures.TRAINED), rng, 6):
            answers[kind][answer] += 1
    total = sum(map(Counter.total, answers.values()))
    assert sum(counts.most_common(1)[0][1] for counts in answers.values()) / total < 0.25
    for kind in ("relation", "presence"):
        assert 0.4 < answers[kind]["yes"] / answers[kind].total() < 0.6
    assert sum(answers[kind].total() for kind in ("what", "where", "neighbour", "odd")) / total > 0.45


def test_drawings_lie_where_the_boxes_say(made):
    """Two renderings that differ in the drawings alone differ within the boxes alone."""
    rng = np.random.default_rng(3)
    scene = Scene.sample(rng, pictures.TRAINED)
    empty = np.asarray(Scene(scene.grid, ()).render(np.random.default_rng(7)), dtype=int)
    drawn = np.asarray(scene.render(np.random.default_rng(7)), dtype=int)
    differ = np.abs(drawn - empty).sum(-1) > 0
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        assert differ[y0:y1, x0:x1].mean() > 0.2
        differ[y0:y1, x0:x1] = False
    assert not differ.any()


def test_the_data_set_opens_and_pictures_have_its_size(made):
    data = LlavaData(made / "train.json")
    assert len(data) == 120 and data[0].images[0].size == (168, 168)
    assert {asked["type"] for asked in data.questions()} == {*pictures.TYPES, "caption"}


def test_artwork_is_small_and_licensed():
    files = [file for file in pictures.PICTURES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6e6
    text = (pictures.PICTURES / "LICENSES.txt").read_text()
    for words in ("Apache License", "Creative Commons Attribution 4.0", "Permission is hereby granted, free of charge"):
        assert words in text
    table = pictures.objects()
    assert 150 <= len(table) <= 400 and table.name.is_unique and table.slug.is_unique
    for vendor in (*pictures.TRAINED, *pictures.UNSEEN):
        assert all(drawn[0].mode == "RGBA" for drawn in pictures.drawings(vendor))


def test_a_drawing_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    pictures.drawings.cache_clear()
    try:
        (tmp_path / "noto").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "noto" / "x.webp")
        with pytest.raises(DataError, match="a drawing of .* cannot be read .*; restore data/pictures"):
            pictures.drawings("noto")
    finally:
        pictures.drawings.cache_clear()
