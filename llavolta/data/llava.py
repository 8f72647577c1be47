"""LLaVA's training data: a JSON list of conversations and a folder of pictures and clips."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from reprlib import repr as short

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from llavolta.data.entries import (
    MEDIA,
    PLACEHOLDER,
    Cell,
    chat_messages,
    content_of,
    media_paths_of,
    plain_text,
    read_entry,
)
from llavolta.data.images import check_folder, image_size, open_image, open_video
from llavolta.data.index import file_version, read_index
from llavolta.data.table import Table, is_table, open_table
from llavolta.data.video import FRAMES
from llavolta.errors import DataError


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
        """Pictures, then clips, as ``studies.evaluation.prompts`` takes them with a question as text."""
        return [*self.images, *self.videos]


class LlavaData(Dataset):
    """Conversations in LLaVA's format, or another that is read (see data.entries).

    file: the JSON list, JSON Lines, or a table of Parquet (see data.table). images: the folder that the image paths are
    relative to (default: the file's own folder).
    pad: pad images to squares with this RGB colour, as LLaVA-1.5 does; None leaves them, and clips always are, as
    they are. frames: of each clip; see video.read_frames.
    skip: entries of the file to leave out, besides those of a wrong structure (see ``find_bad``, whose reasons are told
    if no entry is left); None: none are. ignore: keys of the entries that are taken as not there.

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
        ignore: Collection[str] = (),
    ):
        self.file, self.ignore = Path(file), tuple(ignore)
        self.folder = Path(images) if images else self.file.parent
        self.pad, self.frames = pad, frames
        self.index, self._of_table = read_index(self.file, self.ignore), is_table(self.file)
        check_folder(self.folder)
        bad = self.index.bad
        if bad and skip is None:
            raise DataError(
                f"{next(iter(bad.values()))}. Entries that are bad: {len(bad)} of {len(self.index.start)}; "
                f"'python -m llavolta.data check {self.file}' names them, 'bad_entries: skip' trains without them"
            )
        self.skipped = sorted({*bad, *(skip or ())})
        self.rows = np.setdiff1d(
            np.arange(len(self.index.start)), self.skipped
        )  # entries of the file
        if not len(self.rows):
            reasons = {**(skip if isinstance(skip, dict) else {}), **bad}
            first = f"; the first: {next(iter(reasons.values()))}" if reasons else ""
            raise DataError(
                f"{self.file}: all of its {len(self.index.start)} entries are bad{first}"
            )
        self.medium, self.lengths = self.index.medium[self.rows], self.index.lengths[self.rows]
        self.has_image = self.medium > 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        entry = self.entry(index)
        name = self._name(index, entry)
        images = [self.picture(index, path, name) for path in media_paths_of(entry)]
        videos = [self.clip(index, path, name) for path in media_paths_of(entry, "video")]
        return Example(chat_messages(entry), images, name, videos)

    @property
    def table(self) -> Table | None:
        """What the entries are read from, if it is no JSON. Opened anew in each process that loads data."""
        return open_table(self.file, tuple(self.index.version)) if self._of_table else None

    def _found(
        self, index: int, path: str | bytes | Cell, name: str, medium: str = "image"
    ) -> tuple[str, bytes | None]:
        """Where an image or a clip of an entry is below the folder, or what to call it and its content."""
        if not isinstance(path, Cell):
            return (path, None) if isinstance(path, str) else ("in the entry", path)
        found = content_of(self.table.content(int(self.rows[index]), path), medium, name)
        return (found, None) if isinstance(found, str) else (f"in {path.column}", found)

    def picture(
        self, index: int, path: str | bytes | Cell, name: str, eighth: bool = False
    ) -> Image.Image:
        """The picture at ``path`` of an entry, which ``name`` names; see images.open_image."""
        path, content = self._found(index, path, name)
        return open_image(self.folder, path, name, None if eighth else self.pad, eighth, content)

    def picture_size(self, index: int, path: str | bytes | Cell, name: str) -> tuple[int, int]:
        """(width, height) of ``picture``, from the head of its file."""
        path, content = self._found(index, path, name)
        return image_size(self.folder, path, name, self.pad, content)

    def clip(self, index: int, path: str | bytes | Cell, name: str) -> list[Image.Image]:
        """The frames of the clip at ``path`` of an entry; see images.open_video."""
        path, content = self._found(index, path, name, "video")
        return open_video(self.folder, path, name, self.frames, content)

    def without(self, reasons: dict[int, str]) -> LlavaData:
        """This data set without the entries of the file that ``reasons`` names. Raises DataError if none is left."""
        skip = {**reasons, **dict.fromkeys(self.skipped)}
        return LlavaData(self.file, self.folder, self.pad, skip, self.frames, self.ignore)

    def entry(self, index: int) -> dict:
        """The entry, in LLaVA's format."""
        row = int(self.rows[index])
        name = f"{self.file.name} entry {row}"
        if (table := self.table) is not None:
            if file_version(self.file) != self.index.version:
                raise DataError(f"{self.file} has changed since it was opened; start again")
            return read_entry(table.entry(row), name, self.ignore)
        start, stop = int(self.index.start[row]), int(self.index.stop[row])
        try:
            with self.file.open("rb") as source:
                if file_version(source.fileno()) != self.index.version:
                    raise DataError(f"{self.file} has changed since it was opened; start again")
                source.seek(start)
                return read_entry(json.loads(source.read(stop - start)), name, self.ignore)
        except OSError as error:
            raise DataError(f"{self.file} can no longer be read ({error})") from None

    def _name(self, index: int, entry: dict) -> str:
        return f"{self.file.name} entry {self.rows[index]} (id {short(entry.get('id'))})"

    def sources(self, index: int) -> list[tuple[str, bytes | None]]:
        """Of each image and clip of an entry: its path below the folder, or what to call it and its content."""
        entry = self.entry(index)
        name = self._name(index, entry)
        return [
            self._found(index, path, name, medium)
            for medium in MEDIA
            for path in media_paths_of(entry, medium)
        ]

    def questions(self) -> Iterator[dict]:
        """Every turn as a question of its own: index (of the entry), turn (among its questions), type, question,
        answer."""
        return chain.from_iterable(map(self.questions_of, range(len(self))))

    def questions_of(self, index: int) -> list[dict]:
        """The ``questions`` of one entry whose answers are learned; no other is opened."""
        entry = self.entry(index)
        turns = [turn for turn in entry["conversations"] if turn["from"] != "system"]
        types = entry.get("types") or ["all"] * (len(turns) // 2)
        return [
            {
                "index": index,
                "turn": turn,
                "type": kind,
                "question": PLACEHOLDER.sub("", plain_text(entry, asked["value"])).strip(),
                "answer": answered["value"],
            }
            for turn, (asked, answered, kind) in enumerate(
                zip(turns[::2], turns[1::2], types, strict=True)
            )
            if answered.get("learn", True)
        ]

    def texts(self) -> Iterator[str]:
        """Every turn's text, without placeholders."""
        for index in range(len(self)):
            for turn in self.entry(index)["conversations"]:
                yield PLACEHOLDER.sub(" ", turn["value"])

    def check_media(self, index: int) -> None:
        """Raise DataError unless each picture and clip of an entry can be decoded."""
        entry = self.entry(index)
        name = self._name(index, entry)
        for path in media_paths_of(entry):
            self.picture(index, path, name, eighth=True)
        for path in media_paths_of(entry, "video"):
            self.clip(index, path, name)
