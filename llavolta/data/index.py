"""Records where the entries of a data file are, in one pass that is cached for large files."""

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
KEPT_FROM = 1 << 25  # bytes of a file whose index is cached; a smaller one takes a second


@dataclass(frozen=True)
class Index:
    """Where the n entries of a data file are, and what is known of them.

    Attributes:
        start: (n,) first byte of the entry; 0 in a table.
        stop: (n,) byte after the entry. In a table: its size as JSON, estimated.
        medium: (n,) modality: 0 for text alone, 1 with images, 2 with a video.
        media: (n,) number of images and videos.
        lengths: (n,) words of the text, counted by blanks and line breaks.
        learned: (n,) number of answers that are trained on.
        unlearned: (n,) number of answers that are not trained on.
        bad: Reason of each entry with a wrong structure, by its number. Its medium, media and
            counts are 0.
        unread: Keys of entries and turns that nothing reads, and how many entries have each.
        version: Bytes of the file, and its modification time in nanoseconds.
    """

    start: np.ndarray
    stop: np.ndarray
    medium: np.ndarray
    media: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray
    unlearned: np.ndarray
    bad: dict[int, str]
    unread: dict[str, int]
    version: list[int]


def read_index(file: Path, ignore: Collection[str] = ()) -> Index:
    """Index a data file. The index of a large JSON file is cached in data/cache.

    Args:
        file: A JSON list, JSON Lines, or a table; see ``table.is_table``.
        ignore: Keys that are treated as absent; see ``entries.read_entry``.

    Returns:
        The index, the cached one if the file is unchanged.

    Raises:
        DataError: The file does not exist, is of another format, or has no entry.
    """
    table = is_table(file)
    if not table and not file.is_file():
        raise DataError(
            f"no data file {file}; give the path of a JSON list of conversations, or of a Parquet "
            "file"
        )
    version, kept = file_version(file), kept_path(file, "npz", *sorted(ignore))
    if kept.exists() and not table:
        try:
            with kept.open("rb") as source, np.load(source) as archive:
                held = dict(archive)
            # npz holds arrays alone, so the two dicts are saved as JSON text.
            words = {
                "bad": read_reasons(held["bad"].item()),
                "unread": json.loads(held["unread"].item()),
            }
            index = Index(**{**held, **words, "version": held["version"].tolist()})
            if index.version == version:
                return index
        except Exception:  # a damaged file makes numpy raise errors of many classes; index again
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
    """Yield the rows of a table as ``_elements`` does those of JSON; start and end are 0."""
    _note(choose_split(file)[1])
    table = open_table(file, tuple(version))
    for row in range(len(table)):
        yield 0, 0, table.entry(row)


@cache
def _note(text: str | None) -> None:
    """Print a note on stderr, once per process."""
    if text:
        print(f"note: {text}", file=sys.stderr)


def _elements(file: Path) -> Iterator[tuple[int, int, object]]:
    """Yield (first byte, end, value) of each entry of a JSON file."""
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
    """Check the structure of each entry, and collect what the index holds."""
    numbers, bad, unread = array("q"), {}, Counter()
    for row, (start, stop, entry) in enumerate(entries):
        about = [0] * 5  # of a bad entry: medium, media, words, learned, unlearned
        try:
            entry = read_entry(entry, f"{file.name} entry {row}", ignore)
            text, turns = text_of(entry), entry["conversations"]
            # A row of a table has no bytes in JSON; some 32 stand for the keys of a turn.
            stop = stop or len(text.encode()) + 32 * len(turns)
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
    # One flat array takes a fraction of the memory that n tuples would: (7 n,) -> 7 of (n,)
    start, stop, medium, media, words, *turns = np.array(numbers).reshape(-1, 7).T
    small = [media, words, *turns]
    return Index(
        *(start.copy(), stop.copy(), medium.astype(np.int8)),
        *(column.astype(np.int32) for column in small),
        *(bad, dict(unread), version),
    )


def file_version(file: str | Path | int) -> list[int]:
    """Return what changes when a data file changes.

    Args:
        file: The file, the folder of a table, or an open file descriptor.

    Returns:
        Bytes of all files that are read, and the latest modification time in nanoseconds.
    """
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
    """Hash the code that reads and checks data files, and the versions of the decoders."""
    digest = hashlib.sha256(f"{PIL.__version__} {version_of('av')}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_path(file: Path, suffix: str, *more: object) -> Path:
    """Return the path at which something about a data file is cached.

    Args:
        file: The data file.
        suffix: Suffix of the cache file, without a dot.
        *more: What else the cached content depends on, such as options.

    Returns:
        A path in data/cache. It changes with the code that reads data files.
    """
    key = hashlib.sha256(
        repr([str(part) for part in (file.resolve(), *more, _code())]).encode()
    ).hexdigest()[:16]
    return CACHE / f"{file.stem}-{key}.{suffix}"


def keep(kept: Path, content: bytes) -> None:
    """Write a cache file in one step, so that other processes see all of it or nothing.

    If it cannot be written, a note on stderr says so and nothing is raised.
    """
    part = kept.with_name(f"{kept.name}.part{os.getpid()}")  # of this process alone
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
    """Read reasons by entry from JSON, whose keys are text."""
    return {int(index): reason for index, reason in json.loads(text).items()}
