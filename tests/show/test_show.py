"""python -m llavolta.show: questions answered and drawn, and one line for what cannot be."""

from __future__ import annotations

import pytest
from PIL import Image

from llavolta.show.__main__ import main

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(autouse=True)
def digits(scenes, monkeypatch):
    from dataclasses import replace

    from llavolta.worlds import WORLDS

    monkeypatch.setitem(WORLDS, "digits", replace(WORLDS["digits"], build=lambda *_: scenes))


def test_held_out_questions_are_answered_and_drawn(small_model, tmp_path, capsys):
    assert main([str(small_model), "--output", str(tmp_path / "a.png"), "--plan", "1:avgpool:8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("(right: " in line and "%" in line for line in lines[:4])  # a question of each type
    assert Image.open(tmp_path / "a.png").width > 800


def test_a_picture_of_ones_own(small_model, scenes, tmp_path, capsys):
    picture = next((scenes / "images").iterdir())
    asked = ["--picture", str(picture), "--question", "Is there a 3?", "--question", "Is there a 4?"]
    assert main([str(small_model), *asked, "--output", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("Is there a 3? ")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--question", "Is there a 3?"], "--question needs a --picture"),
        (["--picture", "PICTURE"], "--picture needs a --question"),
        (["--picture", "nowhere.png", "--question", "Is there a 3?"], "nowhere.png"),
        (["--picture", "PICTURE", "--question", "Where is the dog?"], "unknown to the tokenizer"),
        (["--count", "0"], "--count must be at least 1, not 0"),
        (["--plan", "9:avgpool:8"], "names layer 9"),
    ],
)
def test_what_cannot_be_is_one_line(small_model, scenes, tmp_path, capsys, given, told):
    picture = str(next((scenes / "images").iterdir()))
    given = [picture if word == "PICTURE" else word for word in given]
    assert main([str(small_model), *given, "--output", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err.strip()
    assert told in error.splitlines()[-1] and not (tmp_path / "a.png").exists()


def test_a_model_that_is_not_trained_yet_says_how(monkeypatch, tmp_path, capsys):
    import llavolta.worlds as worlds

    monkeypatch.setattr(worlds, "RUNS", tmp_path)
    monkeypatch.setattr(worlds, "NANO_TUNED", tmp_path / "none")
    assert main(["nano-tuned", "--picture", __file__, "--question", "x"]) == 1
    assert capsys.readouterr().err
