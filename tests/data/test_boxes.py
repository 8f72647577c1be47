"""Boxes in conversations: marks that nothing fills are refused, and what moves boxes is noted."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llavolta.data import DataError, LlavaData
from llavolta.data.__main__ import main
from llavolta.data.boxes import box_notes

SWIFT = {"objects": {"ref": ["square"], "bbox": [[12, 2, 18, 6]]}}


def write(folder, question: str, answer: str, image: bool = True, **more):
    Image.new("RGB", (20, 8)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>" * image + question}, {"from": "gpt", "value": answer}]
    (folder / "d.json").write_text(
        json.dumps([{"conversations": turns, **more} | ({"image": "a.png"} if image else {})])
    )
    return folder / "d.json"


@pytest.mark.parametrize("question, answer", [("Find the <ref-object>.", "yes"), ("Find it.", "<bbox>")])
@pytest.mark.parametrize("more", [SWIFT, {}])
def test_marks_that_nothing_fills_are_refused(tmp_path, question, answer, more):
    with pytest.raises(DataError, match="has the mark <(bbox|ref-object)>, which is not filled.*write the box"):
        LlavaData(write(tmp_path, question, answer, **more))
    assert len(LlavaData(write(tmp_path, question, answer, image=False))) == 1  # words of a text about such data


@pytest.mark.parametrize(
    "answer, padded, plain",
    [
        ("[0.6, 0.4, 0.9, 1]", [], ["padded square"]),
        ('[{"bbox_2d": [12, 2, 18, 6]}]', ["train without it"], ["size.longest_edge"]),
        ("<|box_start|>(600,250),(900,750)<|box_end|>", ["train without it"], ["size.longest_edge"]),
        ('<point x="75.0" y="50.0">square</point>', ["train without it"], ["size.longest_edge"]),
        ("[0, 1, 0, 1] and [3.5, 1, 2, 4] and (0.5, 0.5) at one point", [], []),
    ],
)
def test_what_moves_boxes_is_noted(tmp_path, capsys, answer, padded, plain):
    data = LlavaData(write(tmp_path, "Find it.", answer))
    for pad, expected in ((True, padded), (False, plain)):
        notes = box_notes(data, pad)
        assert len(notes) == len(expected) and all(part in note for part, note in zip(expected, notes, strict=True))
    assert main(["check", str(data.file)]) == 0
    assert capsys.readouterr().err.count("note: 1 of 1 entries looked at") == len(padded + plain)
    assert not box_notes(LlavaData(write(tmp_path, "Find it.", answer, image=False)), True)
