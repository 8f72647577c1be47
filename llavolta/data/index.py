"""Where the entries of a data file are: one pass over it, kept for the next time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import PIL

from llavolta.data.entries import media_paths_of, read_entry, text_of, unread_keys
from llavolta.data.jsonlist import WrongFormat, scan
from llavolta.data.table import choose_split, is_table, open_table
from llavolta.errors import DataError
from llavolta.paths import DATA

CACHE = DATA / "cache" / "llava"
KEPT_FROM = (
    1 << 25
)  # bytes of a data file whose index is kept: a smaller one is indexed in a second


@dataclass(frozen=True)
class Index:
    """Where the n entries of a data file are, and what is known of them. Arrays (n,); bad: reasons by entry."""

    start: np.ndarray  # first byte
    stop: np.ndarray
    medium: np.ndarray  # 0 text alone, 1 with images, 2 with a video
    media: np.ndarray  # how many of them
    lengths: np.ndarray  # words, about: blanks are counted
    learned: np.ndarray  # answers with a label
    unlearned: np.ndarray  # answers without one
    bad: dict[int, str]
    unread: dict[
        str, int
    ]  # keys of entries and turns that are taken for notes: how many entries have each
    version: list[int]  # of the file: bytes and time


def read_index(file: Path, ignore: Collection[str] = ()) -> Index:
    """The index of a data file: one pass over it, kept in data/cache for a large one. Raises DataError.

    ignore: keys that are taken as not there; see entries.read_entry.
    """
    table = is_table(file)
    if not table and not file.is_file():
        raise DataError(
            f"no data file {file}; give the path of a JSON list of conversations, or of a Parquet file"
        )
    version, kept = file_version(file), kept_path(file, "npz", *sorted(ignore))
    if kept.exists() and not table:
        try:
            with kept.open("rb") as source, np.load(source) as archive:
                held = dict(archive)
            words = {
                "bad": read_reasons(held["bad"].item()),
                "unread": json.loads(held["unread"].item()),
            }
            index = Index(**{**held, **words, "version": held["version"].tolist()})
            if index.version == version:
                return index
        except Exception:  # whatever numpy makes of a damaged file; it is made again
            kept.unlink(missing_ok=True)
    index = _scan_index(file, _rows(file, version) if table else _elements(file), version, ignore)
    if version[0] >= KEPT_FROM and not table:
        archive = io.BytesIO()
        np.savez(
            archive,
            **{**vars(index), "bad": json.dumps(index.bad), "unread": json.dumps(index.unread)},
        )
        keep(kept, archive.getvalue())
    return index


def _rows(file: Path, version: list[int]) -> Iterator[tuple[int, int, object]]:
    """Of a table, as ``scan`` gives those of JSON; start and end are 0."""
    _note(choose_split(file)[1])
    table = open_table(file, tuple(version))
    for row in range(len(table)):
        yield 0, 0, table.entry(row)


@cache
def _note(text: str | None) -> None:
    """Once a process."""
    if text:
        print(f"note: {text}", file=sys.stderr)


def _elements(file: Path) -> Iterator[tuple[int, int, object]]:
    try:
        yield from scan(file)
    except WrongFormat as error:
        raise DataError(f"{file} {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not JSON that holds a list ({error}); the download may be cut off"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error})") from None


def _scan_index(
    file: Path, entries: Iterable, version: list[int], ignore: Collection[str]
) -> Index:
    numbers, bad, unread = array("q"), {}, Counter()
    for row, (start, stop, entry) in enumerate(entries):
        about = [0] * 5
        try:
            entry = read_entry(entry, f"{file.name} entry {row}", ignore)
            text, turns = text_of(entry), entry["conversations"]
            stop = stop or len(text.encode()) + 32 * len(
                turns
            )  # a table's: as JSON has it, with a turn's keys
            images, videos = len(media_paths_of(entry)), len(media_paths_of(entry, "video"))
            unlearned = sum(not turn.get("learn", True) for turn in turns)
            learned = sum(turn["from"] == "gpt" for turn in turns) - unlearned
            words = text.count(" ") + text.count("\n") + 1
            about = [
                2 if videos else 1 if images else 0,
                images + videos,
                words,
                learned,
                unlearned,
            ]
            unread.update(unread_keys(entry))
        except DataError as error:
            bad[row] = str(error)
        numbers.extend((start, stop, *about))
    if not numbers:
        raise DataError(f"{file} must hold a JSON list with at least one conversation")
    start, stop, medium, media, words, *turns = np.array(numbers).reshape(-1, 7).T
    small = [media, words, *turns]
    return Index(
        *(start.copy(), stop.copy(), medium.astype(np.int8)),
        *(column.astype(np.int32) for column in small),
        *(bad, dict(unread), version),
    )


def file_version(file: str | Path | int) -> list[int]:
    """What changes when a file, or one that a table is read from, does."""
    parts = choose_split(file)[0] if isinstance(file, Path) and is_table(file) else [file]
    parts = [
        own
        for part in parts
        for own in (part.iterdir() if isinstance(part, Path) and part.is_dir() else [part])
    ]
    stats = [os.stat(part) for part in sorted(parts)]
    return [sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)]


@cache
def _code() -> str:
    """Of what reads and checks data files, with the versions of the libraries that decode."""
    digest = hashlib.sha256(f"{PIL.__version__} {version_of('av')}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_path(file: Path, suffix: str, *more: object) -> Path:
    """Where something about ``file`` (and ``more``) is kept, as this code finds it."""
    key = hashlib.sha256(
        repr([str(part) for part in (file.resolve(), *more, _code())]).encode()
    ).hexdigest()[:16]
    return CACHE / f"{file.stem}-{key}.{suffix}"


def keep(kept: Path, content: bytes) -> None:
    """Write ``content`` at once, whatever other processes do; where that cannot be, say so and go on without."""
    part = kept.with_name(f"{kept.name}.part{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(kept)
    except OSError as error:
        print(
            f"note: {kept} cannot be kept ({error}); it will be made again next time",
            file=sys.stderr,
        )


def read_reasons(text: str) -> dict[int, str]:
    return {int(index): reason for index, reason in json.loads(text).items()}
