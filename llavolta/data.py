"""LLaVA's training data: a JSON list of conversations and a folder of pictures and clips.

``python -m llavolta.data check FILE [FOLDER]`` names every entry that cannot be trained on, and why; its exit status
is 0 if there is none, 1 if there are some, 2 if the file itself cannot be read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from llavolta.config import run_settings
from llavolta.errors import DataError, UserError
from llavolta.jsonlist import WrongFormat, scan
from llavolta.models import model_path
from llavolta.paths import DATA
from llavolta.video import FRAMES, read_frames

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
MEDIA = {"image": "<image>", "video": "<video>"}  # an entry's key, and what stands for it in the text
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # no reader that starts other programs
IGNORED = -100
CACHE = DATA / "cache" / "llava"
KEPT_FROM = 1 << 25  # bytes of a data file whose index is kept: a smaller one is indexed in a second

RARE = "\ua66e \U00013000"  # letters that no vocabulary of words holds
MAY_BE_UNKNOWN = 0.01  # of a file's words

_PLACEHOLDER = re.compile("<(image|video)>")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One conversation. messages: transformers' chat format. images: the opened pictures, RGB, in their order. videos:
    the frames of each clip."""

    messages: list[dict]
    images: list[Image.Image]
    name: str
    videos: list[list[Image.Image]] = field(default_factory=list)

    @property
    def looks(self) -> list:
        """Pictures, then clips, as ``evaluate.prompts`` takes them."""
        return [*self.images, *self.videos]


@dataclass(frozen=True)
class Index:
    """Where the n entries of a data file are, and what is known of them. Arrays (n,); bad: reasons by entry."""

    start: np.ndarray  # first byte
    stop: np.ndarray
    medium: np.ndarray  # 0 text alone, 1 with images, 2 with a video
    media: np.ndarray  # how many of them
    lengths: np.ndarray  # words, about: blanks are counted
    bad: dict[int, str]
    version: list[int]  # of the file: bytes and time


def read_index(file: Path) -> Index:
    """The index of a data file: one pass over it, kept in data/cache for a large one. Raises DataError."""
    if not file.is_file():
        raise DataError(f"no data file {file}; give the path of a JSON list of conversations")
    version, kept = _version(file), _cached(file, "npz")
    if kept.exists():
        try:
            held = dict(np.load(kept))
            index = Index(**{**held, "bad": _reasons(held["bad"].item()), "version": held["version"].tolist()})
            if index.version == version:
                return index
        except Exception:  # whatever numpy makes of a damaged file; it is made again
            kept.unlink(missing_ok=True)
    index = _scan_index(file, version)
    if version[0] >= KEPT_FROM:
        archive = io.BytesIO()
        np.savez(archive, **{**vars(index), "bad": json.dumps(index.bad)})
        _keep(kept, archive.getvalue())
    return index


def _scan_index(file: Path, version: list[int]) -> Index:
    starts, stops, words, medium, media, bad = array("q"), array("q"), array("q"), array("b"), array("q"), {}
    try:
        for start, stop, entry in scan(file):
            try:
                entry = as_llava(entry)
                text = check_entry(entry, f"{file.name} entry {len(starts)}")
                words.append(text.count(" ") + text.count("\n") + 1)
                images, videos = len(_paths(entry)), len(_paths(entry, "video"))
                medium.append(2 if videos else 1 if images else 0)
                media.append(images + videos)
            except DataError as error:
                bad[len(starts)] = str(error)
                for values in (words, medium, media):
                    values.append(0)
            starts.append(start)
            stops.append(stop)
    except WrongFormat as error:
        raise DataError(f"{file} {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON that holds a list ({error}); the download may be cut off") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error})") from None
    if not starts:
        raise DataError(f"{file} must hold a JSON list with at least one conversation")
    return Index(*map(np.array, (starts, stops, medium, media, words)), bad, version)


def _version(file: str | Path | int) -> list[int]:
    """What changes when a file does."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def _cached(file: Path, suffix: str, *more: object) -> Path:
    """Where something about ``file`` (and ``more``) is kept."""
    key = hashlib.sha256(repr([str(part) for part in (file.resolve(), *more)]).encode()).hexdigest()[:16]
    return CACHE / f"{file.stem}-{key}.{suffix}"


def _keep(kept: Path, content: bytes) -> None:
    """Write ``content`` at once, whatever other processes do; where that cannot be, say so and go on without."""
    part = kept.with_name(f"{kept.name}.part{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(kept)
    except OSError as error:
        print(f"note: {kept} cannot be kept ({error}); it will be made again next time", file=sys.stderr)


def _reasons(text: str) -> dict[int, str]:
    return {int(index): reason for index, reason in json.loads(text).items()}


class LlavaData(Dataset):
    """Conversations in LLaVA's format: ``id``, ``image`` and ``video`` (each a path, a list of paths or none),
    ``conversations``.

    file: the JSON list. images: the folder that the image paths are relative to (default: the JSON's own folder).
    pad: pad images to squares with this RGB colour, as LLaVA-1.5 does; None leaves them, and clips always are, as
    they are. frames: of each clip; see video.read_frames.
    skip: entries of the file to leave out, besides those of a wrong structure (see ``find_bad``, whose reasons are told
    if no entry is left); None: none are.

    The structure of every entry is checked on opening, each picture when it is read. Entries, pictures and frames are
    read from their files when asked for; none stay in memory. medium, has_image, lengths: arrays (n,); medium: 0 for
    text alone, 1 with images, 2 with a video, which has_image counts, too; lengths are in words. skipped: the entries
    of the file that are left out. Raises DataError.
    """

    def __init__(
        self,
        file: str | Path,
        images: str | Path | None = None,
        pad: tuple[int, int, int] | None = None,
        skip: Collection[int] | None = None,
        frames: int = FRAMES,
    ):
        self.file = Path(file)
        self.folder = Path(images) if images else self.file.parent
        self.pad, self.frames = pad, frames
        self.index = read_index(self.file)
        if not self.folder.is_dir():
            raise DataError(f"no image folder {self.folder}; give the folder that the image paths are relative to")
        bad = self.index.bad
        if bad and skip is None:
            raise DataError(
                f"{next(iter(bad.values()))}. Entries that are bad: {len(bad)} of {len(self.index.start)}; "
                f"'python -m llavolta.data check {self.file}' names them, 'bad_entries: skip' trains without them"
            )
        self.skipped = sorted({*bad, *(skip or ())})
        self.rows = np.setdiff1d(np.arange(len(self.index.start)), self.skipped)  # entries of the file
        if not len(self.rows):
            reasons = {**(skip if isinstance(skip, dict) else {}), **bad}
            first = f"; the first: {next(iter(reasons.values()))}" if reasons else ""
            raise DataError(f"{self.file}: all of its {len(self.index.start)} entries are bad{first}")
        self.medium, self.lengths = self.index.medium[self.rows], self.index.lengths[self.rows]
        self.has_image = self.medium > 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        entry = self.entry(index)
        name = self._name(index, entry)
        images = [open_image(self.folder, path, name, self.pad) for path in _paths(entry)]
        videos = [open_video(self.folder, path, name, self.frames) for path in _paths(entry, "video")]
        return Example(_messages(entry), images, name, videos)

    def without(self, reasons: dict[int, str]) -> LlavaData:
        """This data set without the entries of the file that ``reasons`` names. Raises DataError if none is left."""
        return LlavaData(self.file, self.folder, self.pad, {**reasons, **dict.fromkeys(self.skipped)}, self.frames)

    def entry(self, index: int) -> dict:
        """The entry, in LLaVA's format."""
        row = self.rows[index]
        start, stop = int(self.index.start[row]), int(self.index.stop[row])
        try:
            with self.file.open("rb") as source:
                if _version(source.fileno()) != self.index.version:
                    raise DataError(f"{self.file} has changed since it was opened; start again")
                source.seek(start)
                return as_llava(json.loads(source.read(stop - start)))
        except OSError as error:
            raise DataError(f"{self.file} can no longer be read ({error})") from None

    def _name(self, index: int, entry: dict) -> str:
        return f"{self.file.name} entry {self.rows[index]} (id {short(entry.get('id'))})"

    def media_paths(self, index: int) -> list[Path]:
        """The files of an entry's pictures and clips."""
        entry = self.entry(index)
        return [self.folder / path for medium in MEDIA for path in _paths(entry, medium)]

    def questions(self) -> Iterator[dict]:
        """Every turn as a question of its own: index (of the entry), type, question, answer."""
        return chain.from_iterable(map(self.questions_of, range(len(self))))

    def questions_of(self, index: int) -> list[dict]:
        """The ``questions`` of one entry; no other is opened."""
        entry = self.entry(index)
        texts = [turn["value"] for turn in entry["conversations"] if turn["from"] != "system"]
        types = entry.get("types") or ["all"] * (len(texts) // 2)
        return [
            {
                "index": index,
                "type": kind,
                "question": _PLACEHOLDER.sub("", _as_text(entry, asked)).strip(),
                "answer": answered,
            }
            for asked, answered, kind in zip(texts[::2], texts[1::2], types, strict=True)
        ]

    def texts(self) -> Iterator[str]:
        """Every turn's text, without placeholders."""
        for index in range(len(self)):
            for turn in self.entry(index)["conversations"]:
                yield _PLACEHOLDER.sub(" ", turn["value"])

    def check_media(self, index: int) -> None:
        """Raise DataError unless each picture and clip of an entry can be decoded."""
        entry = self.entry(index)
        name = self._name(index, entry)
        for path in _paths(entry):
            open_image(self.folder, path, name, eighth=True)
        for path in _paths(entry, "video"):
            open_video(self.folder, path, name, self.frames)


def _paths(entry: dict, medium: str = "image") -> list[str]:
    paths = entry.get(medium)
    return [] if not paths else [paths] if isinstance(paths, str) else list(paths)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def as_llava(entry: object) -> object:
    """``entry`` with ``conversations`` of ``from`` and ``value`` where it has ``messages`` of ``role`` and ``content``.

    A content may be a list of parts, as in transformers' chat format; what is of neither form stays as it is.
    """
    turns = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "role" in turn for turn in turns):
        return entry
    others = {key: value for key, value in entry.items() if key != "messages"}
    return {**others, "conversations": [_turn(turn) for turn in turns]}


def _turn(turn: object) -> object:
    if not isinstance(turn, dict) or "role" not in turn:
        return turn
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") if part.get("type") == "text" else MEDIA.get(part.get("type")) for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else content
    return {"from": SPEAKERS.get(turn["role"], turn["role"]), "value": content}


def check_entry(entry: object, name: str) -> str:
    """The text of ``entry``, a turn a line, if it is a LLaVA conversation whose placeholders match its pictures and
    videos; else raises DataError, naming it ``name``."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{name} has no 'conversations' list; the file is not in LLaVA's format")
    for turn in turns:
        texts = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))
        if not texts or turn["from"] not in ROLES:
            raise DataError(f"{name}: each turn needs 'from' (human or gpt) and 'value' (text), not {short(turn)}")
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    asked = len(speakers) // 2
    if not asked or speakers != ["human", "gpt"] * asked:
        raise DataError(f"{name}: the turns must alternate human, gpt, human, gpt, ..., not {speakers[:6]}")
    text = "\n".join([turn["value"] for turn in turns])
    asking = "\n".join([turn["value"] for turn in turns if turn["from"] == "human"])
    if not _is_text(text):
        raise DataError(f"{name}: the text holds half a character (a lone surrogate) and is damaged")
    for medium, placeholder in MEDIA.items():
        paths = entry.get(medium)
        if paths is not None and not isinstance(paths, (str, list)):
            raise DataError(f"{name}: '{medium}' must be a path or a list of paths, not {type(paths).__name__}")
        paths, placeholders = _paths(entry, medium), text.count(placeholder)
        if not all(map(_is_text, paths)):
            raise DataError(f"{name}: '{medium}' must list paths, not {short(paths)}")
        if not paths:
            continue  # the words are text, such as HTML's <video>
        if asking.count(placeholder) != placeholders:
            raise DataError(f"{name} has {placeholder} in an answer or a system message; {medium}s belong to questions")
        if placeholders != len(paths):
            raise DataError(
                f"{name} has {placeholders} {placeholder} placeholders for {len(paths)} {medium}s; they must be equal"
            )
    types = entry.get("types")
    if types and not (isinstance(types, list) and len(types) == asked and all(map(_is_text, types))):
        raise DataError(f"{name}: 'types' must name a type for each of the {asked} questions, not {short(types)}")
    return text


def _as_text(entry: dict, text: str) -> str:
    """``text`` with the words <image> and <video> broken up where ``entry`` has none of it: else tokenizers
    take them for media."""
    for medium, placeholder in MEDIA.items():
        if not _paths(entry, medium):
            text = text.replace(placeholder, f"< {medium}>")
    return text


def _messages(entry: dict) -> list[dict]:
    """transformers' chat format. Media stand where the text has them; one at an end goes first, as in LLaVA."""
    messages = []
    for turn in entry["conversations"]:
        first, *rest = _PLACEHOLDER.split(_as_text(entry, turn["value"]).strip())
        media, texts = rest[::2], [first, *rest[1::2]]
        if len(media) == 1 and not all(text.strip() for text in texts):
            texts = ["", "".join(texts)]
        parts = [{"type": "text", "text": texts[0].strip() if not media else texts[0].lstrip()}]
        for medium, text in zip(media, texts[1:], strict=True):
            parts += [{"type": medium}, {"type": "text", "text": text.strip()}]
        parts = [part for part in parts if part.get("text") != ""]
        if len(parts) == len(media):  # templates look for a text
            parts.append({"type": "text", "text": ""})
        messages.append({"role": ROLES[turn["from"]], "content": parts})
    return messages


def find_file(folder: Path, path: str, name: str, medium: str = "image") -> Path:
    """The file at ``path`` below ``folder``. Raises DataError if there is none, or if it, or its link, leads out."""
    try:
        full = (folder / path).resolve()
        inside, found = full.is_relative_to(folder.resolve()), full.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links
        raise DataError(f"{name}: {medium} path {path!r} cannot be followed ({error})") from None
    if not inside:
        raise DataError(f"{name}: {medium} path {path!r} leads out of the {medium} folder {folder}; move the file in")
    if not found:
        raise DataError(f"{name}: no {medium} {path!r} in {folder}; check the {medium} folder or fetch the file")
    return full


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture upright (by its EXIF orientation) and in RGB, 8 bits a channel, as a viewer shows it.

    ============================== =================================================================
    1, L, P, RGB, CMYK, YCbCr, HSV converted; of several frames, the first
    with transparency              composed on white (RGBA, RGBa, LA, La, PA; a transparent colour)
    I;16 and its byte orders, I    of 16 bits: 65535 is white
    F                              from 0 to 1 where 1 is white, or from 0 to 255
    others; I and F beyond these   ValueError
    ============================== =================================================================
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        white = 65535 if image.mode != "F" else 1 if high <= 1 else 255
        if not 0 <= low <= high <= white:  # NaN, too
            raise ValueError(
                f"its {image.mode} values from {low:g} to {high:g} have no known white; save it with 8 bits"
            )
        return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def open_image(
    folder: Path, path: str, name: str, pad: tuple[int, int, int] | None = None, eighth: bool = False
) -> Image.Image:
    """The picture at ``path`` below ``folder``, RGB. Raises DataError, naming the entry ``name``.

    eighth: a JPEG at an eighth of its size, which is decoded faster and breaks at the same faults. A picture of more
    than PIL.Image.MAX_IMAGE_PIXELS is refused, as its decoded form may not fit in memory.
    """
    full = find_file(folder, path, name)
    try:
        with Image.open(full, formats=FORMATS) as opened:
            if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels are too many")
            if eighth:
                opened.draft("RGB", (1, 1))
            image = to_rgb(opened)
    except Exception as error:  # Pillow raises whatever a broken file makes of its readers
        raise DataError(f"{name}: image {path!r} cannot be read ({error}); fetch it again or drop the entry") from None
    return pad_to_square(image, pad)


def open_video(folder: Path, path: str, name: str, frames: int) -> list[Image.Image]:
    """``frames`` frames of the clip at ``path`` below ``folder``; see video.read_frames. Raises DataError."""
    return read_frames(find_file(folder, path, name, "video"), frames, f"{name}: video {path!r}")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """``image`` in the middle of a square of ``colour`` (RGB), as LLaVA-1.5 sees it; None leaves it as it is."""
    if colour is None or image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def trained_padding(processor, model: str | Path, wanted: bool | None = None) -> tuple[int, int, int] | None:
    """The colour that pads pictures to squares before the model in the folder ``model`` is asked, None for no padding:
    as it was trained, by its run's own config.yaml, unless ``wanted`` says. A model without one is not padded for."""
    if wanted is None:
        wanted = run_settings(model).get("pad_to_square", False)
    return padding_colour(processor) if wanted else None


def padding_colour(processor) -> tuple[int, int, int]:
    """The colour (RGB) that ``processor`` normalises to 0, which LLaVA-1.5 pads with."""
    return tuple(round(255 * mean) for mean in processor.image_processor.image_mean)


def check_words(texts: Iterable[str], tokenizer, name: object) -> None:
    """Raise DataError, naming ``name``, if the tokenizer knows less than 99% of the words of ``texts``.

    Fewer that it does not know are told on stderr. A tokenizer that can write any text, by bytes, is asked nothing.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(RARE, add_special_tokens=False)["input_ids"]:
        return
    counts = Counter(word for text in texts for word in text.split())
    if not counts:
        return
    written = tokenizer(list(counts), add_special_tokens=False)["input_ids"]
    strange = [word for word, ids in zip(counts, written, strict=True) if unknown in ids]
    share = sum(counts[word] for word in strange) / counts.total()
    if not strange:
        return
    told = f"{share:.1%} of the words of {name} are unknown to the tokenizer: {', '.join(map(short, strange[:10]))}"
    if share > MAY_BE_UNKNOWN:
        raise DataError(
            f"{told}; each would be {tokenizer.unk_token}. Use a model with a larger vocabulary (model: PATH)"
        )
    print(f"note: {told}", file=sys.stderr)


def find_bad(
    file: str | Path,
    images: str | Path | None = None,
    workers: int | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict[int, str]:
    """The bad entries of a data file, in order, and the reason of each: structure, pictures and clips (all decoded).

    workers: threads, for Pillow decodes outside Python's lock; None: one a core. What was found is kept in data/cache
    and holds while the file stays as it is; fresh: look again. Raises DataError if the file itself cannot be read.
    """
    file, folder = Path(file), Path(images) if images else Path(file).parent
    index = read_index(file)
    kept = _cached(file, "json", folder.resolve())
    if kept.exists() and not fresh:
        try:
            held = json.loads(kept.read_text())
            if held["version"] == index.version:
                return _reasons(held["bad"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged; it is made again
            pass
    bad = dict(index.bad)
    if len(bad) < len(index.start):
        data = LlavaData(file, folder, skip=())
        parts = np.array_split(np.arange(len(data)), -(-len(data) // 64))
        with (
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            tqdm(total=len(data), desc=f"checking {file.name}", unit="entry", disable=not progress) as bar,
        ):
            for part, found in zip(parts, pool.map(partial(_bad_media, data), parts), strict=True):
                bad |= found
                bar.update(len(part))
    bad = dict(sorted(bad.items()))
    _keep(kept, json.dumps({"version": index.version, "bad": json.dumps(bad)}).encode())
    return bad


def _bad_media(data: LlavaData, part: np.ndarray) -> dict[int, str]:
    bad = {}
    for index in part:
        try:
            data.check_media(index)
        except DataError as error:
            bad[int(data.rows[index])] = str(error)
    return bad


@dataclass
class Collator:
    """Examples -> a batch of input_ids, attention_mask, labels (B, T) and pixel_values, pixel_values_videos.

    Labels are the answers, as the processor's chat template writes them with what follows (the end token, added where
    the template, as llava-1.5-7b-hf's, writes none); all else is ignored. Rows are padded at the end and cut at
    ``max_length``. Raises DataError when that would cut into a picture or leave no label.

    always_picture: examples without any picture get one more row, of a black picture and no label, so that every
    part of the model is in the graph of every batch, as DistributedDataParallel, ZeRO and FSDP need on all processes.
    """

    processor: object
    max_length: int = 2048
    always_picture: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        texts, spans = zip(*(self._render(example.messages) for example in examples), strict=True)
        images = [image for example in examples for image in example.images]
        videos = [frames for example in examples for frames in example.videos]
        if videos and not hasattr(self.processor, "video_processor"):
            raise DataError(f"{type(self.processor).__name__} reads no video; train a model that does, or drop them")
        visual = {"images": images or None} | ({"videos": videos} if videos else {})
        encoded = self.processor(text=list(texts), **visual, padding=True, padding_side="right", return_tensors="pt")
        plain = tokenizer(list(texts), return_offsets_mapping=True)
        ids = encoded["input_ids"]
        placeholder = torch.isin(ids, self._placeholders)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            written = torch.tensor(plain["input_ids"][row])
            starts, ends = torch.tensor(plain["offset_mapping"][row]).unbind(1)
            answers = torch.zeros_like(written, dtype=torch.bool)
            for first, last in spans[row]:
                answers |= (starts >= first) & (ends <= last) & (ends > starts)
            text = ~placeholder[row] & encoded["attention_mask"][row].bool()
            said = ~torch.isin(written, self._placeholders)
            # The processor repeats a placeholder for each visual token, and changes nothing else.
            if not torch.equal(ids[row][text], written[said]):
                raise DataError(f"{example.name}: the processor rewrote the text; its answers cannot be found")
            values = torch.where(answers, written, IGNORED)[said]
            labels[row, text.nonzero().squeeze(1)] = values
            self._check_length(example.name, placeholder[row], labels[row] != IGNORED)
        keep = min(ids.shape[1], self.max_length)
        batch = {"input_ids": ids[:, :keep], "attention_mask": encoded["attention_mask"][:, :keep]}
        others = {
            key: value[:, :keep] if getattr(value, "shape", None) == ids.shape else value  # such as token_type_ids
            for key, value in encoded.items()
            if key not in batch
        }
        batch |= {"labels": labels[:, :keep], **others}
        return self.with_black(batch, "image") if self.always_picture and not images and not videos else batch

    def with_black(self, batch: dict[str, torch.Tensor], medium: str) -> dict[str, torch.Tensor]:
        """``batch`` and one more row, without a label, of a black "image" or a "video" of one black frame.

        For a process whose examples hold none while another's do: ZeRO-3 gathers a part's weights on all processes at
        once, and Video-LLaVA has a tower for each medium. ``batch`` must hold none of that medium. Raises DataError.
        """
        black, token = Image.new("RGB", (32, 32)), getattr(self.processor, f"{medium}_token")
        visual = {"images": [black]} if medium == "image" else {"videos": [[black]]}
        row = self.processor(text=[token], **visual, return_tensors="pt")
        if row["input_ids"].shape[1] > self.max_length:
            raise DataError(f"max_length {self.max_length} is less than a picture's visual tokens; raise it")
        row["labels"] = torch.full_like(row["input_ids"], IGNORED)
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
        shape, joined = batch["input_ids"].shape, dict(batch)
        for key, value in row.items():
            if key not in batch:
                joined[key] = value.to(batch["input_ids"].device)
                continue
            both = batch[key], value.to(batch[key].device)
            if batch[key].shape == shape:
                length = max(len(part[0]) for part in both)
                both = (F.pad(part, (0, length - len(part[0])), value=padding.get(key, 0)) for part in both)
            joined[key] = torch.cat(list(both))
        return joined

    @property
    def _placeholders(self) -> torch.Tensor:
        ids = (getattr(self.processor, f"{medium}_token_id", None) for medium in MEDIA)
        return torch.tensor([token for token in ids if token is not None])

    def _check_length(self, name: str, placeholder: torch.Tensor, answers: torch.Tensor) -> None:
        """placeholder, answers: (T,) whether a token is visual, and whether it is labelled."""
        if placeholder[self.max_length :].any():
            raise DataError(f"{name}: max_length {self.max_length} cuts off visual tokens; raise it")
        if not answers[1 : self.max_length].any():
            raise DataError(f"{name}: no answer is left within max_length {self.max_length}; raise it")

    def check_room(self, messages: list[dict], name: str, counts: Sequence[int]) -> None:
        """Raise DataError, naming the entry ``name``, if ``max_length`` cuts off one of its pictures, which become
        ``counts`` tokens each, or all of its answers."""
        text, spans = self._render(messages)
        written = self.processor.tokenizer(text, return_offsets_mapping=True)
        placeholder = torch.isin(torch.tensor(written["input_ids"]), self._placeholders)
        starts, ends = torch.tensor(written["offset_mapping"]).unbind(1)
        answers = torch.zeros_like(placeholder)
        for first, last in spans:
            answers |= (starts >= first) & (ends <= last) & (ends > starts)
        times = torch.ones_like(starts)
        times[placeholder] = torch.tensor(list(counts), dtype=times.dtype)
        self._check_length(name, placeholder.repeat_interleave(times), answers.repeat_interleave(times))

    @cached_property
    def template_tokens(self) -> int:
        """Tokens that the chat template adds to a conversation of one turn."""
        said = [{"type": "text", "text": ""}]
        text, _ = self._render([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
        return len(self.processor.tokenizer(text)["input_ids"])

    @cached_property
    def fixed_picture_tokens(self) -> int | None:
        """Visual tokens of every picture; None if they depend on its size."""
        counts = {self.picture_tokens(size) for size in ((64, 64), (640, 480), (300, 900))}
        return counts.pop() if len(counts) == 1 else None

    def picture_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of a picture of ``size`` (width, height)."""
        if size not in self._counts:
            row = self.processor(
                text=[self.processor.image_token], images=[Image.new("RGB", size)], return_tensors="pt"
            )
            self._counts[size] = int(torch.isin(row["input_ids"], self._placeholders).sum())
        return self._counts[size]

    @cached_property
    def _counts(self) -> dict[tuple[int, int], int]:
        return {}

    def _render(self, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from where to where in it each answer goes."""

        def render(messages, **options):
            return self.processor.apply_chat_template(messages, tokenize=False, **options)

        tokenizer, text, spans = self.processor.tokenizer, render(conversation), []
        eos, added = tokenizer.eos_token or "", 0
        ends = (*tokenizer.get_added_vocab(), eos)
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = render(conversation[:turn], add_generation_prompt=True)
            after = render(conversation[: turn + 1])
            if not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns; give a template that only appends")
            first, last = len(before) + added, len(after) + added
            if eos and not after.rstrip().endswith(ends):  # a model tuned so would never learn to stop
                place = len(after.rstrip()) + added
                text = text[:place] + eos + text[place:]
                last, added = place + len(eos), added + len(eos)
            spans.append((first, last))
        return text, spans


def find_too_long(data: LlavaData, collate: Collator, progress: bool = True) -> dict[int, str]:
    """The entries of ``data``'s file of which ``collate`` would refuse what ``max_length`` leaves, and why.

    Without decoding a picture: how many tokens one becomes depends on its size. A text has at most a token a byte, so
    of most entries not even the text is tokenized.
    """
    fixed, bytes_ = collate.fixed_picture_tokens, (data.index.stop - data.index.start)[data.rows]
    pictures, some = data.index.media[data.rows], collate.template_tokens
    at_most = bytes_ + some + pictures * (fixed or 0)
    unsure = (pictures > 0) & (fixed is None) | (data.medium == 2)
    found = {}
    for index in tqdm(
        np.flatnonzero(unsure | (at_most > collate.max_length)),
        desc=f"lengths of {data.file.name}",
        unit="entry",
        disable=not progress,
        leave=False,
    ):
        entry = data.entry(index)
        name = data._name(index, entry)
        try:
            if data.medium[index] == 2:
                collate([data[index]])
            else:
                counts = [fixed] * int(pictures[index])
                if fixed is None:
                    sizes = [image_size(data.folder, path, name, data.pad) for path in _paths(entry)]
                    counts = [collate.picture_tokens(size) for size in sizes]
                collate.check_room(_messages(entry), name, counts)
        except DataError as error:
            found[int(data.rows[index])] = str(error)
    return found


def image_size(folder: Path, path: str, name: str, pad: tuple[int, int, int] | None = None) -> tuple[int, int]:
    """(width, height) of a picture as ``open_image`` gives it, from the head of its file. Raises DataError."""
    try:
        with Image.open(find_file(folder, path, name), formats=FORMATS) as opened:
            size, turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except DataError:
        raise
    except Exception as error:  # as in open_image
        raise DataError(f"{name}: image {path!r} cannot be read ({error}); fetch it again or drop the entry") from None
    width, height = size[::-1] if turned else size
    return (width, height) if pad is None else (max(size), max(size))


class GroupedSampler(Sampler[int]):
    """Batches of one modality and of like length, in random order: LLaVA's ``group_by_modality_length``.

    The order is a function of the seed and the epoch alone, so a resumed run sees the same batches. medium: (n,)
    which kind of pictures an example has, see LlavaData. batch: examples of an optimizer step over all processes. The
    few left over at the end may mix them.
    """

    def __init__(self, lengths: np.ndarray, medium: np.ndarray, batch: int, seed: int):
        self.lengths, self.medium, self.batch, self.seed, self.epoch = lengths, medium, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches, rest = [], []
        for wanted in (1, 2, 0):
            chosen = rng.permutation(np.flatnonzero(self.medium == wanted))
            mega = self.batch * 50  # sort by length only within some 50 batches, so that epochs differ
            for start in range(0, len(chosen), mega):
                part = chosen[start : start + mega]
                part = part[np.argsort(-self.lengths[part], kind="stable")]
                whole = len(part) // self.batch * self.batch
                batches += list(part[:whole].reshape(-1, self.batch))
                rest.append(part[whole:])
        order = [batches[i] for i in rng.permutation(len(batches))]
        return iter(np.concatenate([*order, *rest]).tolist())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llavolta.data", description=__doc__)
    check = parser.add_subparsers(required=True).add_parser("check", help="name every bad entry of a data set")
    check.add_argument("file", help="LLaVA JSON")
    check.add_argument("folder", nargs="?", help="of the pictures; default: that of FILE")
    check.add_argument("--workers", type=int, help="threads that decode pictures; default: one a core")
    check.add_argument("--model", help="folder or hub name of the model, whose tokenizer must know the words")
    check.add_argument("--json", action="store_true", help='print one object, {"entries": n, "bad": {index: reason}}')
    options = parser.parse_args(arguments)
    try:
        bad = find_bad(options.file, options.folder, options.workers, fresh=True)
        entries = len(read_index(Path(options.file)).start)
        strange = _strange_words(options, bad) if options.model and len(bad) < entries else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"entries": entries, "bad": bad} | ({"words": strange} if options.model else {}), indent=1))
    else:
        print("\n".join([*bad.values(), *([strange] if strange else []), f"{len(bad)} of {entries} entries are bad"]))
        if not options.model:
            print("words were not checked against a tokenizer; --model NAME does", file=sys.stderr)
    return int(bool(bad or strange))


def _strange_words(options: argparse.Namespace, bad: dict[int, str]) -> str | None:
    """What is wrong with the words of a data set for a model, or None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(options.model))
    except (OSError, ValueError) as error:
        raise DataError(f"no tokenizer of {options.model!r} ({str(error).splitlines()[0]})") from None
    try:
        check_words(LlavaData(options.file, options.folder, skip=bad).texts(), tokenizer, Path(options.file).name)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
