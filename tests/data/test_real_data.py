"""Data as it is distributed: files too large to hold, entries and pictures that are broken or hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from benchmarks import training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerFast

from llavolta.data import Collator, DataError, GroupedSampler, LlavaData, find_bad, jsonlist, open_image, open_video
from llavolta.data import index as data_index
from llavolta.data.__main__ import main
from llavolta.data.collate import IGNORED
from llavolta.data.images import FORMATS, image_size
from llavolta.worlds import backbones
from llavolta.worlds.joining import VICUNA_TEMPLATE

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def entry(image: str | list | None = "a.png", **changes) -> dict:
    paths = [] if image is None else [image] if isinstance(image, str) else image
    turns = [{"from": "human", "value": "<image>" * len(paths) + "Is it red?"}, {"from": "gpt", "value": "yes"}]
    return {"id": 7, "image": image, "conversations": turns, **changes}


def video(path: str) -> dict:
    return {"id": 7, "video": path, "conversations": [dict(turn) for turn in SEEN]}


SEEN = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]


@pytest.fixture
def folder(tmp_path):
    """An image folder with one good picture of each of two formats."""
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "a.png")
    Image.fromarray(pixels).save(images / "a.jpg")
    return images


def write(folder, *entries):
    file = folder.parent / "data.json"
    file.write_text(json.dumps(entries))
    return file


# Large files


@fuzzed
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3), max_size=12),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["", "\n", " \r\n\t"]),
)
def test_an_index_finds_what_the_json_module_reads(tmp_path, values, ascii_only, indent, blank):
    file = tmp_path / "list.json"
    text = blank + json.dumps(values, ensure_ascii=ascii_only, indent=indent) + blank
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonlist, "LONGEST", 200)  # a few elements
        found = list(jsonlist.scan(file))
    assert [value for *_, value in found] == values
    assert [json.loads(file.read_bytes()[start:stop]) for start, stop, _ in found] == values


def test_opening_holds_neither_entries_nor_pictures(tmp_path, monkeypatch):
    training.write_mix(tmp_path / "mix.json", 3000)
    monkeypatch.setattr(Image, "open", None)
    opened = LlavaData(tmp_path / "mix.json")
    assert len(opened) == 3000 and 0.9 < opened.has_image.mean() < 0.97
    assert len(pickle.dumps(opened)) < 3000 * 60 < (tmp_path / "mix.json").stat().st_size / 10
    whole = json.loads((tmp_path / "mix.json").read_text())
    assert [opened.entry(index) for index in (0, 1500, 2999)] == [whole[0], whole[1500], whole[2999]]
    words = [sum(len(turn["value"].split()) for turn in one["conversations"]) for one in whole]
    assert opened.lengths.tolist() == words


def test_the_index_of_a_large_file_is_kept_until_the_file_changes(folder, monkeypatch, data_cache):
    monkeypatch.setattr(data_index, "KEPT_FROM", 0)
    file = write(folder, entry(), entry(None), [])
    with pytest.raises(DataError, match=r"data.json entry 2 has no .* bad: 1 of 3; .* check .*'bad_entries: skip'"):
        LlavaData(file, folder)
    first = LlavaData(file, folder, skip=())
    with monkeypatch.context() as patch:
        patch.setattr(data_index, "scan", None)
        again = LlavaData(file, folder, skip=())
    for name in ("start", "stop", "medium", "lengths"):
        assert np.array_equal(getattr(first.index, name), getattr(again.index, name))
    assert first.index.bad == again.index.bad and first.skipped == again.skipped == [2]
    kept = next(data_cache.glob("data-*.npz"))
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(LlavaData(file, folder, skip=())) == 2
    write(folder, entry())
    assert len(LlavaData(file, folder)) == 1
    with pytest.raises(DataError, match="has changed since it was opened"):
        first[0]


def test_workers_read_for_themselves(folder):
    opened = LlavaData(write(folder, *(entry(id=str(number)) for number in range(4))), folder)
    opened = pickle.loads(pickle.dumps(opened))  # as a process that starts anew gets it
    how = dict(num_workers=1, multiprocessing_context="fork")
    loader = DataLoader(opened, batch_size=2, collate_fn=_names, **how)
    assert [name[:12] for names in loader for name in names] == ["data.json en"] * 4


def _names(examples):
    return [example.name for example in examples]


# Bad entries


def test_check_names_every_bad_entry_and_why(folder, capsys):
    whole = (folder / "a.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "clip.mp4").write_bytes(b"frames")
    file = write(
        folder,
        *(entry(), entry("a.jpg"), entry(None), entry("no.jpg"), entry("cut.jpg"), entry("page.jpg")),
        *(entry("../data.json"), entry(["a.png", "no.png"]), {"id": 1}, video("clip.mp4"), video("no.mp4")),
    )
    bad = find_bad(file, folder, workers=1, progress=False)
    reasons = {
        3: "no image 'no.jpg'",
        4: "image 'cut.jpg' cannot be read",
        5: "image 'page.jpg' is a web page",
        6: "leads out of the image folder",
        7: "no image 'no.png'",
        8: "no 'conversations' list",
        9: "video 'clip.mp4' cannot be read",
        10: "no video 'no.mp4'",
    }
    assert list(bad) == list(reasons)
    for index, reason in reasons.items():
        assert bad[index].startswith(f"data.json entry {index}") and reason in bad[index]
    assert bad == find_bad(file, folder, workers=4, fresh=True, progress=False)

    assert main(["check", str(file), str(folder), "--workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [*bad.values(), "8 of 11 entries are bad"]
    of_others = "2 have images, 0 videos, 1 text alone; of their answers, 3 are learned, 0 are not"
    assert lines[-1] == f"of the others, {of_others}"
    assert main(["check", str(file), str(folder), "--json"]) == 1
    counts = {"images": 2, "videos": 0, "text": 1, "learned": 3, "unlearned": 0, "unread": {}}
    assert json.loads(capsys.readouterr().out) == {"entries": 11, "bad": {str(i): bad[i] for i in bad}} | counts
    assert main(["check", str(write(folder, entry())), str(folder)]) == 0
    assert main(["check", str(folder / "none.json")]) == 2 and "error: no data file" in capsys.readouterr().err
    assert main(["check", str(file), str(folder / "none")]) == 2 and "no image folder" in capsys.readouterr().err


def test_what_was_found_holds_while_the_images_stay_as_they_are(folder, monkeypatch):
    """Entries whose files came, went or changed are looked at again, those that share an image, too, and no others."""
    good, cut = (folder / "a.png").read_bytes(), (folder / "a.jpg").read_bytes()[:300]
    names = ["a.png", "late.png", "cut.png", ["a.png", "late.png"], "lost.png"]
    (folder / "cut.png").write_bytes(cut)
    (folder / "lost.png").write_bytes(good)
    file = write(folder, *map(entry, names), entry(None))
    looked = []
    monkeypatch.setattr(
        LlavaData, "check_media", lambda self, i, own=LlavaData.check_media: looked.append(i) or own(self, i)
    )

    def found() -> tuple[list[int], list[int]]:
        looked.clear()
        return list(find_bad(file, folder, progress=False)), sorted(looked)

    assert found() == ([1, 2, 3], [0, 1, 2, 3, 4, 5])
    assert found() == ([1, 2, 3], [])
    (folder / "late.png").write_bytes(good)
    assert found() == ([2], [1, 3])
    (folder / "cut.png").write_bytes(good)
    (folder / "lost.png").unlink()
    assert found() == ([4], [2, 4])
    stat = (folder / "a.png").stat()
    (folder / "new").write_bytes(cut.ljust(stat.st_size, b"\0"))  # another file of the same size and time
    os.utime(folder / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (folder / "new").replace(folder / "a.png")
    assert found() == ([0, 3, 4], [0, 3])
    assert found() == ([0, 3, 4], [])
    assert list(find_bad(file, folder, fresh=True, progress=False)) == [0, 3, 4] and len(looked) == 6
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert found()[1] == [0, 1, 2, 3, 4, 5]


def test_what_was_found_by_other_code_is_found_again(tmp_path, monkeypatch):
    before = data_index.kept_path(tmp_path / "a.json", "json")
    assert before == data_index.kept_path(tmp_path / "a.json", "json")
    data_index._code.cache_clear()
    monkeypatch.setattr(data_index.PIL, "__version__", "0")
    assert data_index.kept_path(tmp_path / "a.json", "json") != before
    data_index._code.cache_clear()


def test_entries_left_out_keep_the_names_of_the_others(folder):
    opened = LlavaData(write(folder, {}, entry("no.png"), entry(None), entry()), folder, skip=[1])
    assert opened.skipped == [0, 1] and opened.has_image.tolist() == [False, True] and opened.lengths.tolist() == [4, 4]
    assert opened[1].name == "data.json entry 3 (id 7)" and opened[1].images
    assert [question["index"] for question in opened.questions()] == [0, 1]
    with pytest.raises(DataError, match="all of its 2 entries are bad"):
        LlavaData(write(folder, {}, {}), folder, skip=())


def test_videos_are_counted_and_read_when_asked_for(folder):
    opened = LlavaData(write(folder, video("clip.mp4"), entry(None)), folder)
    assert opened.has_image.tolist() == [True, False]
    with pytest.raises(DataError, match="entry 0 .*: no video 'clip.mp4' in"):
        opened[0]
    with pytest.raises(DataError, match="1 <video> placeholders for 2 videos"):
        LlavaData(write(folder, {"conversations": SEEN, "video": ["a.mp4", "b.mp4"]}), folder)


def test_questions_of_a_conversation_with_a_system_message(folder):
    turns = [{"from": "system", "value": "Be brief."}, *entry()["conversations"]]
    opened = LlavaData(write(folder, entry(conversations=turns)), folder)
    assert [(q["question"], q["answer"]) for q in opened.questions()] == [("Is it red?", "yes")]
    with pytest.raises(DataError, match="'types' must name a type for each of the 1 questions"):
        LlavaData(write(folder, entry(types=["a", "b"])), folder)


# Hostile files


@fuzzed
@given(
    st.binary(max_size=60)
    | st.text('[]{},:"\\ \n019e-.truefalsnN\ud800é', max_size=60).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
)
def test_arbitrary_files_open_or_raise_the_documented_error(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataError):
        LlavaData(tmp_path / "data.json")


_WHOLE = json.dumps([entry(), entry(None), entry(["a.png", "b é.png"])], ensure_ascii=False).encode()


@fuzzed
@given(st.integers(0, len(_WHOLE)), st.integers(0, 20), st.binary(max_size=4))
def test_damaged_files_open_or_raise_the_documented_error(tmp_path, at, cut, put):
    file = tmp_path / "data.json"
    file.write_bytes(_WHOLE[:at] + put + _WHOLE[at + cut :])
    try:
        opened = LlavaData(file)
    except DataError as error:
        assert str(error).startswith((str(file), "data.json entry"))
    else:
        assert [opened.entry(index) for index in range(len(opened))] == json.loads(file.read_text())


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"[" + b'{"a":' * 100_000,
        b"[" + b"9" * 5000 + b"]",
        b'[{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}]',
        b'[{"conversations": [{"from": []}]}]',
        b"\xef\xbb\xbf[]",
    ],
)
def test_files_made_to_break_a_reader(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataError):
        LlavaData(tmp_path / "data.json")


def _encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


PICTURES = {kind: _encoded(kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it reads all the same
@settings(fuzzed, max_examples=300)
@given(st.sampled_from(list(PICTURES)), st.data())
def test_damaged_pictures_open_or_raise_the_documented_error(tmp_path, kind, drawn):
    content = bytearray(PICTURES[kind])
    for _ in range(drawn.draw(st.integers(1, 4))):
        at = drawn.draw(st.integers(0, min(len(content), 200) - 1))  # headers break in more ways than pixels
        content[at] = drawn.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content[: drawn.draw(st.integers(0, len(content)))])
    for eighth in (False, True):
        try:
            assert open_image(tmp_path, "a", "entry", eighth=eighth).mode == "RGB"
        except DataError as error:
            assert str(error).startswith("entry: ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bombs_are_refused(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side, name in ((10_000, "a"), (100_000, "b")):  # Pillow warns of the first and refuses the second
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))
        with pytest.raises(DataError, match="image '.' cannot be read .*(too many|exceeds limit)"):
            open_image(tmp_path, name, "entry")


def test_paths_out_of_the_folder_are_refused_and_links_in_it_followed(folder):
    disk = folder.parent / "disk"
    (disk / "deep").mkdir(parents=True)
    for outside in (folder.parent / "secret.png", disk / "deep" / "1.png"):
        outside.write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "gqa").symlink_to(disk / "deep")  # as COCO, GQA and OCR-VQA stand on other disks
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder.parent / "not mounted")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    absolute = str(folder.parent / "secret.png")
    for path in (absolute, "../secret.png", "sub/../../secret.png", "/etc/passwd", "..\\secret.png"):
        with pytest.raises(DataError, match="leads out of the image folder"):
            open_image(folder, path, "entry")
    (disk / "secret.png").write_bytes((folder / "a.png").read_bytes())
    missing = ("loop", "", ".", "sub", "pipe", "a.png/b", "a\0b", "\ud800", "x" * 5000)
    for path in (*missing, "gone/1.png", "gqa/../secret.png"):
        with pytest.raises(DataError, match="^entry: (no image|image)"):
            open_image(folder, path, "entry")
    for path in ("link.png", "gqa/1.png", "gqa\\1.png", "sub/../a.png", str(folder / "a.png")):
        assert open_image(folder, path, "entry").size == (64, 64)
    (folder.parent / "shortcut").symlink_to(folder)
    assert open_image(folder.parent / "shortcut", str(folder / "a.png"), "entry").size == (64, 64)


def test_what_stands_in_place_of_a_file_is_named_with_the_cure(folder):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    kinds = {
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        "page": (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        "drawing": (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
            "an SVG drawing; save it as PNG",
        ),
        "document": (b"%PDF-1.7", "a PDF document"),
        "phone": (heic, "HEIC.*save it as JPEG"),
        "zipped": (b"PK\x03\x04", "a zip archive; unpack it"),
        "gzipped": (b"\x1f\x8b\x08", "compressed with gzip; unpack it"),
        "tarred": (bytes(257) + b"ustar", "a tar archive; unpack it"),
        "empty": (b"", "empty; fetch"),
    }
    for name, (content, match) in kinds.items():
        (folder / name).write_bytes(content)
        for read in (open_image, image_size):
            with pytest.raises(DataError, match=f"^entry: image '{name}' is {match}"):
                read(folder, name, "entry")
        with pytest.raises(DataError, match=f"^entry: image '0' is {match}"):
            open_image(folder, "0", "entry", content=content)
        with pytest.raises(DataError, match=f"^entry: video '{name}' is {match}"):
            open_video(folder, name, "entry", 2)
        with pytest.raises(DataError, match=f"{name} is {match}"):
            LlavaData(folder / name)
    with pytest.raises(DataError, match="zipped is a zip archive; unpack it"):
        open_image(folder, "zipped/a.png", "entry")
    with pytest.raises(DataError, match="the image folder .*zipped is a zip archive"):
        LlavaData(write(folder, entry()), folder / "zipped")
    with pytest.raises(DataError, match="is an address; download it"):
        open_image(folder, "https://example.org/a.png", "entry")


def test_a_data_file_of_another_encoding_or_form_is_named(folder, monkeypatch):
    file = folder / "data.json"
    rows = json.dumps([entry(None, id="x" * 500, source="café")], ensure_ascii=False)
    for block in (1 << 23, 10):  # also behind the first block that is read
        monkeypatch.setattr(jsonlist, "LONGEST", block)
        for encoding, named in (
            ("latin-1", "not UTF-8 .*Latin-1.*iconv"),
            ("utf-16", "UTF-16"),
            ("utf-16-le", "UTF-16"),
        ):
            file.write_text(rows, encoding=encoding)
            with pytest.raises(DataError, match=f"data.json is {named}"):
                LlavaData(file)
    monkeypatch.undo()
    file.write_text("datasets:\n  - json_path: a.json\n")
    with pytest.raises(DataError, match="data.json begins with 'datasets.*give a JSON list"):
        LlavaData(file)
    file.write_text(rows, encoding="utf-8-sig")
    assert LlavaData(file).entry(0)["source"] == "café"


@fuzzed
@given(st.text(st.sampled_from("./ab\0~%é\ud800"), max_size=12))
def test_arbitrary_paths_open_or_raise_the_documented_error(tmp_path, path):
    (tmp_path / "a").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="^entry: "):
        open_image(tmp_path / "a", path, "entry")


# LLaVA-1.5's conversations

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MARKED = (  # the same conversation, for transformers to find what the assistant says
    f"{SYSTEM} "
    "{% for message in messages %}{% set text = message.content[-1].text %}{% if message.role == 'user' %}USER: "
    "{% if message.content|length > 1 %}<image>\n{% endif %}{{ text }} ASSISTANT:"
    "{% else %} {% generation %}{{ text }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def vicuna():
    """A processor with LLaVA's template and a tokenizer made like Llama's: word pieces that begin with their blank."""
    spoken = f"{SYSTEM} USER: ASSISTANT: What is in the picture? Two dogs, \n running. And the weather? It is sunny!"
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words.train_from_iterator([spoken] * 5, trainers.BpeTrainer(special_tokens=special, max_token_length=6))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=False))
    processor = backbones.processor()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=["<image>"], **names
    )
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = VICUNA_TEMPLATE
    return processor


def test_conversations_and_labels_are_those_of_llava(folder, vicuna):
    said = [("What is in the picture?", "Two dogs,\n running."), ("And the weather?", "It is sunny!")]
    turns = [{"from": who, "value": text} for pair in said for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "What is in the picture?\n<image>"  # where half of the entries have it
    text_only = [{**turns[0], "value": "What is in the picture?"}, *turns[1:]]
    opened = LlavaData(write(folder, entry(conversations=turns), {"conversations": text_only}), folder)
    batch = Collator(vicuna)([opened[0], opened[1]])
    for row, picture in enumerate(("<image>\n", "")):
        # What LLaVA writes: the system message, each round, and an end token without a blank behind it.
        rounds = [f"USER: {q} ASSISTANT: {a}</s>" for q, a in said]
        text = f"{SYSTEM} {''.join(rounds)}".replace("USER: What", f"USER: {picture}What")
        assert vicuna.apply_chat_template(opened[row].messages) == text
        ids = batch["input_ids"][row]
        seen = batch["attention_mask"][row].bool() & (ids != vicuna.image_token_id)
        plain = torch.tensor(vicuna.tokenizer(text)["input_ids"])
        assert torch.equal(ids[seen], plain[plain != vicuna.image_token_id])
        # What LLaVA labels, by transformers' own account of what the assistant says.
        told = vicuna.tokenizer.apply_chat_template(
            opened[row].messages,
            chat_template=MARKED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        wanted = torch.where(torch.tensor(told["assistant_masks"]).bool(), torch.tensor(told["input_ids"]), IGNORED)
        labels = batch["labels"][row]
        wanted = wanted[torch.tensor(told["input_ids"]) != vicuna.image_token_id]
        assert torch.equal(labels[seen][1:], wanted) and labels[0] == IGNORED  # the first is <s>
        assert vicuna.tokenizer.decode(labels[labels != IGNORED]) == " ".join(f"{a}</s>" for _, a in said)


# Batches of several processes


@pytest.mark.parametrize("accumulated", [1, 2])
def test_processes_get_parts_of_the_same_batches_in_step(accumulated):
    rng, size, processes = np.random.default_rng(0), 4, 2
    lengths, has_image = rng.integers(1, 500, 997), rng.random(997) < 0.7
    batch = size * processes * accumulated
    sampler = GroupedSampler(lengths, has_image, batch, seed=3)
    parts = []
    for rank in range(processes):  # as accelerate deals them out
        batches = BatchSampler(sampler, size, drop_last=False)
        parts.append(list(BatchSamplerShard(batches, num_processes=processes, process_index=rank)))
    assert len(parts[0]) == len(parts[1])
    steps = np.array([np.concatenate(pair) for pair in zip(*parts, strict=True)][: 900 // (size * processes)])
    assert len(np.unique(steps)) == steps.size  # disjoint
    pictured = has_image[steps.reshape(-1, batch)]
    assert (pictured == pictured[:, :1]).all()  # one modality in an optimizer step, on every process
    mean = np.array([[lengths[part].mean() for part in pair] for pair in zip(*parts, strict=True)][: len(steps)])
    apart = np.abs(mean[:, 0] - mean[:, 1]).mean()
    shuffled = rng.permutation(lengths)[: steps.size].reshape(-1, 2, size).mean(2)
    assert apart < 0.3 * np.abs(shuffled[:, 0] - shuffled[:, 1]).mean()
