"""LLaVA JSON and pictures: what a batch holds, and one clear error for everything that is not right."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from llavolta import data
from llavolta.data import Collator, GroupedSampler, LlavaData, check_words, find_bad, find_too_long, open_image, to_rgb
from llavolta.data import index as data_index
from llavolta.data.__main__ import main
from llavolta.data.collate import IGNORED, _placed
from llavolta.data.entries import read_entry
from llavolta.errors import ConfigError, DataError
from llavolta.show import widgets
from llavolta.studies import evaluation, inspect, redundancy
from llavolta.studies.opening import trained_padding
from llavolta.train import run
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.worlds import backbones
from llavolta.worlds.joining import VICUNA_TEMPLATE


@pytest.fixture(scope="module")
def processor():
    return backbones.processor()


def entry(**changes) -> dict:
    turns = [("human", "<image>\nIs there a 3?"), ("gpt", "yes"), ("human", "Is there a 4?"), ("gpt", "no")]
    base = {"id": "a", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    return {**base, **changes}


def write(folder, *entries) -> LlavaData:
    Image.new("RGB", (96, 96), (200, 0, 0)).save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps(entries))
    return LlavaData(folder / "data.json")


def test_labels_are_the_answers_and_their_end_tokens_alone(tmp_path, processor):
    turns = [{"from": "human", "value": "Is there a 5?"}, {"from": "gpt", "value": "no"}]
    text_only = entry(image=None, conversations=turns)
    two = entry(image=["a.png", "a.png"])
    two["conversations"][0] = {"from": "human", "value": "<image>\n<image>\nIs there a 3?"}
    data = write(tmp_path, entry(), text_only, two)
    batch = Collator(processor)([data[0], data[1], data[2]])
    decode = processor.tokenizer.decode
    for row, answers in enumerate(["yes </s> no </s>", "no </s>", "yes </s> no </s>"]):
        labels = batch["labels"][row]
        assert decode(labels[labels != IGNORED]) == answers
        chosen = labels != IGNORED
        assert torch.equal(batch["input_ids"][row][chosen], labels[chosen])
    images = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert images.tolist() == [144, 0, 288] and batch["pixel_values"].shape == (3, 3, 96, 96)
    assert not batch["attention_mask"][1, -1] and batch["attention_mask"][:, 0].all()  # padded at the end


def test_a_text_only_batch_has_no_pictures(tmp_path, processor):
    data = write(tmp_path, entry(image=None, conversations=entry()["conversations"][2:]))
    assert "pixel_values" not in Collator(processor)([data[0], data[0]])


def test_truncation_keeps_what_it_can_and_refuses_what_it_cannot(tmp_path, processor):
    data = write(tmp_path, entry())
    whole = Collator(processor)([data[0]])
    first_answer = int((whole["labels"][0] != IGNORED).nonzero()[0])
    cut = Collator(processor, max_length=first_answer + 1)([data[0]])
    assert cut["input_ids"].shape[1] == first_answer + 1 and (cut["labels"] != IGNORED).sum() == 1
    with pytest.raises(DataError, match=r"entry 0 \(id 'a'\): no answer is left within max_length"):
        Collator(processor, max_length=first_answer)([data[0]])
    with pytest.raises(DataError, match="cuts off visual tokens"):
        Collator(processor, max_length=100)([data[0]])


def test_padding_to_squares_with_the_given_colour(tmp_path):
    write(tmp_path, entry())
    Image.new("RGB", (100, 50), (255, 255, 255)).save(tmp_path / "a.png")
    image = LlavaData(tmp_path / "data.json", pad=(1, 2, 3))[0].images[0]
    pixels = np.asarray(image)
    assert image.size == (100, 100) and (pixels[0, 0] == (1, 2, 3)).all() and (pixels[50, 50] == 255).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"conversations": None}, "entry 0 has no 'conversations'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'from'"),
        ({"conversations": entry()["conversations"][:3]}, "alternate"),
        ({"conversations": entry()["conversations"][::-1]}, "alternate"),
        ({"image": ["a.png", "a.png"]}, "1 <image> placeholders for 2 images"),
        ({"image": 7}, "'image' must be a path"),
        ({"image": [7]}, "'image' must be a path, a list of paths"),
    ],
)
def test_entries_that_are_not_llavas(tmp_path, change, match):
    with pytest.raises(DataError, match=match):
        write(tmp_path, entry(**change))


def test_pictures_that_cannot_be_read(tmp_path):
    data = write(tmp_path, entry())
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"entry 0 \(id 'a'\): image 'a.png' cannot be read"):
        data[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no image 'a.png'"):
        data[0]
    with pytest.raises(DataError, match="leads out of the image folder"):
        write(tmp_path, entry(image="../a.png"))[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        LlavaData(tmp_path / "none.json")
    file = tmp_path / "data.json"
    for content, match in ((b"[{", "is not JSON"), (b"\xff\xfe\x00", "is UTF-16"), (b"{}", "list"), (b"[]", "list")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=match):
            LlavaData(file)
    file.write_text(json.dumps([entry()]))
    with pytest.raises(DataError, match="no image folder"):
        LlavaData(file, tmp_path / "nowhere")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "id"]), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional={"id": _JSON, "image": _JSON, "conversations": _JSON}) | _JSON)
def test_arbitrary_entries_pass_or_raise_the_documented_error(value):
    try:
        read_entry(value, "entry")
    except DataError as error:
        assert str(error).startswith("entry")
    else:
        assert value["conversations"]


def test_batches_hold_one_modality_and_like_lengths():
    rng = np.random.default_rng(0)
    lengths, has_image = rng.integers(1, 500, 1003), rng.random(1003) < 0.7
    sampler = GroupedSampler(lengths, has_image, batch=8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    whole = np.array(order[: 1003 // 8 * 8]).reshape(-1, 8)[:-2]  # the left-overs stand at the end
    assert all(len(set(has_image[batch])) == 1 for batch in whole)
    spread = np.mean([np.ptp(lengths[batch]) for batch in whole])
    assert spread < 0.2 * np.mean([np.ptp(lengths[rng.permutation(1003)[:8]]) for _ in range(100)])
    assert order == list(GroupedSampler(lengths, has_image, batch=8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != order


# As llava-hf/llava-1.5-7b-hf has it: nothing ends an answer but a blank.
_ENDLESS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_every_answer_ends_in_the_end_token_whatever_the_template(scenes):
    data = LlavaData(scenes / "train.json")
    example = data[0]
    answers = sum(message["role"] == "assistant" for message in example.messages)
    for template, end in ((None, "eos"), (_ENDLESS, "eos"), (_CHATML, "<|im_end|>")):
        processor = backbones.processor()
        tokenizer = processor.tokenizer
        if template:
            processor.chat_template = template
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
        batch = Collator(processor)([example])
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        token = tokenizer.eos_token_id if end == "eos" else tokenizer.convert_tokens_to_ids(end)
        assert int((labels == token).sum()) == int((ids == token).sum()) - (
            len(example.messages) - answers if end != "eos" else 0
        )
        assert int((labels == token).sum()) == answers > 1
        rendered = processor.apply_chat_template(example.messages)
        plain = processor(text=[rendered], images=example.images, return_tensors="pt")["input_ids"][0]
        if template is _ENDLESS:
            assert ids[ids != token].tolist() == plain.tolist()
        else:
            assert ids.tolist() == plain.tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"]
)
def test_every_mode_shows_its_greys(mode):
    """Black, grey and white stay what they are, also in more than 8 bits, which Pillow itself clips to white."""
    grey = np.array([[0, 128, 255]], dtype=np.uint8)
    if mode.startswith("I;16"):
        image = Image.frombytes(
            mode, (3, 1), (grey * np.array(257)).astype(">u2" if mode[-1] == "B" else "<u2").tobytes()
        )
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "YCbCr", "HSV", "P") else "L")
        image = image.quantize() if mode == "P" else image.convert(mode)
    assert image.mode == mode
    shown = np.asarray(to_rgb(image)).astype(int)
    assert shown.shape == (1, 3, 3) and shown[0, 0].max() <= 1 and shown[0, 2].min() >= 254
    assert mode == "1" or np.abs(shown[0, 1] - 128).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_images_that_use_fewer_than_16_bits_are_not_black(bits, mode):
    values = np.array([[0, 2 ** (bits - 1), 2**bits - 1]])
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]
    image = Image.frombytes(mode, (3, 1), values.astype(kind).tobytes())
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pictures_stand_on_white_and_photographs_upright(tmp_path):
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255
    clear.quantize().save(tmp_path / "p.png")
    assert np.asarray(open_image(tmp_path, "p.png", "entry")).min() == 255
    lying, orientation = Image.new("RGB", (16, 8)), Image.Exif()
    orientation[0x0112] = 6  # turn right
    lying.save(tmp_path / "photo.jpg", exif=orientation)
    assert open_image(tmp_path, "photo.jpg", "entry").size == (8, 16)
    assert open_image(tmp_path, "photo.jpg", "entry", eighth=True).size == (1, 2)


@pytest.mark.parametrize("values", [np.array([[-1, 5]]), np.array([[0, 70000]])])
def test_depths_without_a_known_white_are_refused(tmp_path, values):
    for kind in (np.int32, np.float32):
        Image.fromarray(values.astype(kind)).save(tmp_path / "deep.tif")
        with pytest.raises(DataError, match="have no known white"):
            open_image(tmp_path, "deep.tif", "entry")


def turns(*texts: str) -> list[dict]:
    return [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * len(texts), texts, strict=False)]


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("<image>\nIs there a 3?", ["image", "Is there a 3?"]),
        ("Is there a 3?\n<image>", ["image", "Is there a 3?"]),  # goes first, as in LLaVA
        ("A: <image> B: <image> Which?", ["A: ", "image", "B:", "image", "Which?"]),
        ("See <image> here", ["See ", "image", "here"]),
        ("<image>\n<image>\nWhich?", ["image", "image", "Which?"]),
        ("<image>", ["image", ""]),
    ],
)
def test_pictures_keep_their_places_in_the_text(tmp_path, processor, asked, parts):
    number = asked.count("<image>")
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    write = [{"id": "a", "image": ["a.png"] * number, "conversations": turns(asked, "yes")}]
    (tmp_path / "d.json").write_text(json.dumps(write))
    example = LlavaData(tmp_path / "d.json")[0]
    content = example.messages[0]["content"]
    assert [part.get("text", part["type"]) for part in content] == parts
    for template in (processor.chat_template, VICUNA_TEMPLATE):
        text = processor.apply_chat_template(example.messages, chat_template=template)
        assert "".join(f"<{part}>\n" if part == "image" else part for part in parts) in text
    assert (Collator(processor)([example])["input_ids"] == processor.image_token_id).sum() == 144 * number


@pytest.mark.parametrize("word", ["<image>", "<video>"])
def test_words_that_look_like_media_are_text_where_there_are_none(tmp_path, processor, word):
    """As mix665k's entries about HTML and SVG have them."""
    write = [{"id": "a", "conversations": turns(f"what is {word} in html?", f"{word} is a tag")}]
    (tmp_path / "d.json").write_text(json.dumps(write))
    data = LlavaData(tmp_path / "d.json")
    batch = Collator(processor)([data[0]])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert not (batch["input_ids"] == processor.image_token_id).any() and word not in text
    assert word[1:] in data[0].messages[1]["content"][0]["text"] and next(data.questions())["question"].startswith(
        "what"
    )


def test_a_placeholder_outside_a_question_is_an_error():
    with pytest.raises(DataError, match="<image> in an answer or a system message"):
        read_entry(entry(conversations=turns("Draw a 3", "here: <image>")), "x")


def test_every_tensor_of_a_batch_is_cut_at_max_length(tmp_path):
    class Typed(type(backbones.processor())):
        def __call__(self, *args, **options):
            out = super().__call__(*args, **options)
            out["token_type_ids"] = torch.zeros_like(out["input_ids"])
            return out

    typed = backbones.processor()
    typed.__class__ = Typed
    write = [{"id": "a", "conversations": turns("is there a 3?", "yes", "is there a 4?", "no")}]
    (tmp_path / "d.json").write_text(json.dumps(write))
    batch = Collator(typed, max_length=10)([LlavaData(tmp_path / "d.json")[0]])
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(batch, torch.Size([1, 10]))


def test_what_was_found_is_found_again_where_its_file_is_damaged_or_cannot_be_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_index, "CACHE", tmp_path / "cache")  # of this test alone
    (tmp_path / "d.json").write_text(json.dumps([entry()]))
    found = find_bad(tmp_path / "d.json", progress=False)
    assert list(found) == [0]
    (kept,) = data_index.CACHE.glob("d-*.json")
    for damage in ("", "{", "[1]", "{}"):
        kept.write_text(damage)
        assert find_bad(tmp_path / "d.json", progress=False) == found
    monkeypatch.setattr(data_index, "CACHE", tmp_path / "d.json")  # no folder can be made there
    assert find_bad(tmp_path / "d.json", fresh=True, progress=False) == found
    assert "cannot be kept" in capsys.readouterr().err
    with pytest.raises(DataError, match="all of its 1 entries are bad; the first: .*no image 'a.png'"):
        LlavaData(tmp_path / "d.json", skip=found)


def test_a_data_loading_process_says_its_error_in_one_line(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([entry()]))
    loader = DataLoader(LlavaData(tmp_path / "d.json"), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(DataError) as raised:
        next(iter(loader))
    assert str(raised.value).startswith("d.json entry 0") and "\n" not in str(raised.value)


def test_words_that_the_tokenizer_does_not_know_are_refused(tmp_path, processor, small_model, capsys):
    """In training, asking and the check: they would all be <unk>, and nothing would be learnt of them."""
    known = turns("is there a 3?", "yes")
    shapes = [
        {"id": str(i), "conversations": turns(f"is a red blob{i} above the green cube?", "no")} for i in range(12)
    ]
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    few = [{"id": "x", "conversations": turns("is there a zebra?", "no")}]
    (tmp_path / "few.json").write_text(json.dumps([{"id": "a", "conversations": known}] * 200 + few))
    refused = "of the words of shapes.json are unknown to the tokenizer: 'red', 'blob0', 'above'.*-p model nano-tuned"
    with pytest.raises(DataError, match=refused):
        check_words(LlavaData(tmp_path / "shapes.json").texts(), processor.tokenizer, "shapes.json")
    check_words(LlavaData(tmp_path / "few.json").texts(), processor.tokenizer, "few.json")
    assert "0.1% of the words of few.json" in capsys.readouterr().err
    model, words = load_model(str(small_model))
    asked = LlavaData(tmp_path / "shapes.json")
    for ask in (
        lambda: evaluation.evaluate(model, words, asked, progress=False),
        lambda: redundancy.redundancy_sweep(model, words, asked, [1], [2], progress=False),
        lambda: redundancy.answer_attention(model, words, asked, progress=False),
    ):
        with pytest.raises(DataError, match=refused):
            ask()
    options = dict(model=str(small_model), data=str(tmp_path / "shapes.json"), align_steps=0, max_steps=3, batch_size=4)
    with pytest.raises(DataError, match=refused):
        run.train(TrainConfig(output=str(tmp_path / "run"), **options), progress=False)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "shapes.json"), "--model", str(small_model)]) == 1
    assert "are unknown to the tokenizer" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "shapes.json")]) == 0
    assert "--model NAME" in capsys.readouterr().err


def test_common_forms_of_a_data_file_are_read(tmp_path):
    plain = [{"id": str(i), "conversations": turns(f"wären es {i}?", "yes")} for i in range(3)]
    roles = {"human": "user", "gpt": "assistant"}

    def message(turn: dict) -> dict:
        text = turn["value"]
        parts = [{"type": "text", "text": text}] if turn["from"] == "human" else text
        return {"role": roles[turn["from"]], "content": parts}

    chat = [{"id": row["id"], "messages": [message(turn) for turn in row["conversations"]]} for row in plain]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in plain)
    for text in (
        json.dumps(plain, ensure_ascii=False),
        "\ufeff" + json.dumps(plain, ensure_ascii=False),
        lines,
        "\ufeff" + lines.replace("\n", "\r\n") + "\n\n",
        json.dumps(chat, ensure_ascii=False),
        json.dumps([{**row, "conversations": row["messages"]} for row in chat]),
    ):
        (tmp_path / "d.json").write_text(text, encoding="utf-8", newline="")
        opened = LlavaData(tmp_path / "d.json")
        assert [opened.entry(i)["conversations"] for i in range(3)] == [row["conversations"] for row in plain]
        (tmp_path / "d.json").unlink()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps([entry()]).encode("utf-16"), "d.json is UTF-16; save it as UTF-8"),
        (json.dumps(entry()).encode(), "d.json holds one object; write a list"),
        (json.dumps({"data": [entry()]}).encode() + b"\n", "d.json holds one object; write a list"),
        (json.dumps(entry()).encode() + b"\n" + json.dumps(entry()).encode()[:-9], "d.json is not JSON .* cut off"),
    ],
)
def test_other_forms_of_a_data_file_are_named(tmp_path, content, said):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        LlavaData(tmp_path / "d.json")


def test_what_is_asked_of_one_entry_opens_no_other(scenes, small_model, monkeypatch):
    """A large file must not be read from end to end for its first question."""
    model, processor = load_model(str(small_model))
    data, opened = LlavaData(scenes / "train.json"), []
    of_one = {index: [q for q in data.questions() if q["index"] == index] for index in (0, 7)}
    real = LlavaData.entry
    monkeypatch.setattr(LlavaData, "entry", lambda self, index: opened.append(int(index)) or real(self, index))
    assert list(data.questions_of(7)) == of_one[7] and set(opened) == {7}
    opened.clear()
    assert of_one[0][0].items() <= inspect.choose(data, 0)[0].items() and set(opened) == {0}
    opened.clear()
    explorer = widgets.redundancy_explorer(model, processor, data, layer=1, stride=8)
    assert explorer.question.value == of_one[0][0]["question"]
    explorer.entry.value = 7
    assert explorer.question.options == tuple(q["question"] for q in of_one[7])
    assert Counter(opened).most_common(1)[0][1] <= 10 and len(opened) < 64  # the list of pictures, once; then these
    with pytest.raises(ConfigError, match=r"questions 0\.\.\d+, not -1"):
        inspect.choose(data, -1)
    with pytest.raises(ConfigError, match=r"not 100000"):
        inspect.choose(data, 100000)
    with pytest.raises(ConfigError, match=r"not 1\.5"):
        inspect.choose(data, 1.5)


@pytest.mark.parametrize("pad", [None, (0, 0, 0)])
@pytest.mark.parametrize("by_size", [False, True])
def test_what_max_length_makes_unusable_is_found_without_pictures(tmp_path, processor, monkeypatch, by_size, pad):
    """The same entries that the collator refuses, for the same reasons; also where a picture's size decides."""
    turns = [("human", "<image>\nIs there a 3?"), ("gpt", "yes")]
    long = [("human", "<image>\n" + "Is there a 3? " * 40), ("gpt", "yes")]
    later = [("human", "Is there a 3?"), ("gpt", "no"), ("human", "<image>\nIs there a 4?"), ("gpt", "yes")]
    text = [("human", "Is there a 3? " * 100), ("gpt", "yes")]
    two = [("human", "<image><image>\nIs there a 3?"), ("gpt", "yes")]
    entries = []
    for number, (said, images) in enumerate([(turns, 1), (long, 1), (later, 1), (text, 0), (two, 2), (turns, 1)]):
        names = [f"{number}-{i}.png" for i in range(images)]
        for name in names:
            Image.new("RGB", (96, 96 if number < 5 else 20)).save(tmp_path / name)
        written = [{"from": who, "value": words} for who, words in said]
        entries.append({"id": number, "conversations": written} | ({"image": names} if names else {}))
    (tmp_path / "d.json").write_text(json.dumps(entries))
    if by_size:

        def expand(self, text, images=None, **options):
            counts = iter([image.height // 2 + image.width // 4 for of in images or () for image in of])
            parts = [one.split("<image>") for one in text]
            text = [a[0] + "".join("<image>" * next(counts) + part for part in a[1:]) for a in parts]
            batch = dict(self.tokenizer(text, padding=True, padding_side="right", return_tensors="pt"))
            return batch | {"pixel_values": torch.zeros(1)}

        monkeypatch.setattr(type(processor), "__call__", expand)
    data = LlavaData(tmp_path / "d.json", pad=pad)
    for max_length in (40, 85, 160, 170, 300, 2048):
        collate, refused = Collator(processor, max_length), {}
        for index in range(len(data)):
            try:
                collate([data[index]])
            except DataError as error:
                refused[index] = str(error)
        with monkeypatch.context() as patched:
            patched.setattr(LlavaData, "__getitem__", None)
            assert find_too_long(data, Collator(processor, max_length), progress=False) == refused
        assert bool(refused) == (max_length < 2048)
    left = data.without({1: "too long", 4: "too long"})
    assert left.skipped == [1, 4] and len(left) == 4 and left.pad == pad
    with pytest.raises(DataError, match="all of its 6 entries are bad; the first: too long"):
        data.without(dict.fromkeys(range(6), "too long"))


def test_pictures_are_padded_as_the_models_own_run_says(processor, tmp_path):
    colour = data.padding_colour(processor)
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "other").mkdir()
    assert trained_padding(processor, tmp_path / "run") is None
    assert trained_padding(processor, "org/x") is None
    (tmp_path / "run" / "config.yaml").write_text("pad_to_square: true")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "align"):
        assert trained_padding(processor, folder) == colour
        assert trained_padding(processor, folder, False) is None
    assert trained_padding(processor, tmp_path / "run" / "other") is None
    assert trained_padding(processor, tmp_path / "run" / "other", True) == colour


@pytest.mark.parametrize(
    ("ids", "written", "place"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([1, 2, 3, 4], [1, 2, 3], None),  # no picture, so nothing may be written
        ([1, 5, 6], [1, 0, 5, 6], [0, 1, 2]),  # nothing written beside the placeholders, 0
        ([1, 90, 91, 92, 5, 6], [1, 0, 5, 6], [0, 4, 5]),  # rows and tiles of a picture
        ([1, 90, 7, 8, 91, 91, 5, 6], [1, 0, 7, 8, 0, 5, 6], [0, 2, 3, 6, 7]),
        ([90, 7, 91, 7, 92, 5], [0, 7, 0, 5], [3, 5]),  # the nearest to the end
        ([90, 91, 5], [0, 0, 5], [2]),  # two pictures side by side
        ([1, 5, 7], [1, 0, 5, 6], None),
        ([2, 5, 6], [1, 0, 5, 6], None),
        ([1, 90, 8, 91, 5], [1, 0, 7, 0, 5], None),
    ],
)
def test_texts_are_found_between_what_a_processor_writes_around_pictures(ids, written, place):
    assert _placed(ids, written, [token != 0 for token in written]) == place


def test_an_answer_that_is_not_to_be_learned_has_no_label(tmp_path, processor):
    example = write(tmp_path, entry())[0]
    whole = Collator(processor)([example])
    example.messages[1]["learn"] = False
    batch = Collator(processor)([example])
    labels = batch["labels"][0]
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "no </s>"
