"""Tables of chat messages and pictures, as TRL and the hub have them, read like LLaVA's JSON."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from llavolta.data import DataError, LlavaData, find_bad
from llavolta.data.__main__ import main
from llavolta.studies.evaluation import asked_digest
from llavolta.train.config import TrainConfig
from llavolta.train.run import train

TEXT, PARTS = "text", "parts"


def said(question: str, answer: str, form: str, marked: bool) -> list[dict]:
    if form == TEXT:
        return [
            {"role": "user", "content": f"<image>\n{question}" if marked else question},
            {"role": "assistant", "content": answer},
        ]
    picture = [{"type": "image", "text": None}] if marked else []
    return [
        {"role": "user", "content": [*picture, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture(scope="module")
def pairs(scenes):
    """The first questions of the scenes: question, answer, picture."""
    found = []
    for entry in json.loads((scenes / "train.json").read_text())[:40]:
        asked, answered = (turn["value"].replace("<image>", "").strip() for turn in entry["conversations"][:2])
        found.append((asked, answered, Image.open(scenes / entry["image"]).convert("RGB")))
    return found


def table(pairs, form=PARTS, marked=True, column="images") -> datasets.Dataset:
    rows = {"messages": [said(asked, answered, form, marked) for asked, answered, _ in pairs]}
    pictures = [[picture] if column == "images" else picture for *_, picture in pairs]
    made = datasets.Dataset.from_dict(rows | {column: pictures, "source": ["here"] * len(pairs)})
    kind = datasets.Image()
    return made.cast_column(column, datasets.List(kind) if column == "images" else kind)


@pytest.mark.parametrize("form", [TEXT, PARTS])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("where", ["file", "folder", "saved"])
def test_a_table_reads_like_json(pairs, form, marked, column, where, tmp_path):
    made, file = table(pairs[:6], form, marked, column), tmp_path / "chat"
    if where == "file":
        file = tmp_path / "chat.parquet"
        made.to_parquet(str(file))
    elif where == "folder":
        file.mkdir()
        made.select(range(4)).to_parquet(str(file / "0.parquet"))
        made.select(range(4, 6)).to_parquet(str(file / "1.parquet"))
    else:
        made.save_to_disk(str(file))
    data = LlavaData(file)
    assert len(data) == 6 and data.medium.tolist() == [1] * 6 and not find_bad(file, progress=False)
    for index, (asked, answered, picture) in enumerate(pairs[:6]):
        example = data[index]
        assert np.array_equal(np.asarray(example.images[0]), np.asarray(picture))
        assert example.messages == [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": answered}]},
        ]
        assert data.questions_of(index)[0]["answer"] == answered


def test_a_run_on_a_table_is_that_on_the_same_entries_in_json(pairs, small_model, tmp_path):
    (tmp_path / "pictures").mkdir()
    entries = []
    for number, (asked, answered, picture) in enumerate(pairs):
        picture.save(tmp_path / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answered}]
        entries.append(dict(id=str(number), image=f"pictures/{number}.png", conversations=turns))
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    table(pairs).to_parquet(str(tmp_path / "chat.parquet"))
    shared = dict(model=str(small_model), align_steps=0, max_steps=2, scheme=["1:avgpool:8", "none"], batch_size=4)
    runs = [
        train(TrainConfig(output=str(tmp_path / kind), data=str(tmp_path / f"chat.{kind}"), **shared), progress=False)
        for kind in ("json", "parquet")
    ]
    first, second = ((run / "model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_what_is_wrong_with_a_row_is_told(pairs, tmp_path, capsys):
    rows = table(pairs[:4]).to_list()
    rows[1]["images"] = []  # a placeholder and no picture
    rows[2]["images"] = [{"bytes": b"no picture", "path": None}]
    rows[3]["messages"] = rows[3]["messages"][:1]
    made = datasets.Dataset.from_list(rows)
    file = tmp_path / "bad.parquet"
    made.to_parquet(str(file))
    bad = find_bad(file, progress=False)
    assert (
        set(bad) == {1, 2, 3}
        and "1 <image> placeholders for 0 images" in bad[1]
        and "bad.parquet entry 3" in bad[3]
        and "cannot be read" in bad[2]
    )
    assert main(["check", str(file)]) == 1
    assert "entries are bad" in capsys.readouterr().out


def test_tables_that_are_none(tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read as a table"):
        LlavaData(tmp_path / "cut.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "other.parquet"))
    with pytest.raises(DataError, match="no column 'messages' nor 'conversations'; it has text"):
        LlavaData(tmp_path / "other.parquet")


@pytest.mark.parametrize("where", ["file", "saved", "beside"])
def test_answers_of_a_table_are_saved_under_its_images(pairs, where, tmp_path):
    """What names a sweep's and a comparison's saved answers depends on the bytes that the table, or a file, holds."""

    def digest(pairs, name: str) -> bytes:
        made, file = table(pairs), tmp_path / name
        if where == "saved":
            made.save_to_disk(str(file))
        elif where == "file":
            made.to_parquet(str(file := file.with_suffix(".parquet")))
        else:
            file.mkdir()
            for number, (*_, image) in enumerate(pairs):
                image.save(file / f"{number}.png")
            paths = [[{"bytes": None, "path": f"{number}.png"}] for number in range(len(pairs))]
            made = made.remove_columns("images").add_column("images", paths)
            made.to_parquet(str(file := file / "chat.parquet"))
        data = LlavaData(file)
        return asked_digest(data, list(data.questions()))

    other = [(asked, answered, image.rotate(90)) for asked, answered, image in pairs[:2]]
    assert digest(pairs[:2], "a") == digest(pairs[:2], "b") != digest(other, "c")
