"""Clips: how frames are read, what cannot be read, and training on them beside images."""

from __future__ import annotations

import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoLlavaForConditionalGeneration

from llavolta.compression.families import PIXELS
from llavolta.data import Collator, DataError, GroupedSampler, LlavaData, find_bad
from llavolta.data.__main__ import main
from llavolta.data.collate import IGNORED
from llavolta.data.video import frame_places, read_frames
from llavolta.studies import evaluation, inspect
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics
from llavolta.worlds import backbones, clips, digits
from llavolta.worlds.digits import NONE

TOKENS = 8 * 37  # of a clip: 6 x 6 patches and CLS a frame


def write_greys(file, greys, codec="libx264", times=None):
    """A clip of one grey a frame; times: of the frames, in tenths of a second."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), format="rgb24")
            frame.pts, frame.time_base = (times or range(len(greys)))[number], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def greys(file, count):
    return [float(np.asarray(frame).mean()) for frame in read_frames(file, count)]


# --- reading ---


def test_frames_are_taken_evenly_from_the_first_to_the_last(tmp_path):
    file = write_greys(tmp_path / "a.mp4", [20 * i for i in range(10)])
    assert greys(file, 4) == pytest.approx([0, 60, 120, 180], abs=6)
    assert frame_places(100, 8) == [0, 14, 28, 42, 57, 71, 85, 99]


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_other_containers_and_codecs(tmp_path, name, codec):
    assert greys(write_greys(tmp_path / name, [0, 100, 200], codec), 3) == pytest.approx([0, 100, 200], abs=8)


def test_fewer_frames_than_asked_are_shown_several_times(tmp_path):
    file = write_greys(tmp_path / "a.mp4", [10, 200])
    assert greys(file, 5) == pytest.approx([10, 10, 10, 200, 200], abs=6)
    assert greys(write_greys(tmp_path / "b.mp4", [90]), 3) == pytest.approx([90] * 3, abs=6)


def test_a_variable_frame_rate_is_sampled_by_number_not_by_time(tmp_path):
    file = write_greys(tmp_path / "a.mp4", [0, 60, 120, 180], times=[0, 1, 2, 50])
    assert greys(file, 4) == pytest.approx([0, 60, 120, 180], abs=6)


def write_sound(file):
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


def write_empty(file):
    with av.open(str(file), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.start_encoding()


def write_damaged(file):
    whole = bytearray(write_greys(file, np.random.default_rng(0).integers(0, 255, 30)).read_bytes())
    start = whole.find(b"mdat")
    whole[start + 60 : start + 900 : 7] = bytes(byte ^ 0x5A for byte in whole[start + 60 : start + 900 : 7])
    file.write_bytes(whole)


BAD = {
    "nothing.mp4": lambda file: file.write_bytes(b""),
    "text.mp4": lambda file: file.write_text("<html>404</html>"),
    "cut.mp4": lambda file: file.write_bytes(write_greys(file, range(10)).read_bytes()[:600]),
    "damaged.mp4": write_damaged,
    "sound.mp4": write_sound,
    "empty.mp4": write_empty,
    "picture.mp4": lambda file: Image.new("RGB", (8, 8)).save(file, format="PNG"),
    "list.mp4": lambda file: file.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n"
    ),
    "script.mp4": lambda file: file.write_text("ffconcat version 1.0\nfile good.mp4\n"),
}


def clip_entry(path, medium="video"):
    return digits.entry("a", str(path), [("Which way does it move?", "left")], medium)


def write_entries(folder, *entries):
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_error_that_names_entry_and_file(tmp_path, name):
    write_greys(tmp_path / "good.mp4", [1, 2])
    BAD[name](tmp_path / name)
    opened = LlavaData(write_entries(tmp_path, clip_entry(name)))
    with pytest.raises(
        DataError, match=rf"entry 0 .*{name}' (cannot be read .*; fetch it again|is a web page|is empty)"
    ) as caught:
        opened[0]
    assert "\n" not in str(caught.value)
    if name == "sound.mp4":
        assert "no video, only audio" in str(caught.value)


def test_missing_files_and_paths_out_of_the_folder(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    write_greys(tmp_path / "out.mp4", [1, 2])
    (inside / "link.mp4").symlink_to(tmp_path / "out.mp4")
    opened = LlavaData(write_entries(inside, *map(clip_entry, ("no.mp4", "../out.mp4", "link.mp4"))))
    for index, match in enumerate(("no video 'no.mp4'", "leads out of the video folder")):
        with pytest.raises(DataError, match=match):
            opened[index]
    assert len(opened[2].videos[0]) == 8  # links are followed


def test_frames_larger_than_pictures_may_be_are_refused(tmp_path, monkeypatch):
    file = write_greys(tmp_path / "a.mp4", [1, 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="32 x 32 pixels are too large"):
        read_frames(file, 2)


def test_bad_clips_are_found_and_skipped(tmp_path, capsys):
    write_greys(tmp_path / "good.mp4", [1, 2])
    BAD["sound.mp4"](tmp_path / "sound.mp4")
    file = write_entries(tmp_path, *map(clip_entry, ("good.mp4", "sound.mp4", "no.mp4")))
    bad = find_bad(file, progress=False)
    assert list(bad) == [1, 2] and "only audio" in bad[1] and "no video 'no.mp4'" in bad[2]
    assert len(LlavaData(file, skip=bad)) == 1
    assert main(["check", str(file)]) == 1 and "2 of 3 entries are bad" in capsys.readouterr().out


# --- the embedded clips ---


def test_the_clips_are_deterministic_and_show_what_is_asked(clip_data, tmp_path):
    again = clips.build(tmp_path / "again", clips=24, heldout=8, seed=1)
    for name in ("train.json", "heldout.json", "align.json", "clips/train_000003.mp4", "stills/train_000001.png"):
        assert (again / name).read_bytes() == (clip_data / name).read_bytes(), name
    layout = clips.Clips.sample(200, np.random.default_rng(0))
    pixels = layout.render("train", np.random.default_rng(1)).astype(float).mean(-1)
    frames = pixels - np.median(pixels, axis=(2, 3), keepdims=True)
    x = (frames.clip(30) - 30).sum(2) @ np.arange(clips.SIZE) / (frames.clip(30) - 30).sum((2, 3))
    moved = x[:, -1] - x[:, 0]
    way = np.array(list(clips.DIRECTIONS))[layout.way]
    assert (moved[way == "left"] < -10).all() and (moved[way == "right"] > 10).all()
    assert (np.abs(moved[np.isin(way, ["up", "down"])]) < 10).all()
    count = (layout.digits != NONE).sum(1)
    assert np.bincount(count, minlength=5)[1:].min() > 30
    shown = np.take_along_axis(layout.digits, layout.turn, axis=1)
    assert all(len(np.unique(row[clips.SEEN])) == n for row, n in zip(shown, count, strict=True))


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("direction", {"up"}),
        ("place", {"bottom left", "top left"}),
        ("order", {"7", "1"}),
        ("changes", {"2"}),
        ("appearance", {"yes", "no"}),
    ],
)
def test_questions_by_hand(kind, answers):
    sequence, places, rng = np.array([7, 3, 1]), ["bottom left", "middle left", "top left"], np.random.default_rng(0)
    asked = {clips.ask(kind, sequence, 2, places, rng) for _ in range(60)}
    assert {answer for _, answer in asked} == answers
    for question, answer in asked:
        if "before" in question:
            first, second = question.removeprefix("Is ").removesuffix("?").split(" before ")
            assert ("731".index(first) < "731".index(second)) == (answer == "yes")
        if "first" in question or "last" in question:
            assert answer == {"order": ("7", "1"), "place": ("bottom left", "top left")}[kind]["last" in question]


def test_every_word_is_known(clip_data):
    words = backbones.video_processor().tokenizer
    for file in ("train.json", "heldout.json", "align.json"):
        for entry in json.loads((clip_data / file).read_text()):
            for turn in entry["conversations"]:
                assert words.unk_token_id not in words(turn["value"]).input_ids, turn["value"]


# --- batches, training, compression ---


def test_clips_and_images_in_one_batch(clip_data, video_model):
    opened = LlavaData(clip_data / "train.json")
    _, processor = load_model(str(video_model))
    clip, still = int(np.flatnonzero(opened.medium == 2)[0]), int(np.flatnonzero(opened.medium == 1)[0])
    batch = Collator(processor)([opened[still], opened[clip], opened[clip]])
    assert batch["pixel_values"].shape == (1, 3, 48, 48) and batch["pixel_values_videos"].shape == (2, 8, 3, 48, 48)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [36, 0, 0]
    assert (batch["input_ids"] == processor.video_token_id).sum(1).tolist() == [0, TOKENS, TOKENS]
    labels = batch["labels"][1]
    told = [turn["value"] for turn in opened.entry(clip)["conversations"][1::2]]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == " </s> ".join(told) + " </s>"
    frames = read_frames(clip_data / opened.entry(clip)["video"], 8)
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values_videos"][0], pixels)
    with pytest.raises(DataError, match="LlavaProcessor reads no video"):
        Collator(backbones.processor())([opened[clip]])


@pytest.mark.parametrize("medium", ["image", "video"])
def test_a_black_row_of_the_other_medium_changes_no_loss(clip_data, video_model, medium):
    opened = LlavaData(clip_data / "train.json")
    model, processor = load_model(str(video_model))
    collator, rows = Collator(processor), np.flatnonzero(opened.medium == {"image": 2, "video": 1}[medium])[:2]
    batch = collator([opened[int(row)] for row in rows])
    more = collator.with_black(batch, medium)
    assert set(PIXELS.values()) <= more.keys() and not set(PIXELS.values()) <= batch.keys()
    old, length = batch["input_ids"].shape
    assert len(more["input_ids"]) == len(more["attention_mask"]) == len(more["labels"]) == old + 1
    assert (more["labels"][old] == IGNORED).all()
    visual = (more["input_ids"][old] == getattr(processor, f"{medium}_token_id")).sum()
    assert visual == {"image": 36, "video": 37}[medium]  # of one frame; that of a clip has CLS
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(more[key][:old, :length], batch[key])
    with torch.no_grad():
        assert model(**more).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    with pytest.raises(DataError, match="max_length 20 is less than a picture's visual tokens"):
        Collator(processor, max_length=20).with_black(batch, medium)


def test_batches_hold_one_medium(clip_data):
    opened = LlavaData(clip_data / "train.json")
    order = list(GroupedSampler(opened.lengths, opened.medium, batch=4, seed=0))
    assert sorted(order) == list(range(48)) and (opened.medium == 2).sum() == 24
    whole = np.array(order).reshape(-1, 4)
    assert all(len(set(opened.medium[batch])) == 1 for batch in whole)


def test_the_processor_saves_as_stock_and_loads_again(video_model, tmp_path):
    model, processor = load_model(str(video_model))
    assert type(model) is VideoLlavaForConditionalGeneration
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "VideoLlavaProcessor"
    assert settings["video_processor"]["video_processor_type"] == "VideoLlavaVideoProcessor"
    assert settings["video_processor"]["crop_size"] == {"height": 48, "width": 48}


@pytest.mark.parametrize("plan", ["none", "1:avgpool:8", "1:avgpool:8:per_frame=true", "1:avgpool3d:2:2"])
def test_each_plan_leaves_what_it_says_and_clips_side_by_side_stay_apart(clip_data, video_model, plan):
    model, processor = load_model(str(video_model))
    opened = LlavaData(clip_data / "heldout.json")
    question, clip = "Which way does it move?", opened[0].videos[0]
    view = inspect.view(model, processor, question, [clip], plan)
    assert (
        view.tokens[-1]
        == {
            "none": TOKENS,
            "1:avgpool:8": TOKENS // 8,
            "1:avgpool:8:per_frame=true": 8 * 5,
            "1:avgpool3d:2:2": 4 * (9 + 1),
        }[plan]
    )
    where = view.clip(8)
    assert where.shape == (8, 6, 6)
    shared = {number for number in where[0].ravel()} & {number for number in where[1].ravel()}
    assert bool(shared) == (plan in ("1:avgpool:8", "1:avgpool3d:2:2"))
    two = evaluation.prompts(model, processor, [(question, [clip, opened[1].videos[0]])])
    maps = inspect.token_map(model, two, plan)
    assert not maps or len(maps[1]) == (16 if "per_frame" in plan else 2)


def test_a_stage_trains_on_clips_and_stills_and_its_model_is_stock(clip_data, video_model, tmp_path):
    config = TrainConfig.from_preset(
        "video",
        output=str(tmp_path / "run"),
        model=str(video_model),
        data=str(clip_data / "train.json"),
        align_data=str(clip_data / "align.json"),
        align_steps=1,
        max_steps=6,
        batch_size=2,
        align_batch_size=2,
        log_steps=1,
    )
    folder = train(config, progress=False)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["plan"] for row in rows[::2]] == ["1:avgpool:8", "4:avgpool:8", "none"]
    assert rows[0]["tokens_per_layer"] == [TOKENS] + [TOKENS // 8] * 7
    assert rows[-1]["loss"] < rows[0]["loss"]
    start, trained = (load_model(str(path))[0].state_dict() for path in (video_model, folder))
    changed = {name.split(".")[1] for name in start if not torch.equal(start[name], trained[name])}
    assert {"multi_modal_projector", "language_model"} <= changed and not changed & {"image_tower", "video_tower"}
    model, processor = load_model(str(folder))
    heldout = LlavaData(clip_data / "heldout.json")
    for plan in ("none", "1:avgpool3d:4:3"):
        table = evaluation.evaluate(model, processor, heldout, plan, limit=5, progress=False)
        assert len(table) == 5 and set(table.type) == set(clips.QUESTION_TYPES)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)), ((0, -1, 1, 0), (1, 0))],
)
def test_a_clip_that_a_phone_turned_is_read_upright(tmp_path, matrix, corner):
    """The file's display matrix: by a quarter to the right, on its head, by a quarter to the left."""
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # the upper left corner
    clips.write_clip(tmp_path / "clip.mp4", frames)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and track, volume: ISO 14496-12, 8.3.2
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(content)
    for image in read_frames(tmp_path / "clip.mp4", 2):
        assert image.size == ((64, 48) if matrix[0] else (48, 64))
        quarters = np.asarray(image.resize((2, 2), Image.Resampling.BOX))[..., 0]
        assert np.argwhere(quarters > 200).tolist() == [list(corner)]
