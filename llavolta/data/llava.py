"""The data set: conversations in LLaVA's format, with a folder of images and videos."""

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
    """One conversation with its opened media.

    Attributes:
        messages: The conversation in transformers' chat format.
        images: The images in their order, RGB.
        name: What errors call it: file, number and id of the entry.
        videos: The frames of each video.
    """

    messages: list[dict]
    images: list[Image.Image]
    name: str
    videos: list[list[Image.Image]] = field(default_factory=list)

    @property
    def looks(self) -> list:
        """The images, then the videos, in the form that ``studies.evaluation.prompts`` takes."""
        return [*self.images, *self.videos]


class LlavaData(Dataset):
    """Conversations in LLaVA's format, or in another that ``data.entries`` reads.

    The structure of every entry is checked when the data set is opened. Entries and media are read
    from their files at each access, and none stay in memory.

    Args:
        file: A JSON list, JSON Lines, or a table; see ``data.table``.
        images: The folder that media paths are relative to; None: the folder of ``file``.
        pad: Colour (RGB) that pads images to squares, as LLaVA-1.5 does; None: no padding. Videos
            are never padded.
        skip: Entries of the file to leave out, besides those with a wrong structure. None: an entry
            with a wrong structure is an error. A dict of reasons, as of ``find_bad``, is quoted if
            no entry is left.
        frames: Frames per video; see ``video.read_frames``.
        ignore: Keys of the entries that are treated as absent.

    Attributes:
        index: The index of the whole file; its arrays also cover the entries that are left out.
        rows: (n,) number in the file of each entry.
        medium: (n,) modality: 0 for text alone, 1 with images, 2 with a video.
        has_image: (n,) bool, True for entries with images or a video.
        lengths: (n,) words of each entry.
        skipped: Numbers of the entries of the file that are left out.

    Raises:
        DataError: The file cannot be read, the image folder does not exist, no entry is left, or
            ``skip`` is None and an entry has a wrong structure.
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
                f"{next(iter(bad.values()))}. Entries that are bad: {len(bad)} of "
                f"{len(self.index.start)}; 'python -m llavolta.data check {self.file}' names them, "
                "'bad_entries: skip' trains without them"
            )
        self.skipped = sorted({*bad, *(skip or ())})
        self.rows = np.setdiff1d(np.arange(len(self.index.start)), self.skipped)
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
        """The table that entries are read from; None for JSON. It is opened once per process."""
        return open_table(self.file, tuple(self.index.version)) if self._of_table else None

    def _found(
        self, index: int, path: str | bytes | Cell, name: str, medium: str = "image"
    ) -> tuple[str, bytes | None]:
        """Return (path below the folder, None) or (a description, content) of an image or video."""
        if not isinstance(path, Cell):
            return (path, None) if isinstance(path, str) else ("in the entry", path)
        found = content_of(self.table.content(int(self.rows[index]), path), medium, name)
        return (found, None) if isinstance(found, str) else (f"in {path.column}", found)

    def picture(
        self, index: int, path: str | bytes | Cell, name: str, eighth: bool = False
    ) -> Image.Image:
        """Open an image of an entry.

        Args:
            index: Number of the entry in the data set.
            path: One of ``media_paths_of`` the entry.
            name: What the error calls the entry.
            eighth: Whether to decode a JPEG at an eighth of its size, without padding.

        Returns:
            The image, RGB and upright.

        Raises:
            DataError: It cannot be opened; see ``images.open_image``.
        """
        path, content = self._found(index, path, name)
        return open_image(self.folder, path, name, None if eighth else self.pad, eighth, content)

    def picture_size(self, index: int, path: str | bytes | Cell, name: str) -> tuple[int, int]:
        """Read the (width, height) that ``picture`` would have, from the head of its file."""
        path, content = self._found(index, path, name)
        return image_size(self.folder, path, name, self.pad, content)

    def clip(self, index: int, path: str | bytes | Cell, name: str) -> list[Image.Image]:
        """Read the frames of a video of an entry; see ``picture`` and ``images.open_video``."""
        path, content = self._found(index, path, name, "video")
        return open_video(self.folder, path, name, self.frames, content)

    def without(self, reasons: dict[int, str]) -> LlavaData:
        """Open the data set again without the entries of the file that ``reasons`` names.

        Raises:
            DataError: No entry is left.
        """
        skip = {**reasons, **dict.fromkeys(self.skipped)}
        return LlavaData(self.file, self.folder, self.pad, skip, self.frames, self.ignore)

    def entry(self, index: int) -> dict:
        """Read an entry in LLaVA's form.

        Args:
            index: Number of the entry in the data set.

        Returns:
            The entry; see ``entries.read_entry``.

        Raises:
            DataError: The file has changed since it was opened, or can no longer be read.
        """
        row = int(self.rows[index])
        name = f"{self.file.name} entry {row}"
        if (table := self.table) is not None:
            if file_version(self.file) != self.index.version:
                raise DataError(f"{self.file} has changed since it was opened; start again")
            return read_entry(table.entry(row), name, self.ignore)
        start, stop = int(self.index.start[row]), int(self.index.stop[row])
        try:
            with self.file.open("rb") as source:
                # By descriptor, so that the file that is checked is the one that is read.
                if file_version(source.fileno()) != self.index.version:
                    raise DataError(f"{self.file} has changed since it was opened; start again")
                source.seek(start)
                return read_entry(json.loads(source.read(stop - start)), name, self.ignore)
        except OSError as error:
            raise DataError(f"{self.file} can no longer be read ({error})") from None

    def _name(self, index: int, entry: dict) -> str:
        """Return what errors call an entry."""
        return f"{self.file.name} entry {self.rows[index]} (id {short(entry.get('id'))})"

    def sources(self, index: int) -> list[tuple[str, bytes | None]]:
        """Locate each image and video of an entry.

        Returns:
            For each the path below the image folder and None, or a description and the content.
        """
        entry = self.entry(index)
        name = self._name(index, entry)
        return [
            self._found(index, path, name, medium)
            for medium in MEDIA
            for path in media_paths_of(entry, medium)
        ]

    def questions(self) -> Iterator[dict]:
        """Iterate over all questions whose answers are trained on.

        Returns:
            Dicts with index (of the entry in the data set), turn (number among its questions, from
            0), type, question and answer. Texts are without placeholders.
        """
        return chain.from_iterable(map(self.questions_of, range(len(self))))

    def questions_of(self, index: int) -> list[dict]:
        """List the ``questions`` of one entry; no other entry is read."""
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
        """Iterate over the texts of all turns, without placeholders."""
        for index in range(len(self)):
            for turn in self.entry(index)["conversations"]:
                yield PLACEHOLDER.sub(" ", turn["value"])

    def check_media(self, index: int) -> None:
        """Raise DataError unless every image and video of an entry can be decoded."""
        entry = self.entry(index)
        name = self._name(index, entry)
        for path in media_paths_of(entry):
            self.picture(index, path, name, eighth=True)
        for path in media_paths_of(entry, "video"):
            self.clip(index, path, name)
