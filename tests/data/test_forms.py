"""Each form of entry that data/README.md names, in JSON and in Parquet: read as it is meant, or refused by name."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from llavolta.data import Collator, DataError, LlavaData, find_bad
from llavolta.data.__main__ import main
from llavolta.data.collate import IGNORED
from llavolta.data.entries import MEDIA, chat_messages, media_paths_of, read_entry
from llavolta.studies.evaluation import asked_digest
from llavolta.train.build import open_data
from llavolta.train.config import TrainConfig
from llavolta.worlds import backbones
from llavolta.worlds.clips import write_clip

COLOURS = {"red.png": (208, 32, 32), "blue.png": (32, 64, 208)}
RED = {"type": "image"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(made / name)
    return made


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content="yes", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def llava(question="<image>\nIs it red?", answer="yes") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def parts(*found: dict, **more) -> list[dict]:
    text = {"type": "text", "text": "Is it red?"}
    return [user([*found, text]), assistant([{"type": "text", "text": "yes"}], **more)]


def inline() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS["red.png"]).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


ADDRESS = f"data:image/png;base64,{inline()}"
MARKED = [user("<image>Is it red?"), assistant()]
PLAIN = [user("Is it red?"), assistant()]

READ = {
    "LLaVA": {"image": "red.png", "conversations": llava()},
    "LLaVA, a list": {"image": ["red.png"], "conversations": llava()},
    "ShareGPT, images": {"images": ["red.png"], "conversations": llava()},
    "messages, image": {"image": "red.png", "messages": MARKED},
    "messages, images": {"images": ["red.png"], "messages": MARKED},
    "messages without a placeholder": {"images": ["red.png"], "messages": PLAIN},
    "roles in conversations": {"image": "red.png", "conversations": MARKED},
    "messages as JSON text": {"images": ["red.png"], "messages": json.dumps(MARKED)},
    "images as objects": {"images": [{"path": "red.png", "bytes": None}], "messages": MARKED},
    "parts, images beside": {"images": ["red.png"], "messages": parts(RED)},
    "part with image": {"messages": parts({"type": "image", "image": "red.png"})},
    "part with path": {"messages": parts({"type": "image", "path": "red.png"})},
    "part with url": {"messages": parts({"type": "image", "url": "red.png"})},
    "part with base64": {"messages": parts({"type": "image", "base64": inline()})},
    "part with a data address": {"messages": parts({"type": "image", "image": ADDRESS})},
    "OpenAI's parts": {"messages": parts({"type": "image_url", "image_url": {"url": ADDRESS}})},
    "OpenAI's newer parts": {"messages": parts({"type": "input_image", "image_url": ADDRESS})},
    "base64 beside": {"images": [inline()], "messages": MARKED},
    "prompt and completion": {"images": ["red.png"], "prompt": MARKED[:1], "completion": MARKED[1:]},
    "prompt and completion, texts": {"images": ["red.png"], "prompt": "Is it red?", "completion": "yes"},
    "FineVision": {"images": ["red.png"], "texts": [{"user": "Is it red?", "assistant": "yes"}]},
}


def write(file: Path, *rows: dict) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_form_that_is_read(form, kind, folder, tmp_path):
    data = LlavaData(write(tmp_path / f"rows.{kind}", READ[form]), folder)
    [example] = [data[index] for index in range(len(data))]
    assert [image.getpixel((4, 4)) for image in example.images] == [COLOURS["red.png"]]
    asked = [RED, {"type": "text", "text": "Is it red?"}]
    assert example.messages == [user(asked), assistant([{"type": "text", "text": "yes"}])]
    assert data.medium.tolist() == [1] and data.questions_of(0)[0]["question"] == "Is it red?"
    assert asked_digest(data, data.questions_of(0))  # the files are found again


_ODD = st.sampled_from([None, True, 0, 0.5, "", "a.png", "<image>", "data:,", "https://a.org", "[{}]", b"a", "\ud800"])
_VALUES = st.recursive(
    _ODD, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "bytes", "url"]), inner)
)
_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video"]), "text": st.sampled_from(["a", "<image>"])},
    optional=dict.fromkeys(["image", "path", "index", "fps"], _VALUES),
)
_CONTENTS = st.lists(_PARTS | _ODD, max_size=3) | st.sampled_from(["a", "<image>\na", "<video>"]) | _VALUES
_TURNS = [
    st.fixed_dictionaries({"role": st.just(role), "content": _CONTENTS}, optional={"loss": _VALUES, "images": _VALUES})
    for role in ("user", "assistant")
]


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"messages": st.tuples(*_TURNS).map(list)},
        optional=dict.fromkeys(["image", "images", "videos", "system", "tools", "types"], _VALUES),
    )
)
def test_any_entry_has_as_many_images_as_places_or_is_refused_by_name(entry):
    try:
        found = read_entry(entry, "entry")
    except DataError as error:
        assert str(error).startswith("entry")
        return
    kinds = [part["type"] for message in chat_messages(found) for part in message["content"]]
    assert all(kinds.count(medium) == len(media_paths_of(found, medium)) for medium in MEDIA)
    assert read_entry(found, "entry") == found


def test_images_in_a_table_in_all_types_of_column(folder, tmp_path):
    content = (folder / "red.png").read_bytes()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    large = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    columns = {
        "image": [(struct, {"bytes": content}), (pa.binary(), content), (pa.string(), "red.png")],
        "images": [
            *((pa.list_(struct), [{"bytes": content}]), (pa.list_(pa.binary()), [content])),
            *((pa.list_(pa.string()), ["red.png"]), (pa.large_list(large), [{"bytes": content}])),
            (pa.list_(struct), [{"path": "red.png"}]),
        ],
    }
    for name, types in columns.items():
        for kind, value in types:
            rows = pa.table({"conversations": [llava(), llava("Say yes")], name: pa.array([value, None], kind)})
            parquet.write_table(rows, tmp_path / "rows.parquet")
            data = LlavaData(tmp_path / "rows.parquet", folder)
            assert data[0].images[0].getpixel((4, 4)) == COLOURS["red.png"] and not data[1].images, kind


def test_the_address_of_a_file_is_its_path(folder, tmp_path):
    row = {"image": (folder / "red.png").as_uri(), "conversations": llava()}
    [example] = LlavaData(write(tmp_path / "rows.jsonl", row), folder)
    assert example.images[0].getpixel((4, 4)) == COLOURS["red.png"]


def test_parts_take_the_image_of_their_index(folder, tmp_path):
    talk = [user([{"type": "text", "text": "First "}, {**RED, "index": 1}, {**RED, "index": 0}])]
    talk.append(assistant([{"type": "text", "text": "yes"}]))
    for kind in ("jsonl", "parquet"):
        data = LlavaData(write(tmp_path / f"rows.{kind}", {"images": list(COLOURS), "messages": talk}), folder)
        assert [image.getpixel((4, 4)) for image in data[0].images] == list(COLOURS.values())[::-1]


def test_a_word_in_a_text_beside_a_part_is_a_word(folder, tmp_path):
    talk = [user([{**RED, "image": "red.png"}, {"type": "text", "text": "Is <image> a tag?"}]), assistant()]
    [example] = LlavaData(write(tmp_path / "rows.jsonl", {"messages": talk}), folder)
    assert example.messages[0]["content"] == [RED, {"type": "text", "text": "Is < image> a tag?"}]


ONE = {"image": "red.png", "conversations": llava()}
REFUSED = {
    "placeholder and null": (
        {"image": None, "conversations": llava()},
        "has a place for an image, <image>, and no image",
    ),
    "placeholder alone": ({"conversations": llava()}, "has a place for an image"),
    "placeholder within, list empty": ({"images": [], "messages": [user("See <image>?"), assistant()]}, "has a place"),
    "part alone": ({"messages": parts(RED)}, "1 <image> placeholders for 0 images"),
    "a clip's part alone": ({"messages": parts({"type": "video"})}, "1 <video> placeholders for 0 videos"),
    "empty path": ({"image": "", "conversations": llava("Is it red?")}, "'image' must be a path"),
    "null in a list": ({"images": ["red.png", None], "messages": MARKED}, "'image' must be a path"),
    "no placeholder": ({"image": "red.png", "conversations": llava("Is it red?")}, "0 <image> placeholders for 1"),
    "both keys": ({"image": "red.png", "images": ["blue.png"], "messages": MARKED}, "both 'image' and 'images'"),
    "a key nothing reads": (
        {"image_path": "red.png", "conversations": llava("Is it red?")},
        "nothing reads 'image_path'",
    ),
    "a second key": ({**ONE, "image2": "blue.png"}, "nothing reads 'image2'"),
    "images of a turn": ({"messages": [user("Is it red?", images=["red.png"]), assistant()]}, "nothing reads 'images'"),
    "a store": ({"image": "s3://a/red.png", "conversations": llava()}, "is on the web; fetch it"),
    "web": ({"image": "https://a.org/red.png", "conversations": llava()}, "is on the web; fetch it"),
    "not base64": ({"image": "data:image/png;base64,a", "conversations": llava()}, "is not base64"),
    "an index of none": ({"images": ["red.png"], "messages": parts({**RED, "index": 1})}, "indices"),
    "a strange part": ({"messages": parts({"type": "audio", "audio": "a.wav"})}, "must be a text, an image or a video"),
    "sized": ({"messages": parts({**RED, "image": "red.png", "max_pixels": 9})}, "nothing reads 'max_pixels'"),
    "frames": ({"video": ["a.jpg", "b.jpg"], "conversations": llava("<video>x")}, "lists frames"),
    "frames, nested": ({"videos": [["a.jpg"]], "messages": [user("<video>x"), assistant()]}, "lists frames"),
    "marks for frames": (
        {"video": "a.mp4", "conversations": llava("<image><image>x")},
        "2 <image> placeholders for 1 videos",
    ),
    "both conversations": ({"messages": PLAIN, "conversations": llava("x")}, "both 'messages' and 'conversations'"),
    "system twice": ({"system": "a", "messages": [{"role": "system", "content": "b"}, *PLAIN]}, "'system' must be"),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, "has 'instruction' and 'output'"),
    "query": ({"query": "a", "response": "b"}, "has 'query' and 'response'"),
    "question": ({"question": "a", "answer": "b"}, "has 'question' and 'answer'"),
    "another role": ({"messages": [*PLAIN, {"role": "tool", "content": "a"}]}, "each turn needs 'from'"),
    "out of order": ({"messages": PLAIN[::-1]}, "must alternate"),
    "audio": ({"audio": "a.wav", "messages": PLAIN}, "nothing reads 'audio'"),
    "preferences": ({"messages": PLAIN, "chosen": "a", "rejected": "b"}, "has 'chosen'"),
    "tools": ({"tools": '[{"a": 1}]', "messages": PLAIN}, "nothing reads 'tools'"),
    "tool calls": ({"messages": [PLAIN[0], assistant(tool_calls=[{"id": "a"}])]}, "nothing reads 'tool_calls'"),
    "reasoning": ({"messages": [PLAIN[0], assistant(reasoning_content="a")]}, "nothing reads 'reasoning_content'"),
    "part of a weight": ({"messages": [PLAIN[0], assistant(weight=0.5)]}, "'weight' of a turn is 0.5"),
    "nothing to learn": ({"messages": [PLAIN[0], assistant(weight=0)]}, "none of its answers"),
    "a null turn": ({"messages": [PLAIN[0], None]}, "each turn needs"),
    "no list": ({"messages": "hello"}, "no 'conversations' list"),
}


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_form_that_is_refused(form, kind, folder, tmp_path):
    row, why = REFUSED[form]
    with pytest.raises(DataError, match=why):
        LlavaData(write(tmp_path / f"rows.{kind}", row), folder)


@pytest.mark.parametrize("key", ["loss", "weight", "train", "trainable", "learn"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_turn_that_is_not_to_be_learned(key, kind, tmp_path, capsys):
    talk = [user("is there a 3 ?"), assistant("no", **{key: 0}), user("is there a 4 ?"), assistant("yes", **{key: 1})]
    file = write(tmp_path / f"rows.{kind}", {"system": "is there", "messages": talk, "model": "x"})
    data, processor = LlavaData(file), backbones.processor()
    batch = Collator(processor)([data[0]])
    learned = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert processor.tokenizer.decode(learned) == "yes </s>"
    assert data[0].messages[0] == {"role": "system", "content": [{"type": "text", "text": "is there"}]}
    assert [question["answer"] for question in data.questions()] == ["yes"]
    assert main(["check", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = {"images": 0, "videos": 0, "text": 1, "learned": 1, "unlearned": 1, "unread": {"model": 1}}
    assert found == {"entries": 1, "bad": {}} | counts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_clips_are_read_from_wherever_they_stand(kind, folder, tmp_path):
    clip = folder / "clip.mp4"
    if not clip.exists():
        write_clip(clip, np.full((4, 32, 32, 3), 90, np.uint8))
    wide = [
        {"video": "clip.mp4", "conversations": llava("<video>\nIs it red?")},
        {"videos": ["clip.mp4"], "messages": PLAIN},
        {"messages": parts({"type": "video", "video": "clip.mp4"})},
        {"messages": parts({"type": "video_url", "video_url": {"url": clip.as_uri()}})},
    ]
    content = base64.b64encode(clip.read_bytes()).decode()
    wide.append({"video": {"base64": content}, "messages": PLAIN})
    wide.append({"messages": parts({"type": "video", "base64": content})})
    for row in wide + [{"videos": [{"bytes": clip.read_bytes()}], "messages": PLAIN}] * (kind == "parquet"):
        data = LlavaData(write(tmp_path / f"rows.{kind}", row), folder)
        [video] = data[0].videos
        assert len(video) == 8 and data[0].messages[0]["content"][0] == {"type": "video"} and data.medium[0] == 2


def test_keys_that_the_user_ignores(folder, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"tools": "[1]", **ONE}, {"messages": [PLAIN[0], assistant(thinking="a")]})
    assert list(find_bad(file, folder, progress=False)) == [0, 1]
    assert main(["check", str(file), str(folder), "--ignore", "tools", "--ignore", "thinking"]) == 0
    assert "1 have images, 0 videos, 1 text alone" in capsys.readouterr().out
    config = TrainConfig(output=str(tmp_path / "run"), ignore_keys=["tools", "thinking"], bad_entries="skip")
    data = open_data(config, file, folder)
    assert len(data) == len(data.without({0: "x"})) + 1 == 2 and data[0].images


def test_an_image_placeholder_stands_for_a_clip_where_there_is_no_image(tmp_path):
    """As in LLaVA-Video-178K."""
    entries = [{"video": "a.mp4", "conversations": llava("<image>\nWhat moves?")}]
    entries.append({"video": "a.mp4", "conversations": llava("<video>\nIs <image> a tag?")})
    data = LlavaData(write(tmp_path / "rows.jsonl", *entries), tmp_path)
    assert data.medium.tolist() == [2, 2]
    assert [data.entry(index)["conversations"][0]["value"][:7] for index in range(2)] == ["<video>"] * 2


@pytest.mark.parametrize("saved", [False, True])
def test_of_several_splits_train_is_read_and_named(saved, tmp_path, capsys):
    def rows(number: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"messages": PLAIN}] * number)

    splits = {"test": rows(1), "train": rows(2), "validation": rows(3)}
    if saved:
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for name, part in splits.items():
            part.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    capsys.readouterr()
    assert len(LlavaData(tmp_path / "data")) == 2
    assert "with the splits test, train, validation, 'train' is read" in capsys.readouterr().err
    assert len(LlavaData(tmp_path / "data" / "validation")) == 3
    if not saved:
        (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
        with pytest.raises(DataError, match="holds several splits .test, validation. and none is 'train'"):
            LlavaData(tmp_path / "data")
