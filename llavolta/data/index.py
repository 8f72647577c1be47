"""Where the entries of a data file are: one pass over it, kept for the next time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from array import array
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import PIL

from llavolta.data.entries import as_llava, check_entry, media_paths_of
from llavolta.data.jsonlist import WrongFormat, scan
from llavolta.data.table import is_table, open_table
from llavolta.errors import DataError
from llavolta.paths import DATA

CACHE = DATA / "cache" / "llava"
KEPT_FROM = 1 << 25  # bytes of a data file whose index is kept: a smaller one is indexed in a second


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
    if is_table(file):
        return _scan_table(file)
    if not file.is_file():
        raise DataError(f"no data file {file}; give the path of a JSON list of conversations, or of a Parquet file")
    version, kept = file_version(file), kept_path(file, "npz")
    if kept.exists():
        try:
            held = dict(np.load(kept))
            index = Index(**{**held, "bad": read_reasons(held["bad"].item()), "version": held["version"].tolist()})
            if index.version == version:
                return index
        except Exception:  # whatever numpy makes of a damaged file; it is made again
            kept.unlink(missing_ok=True)
    index = _scan_index(file, version)
    if version[0] >= KEPT_FROM:
        archive = io.BytesIO()
        np.savez(archive, **{**vars(index), "bad": json.dumps(index.bad)})
        keep(kept, archive.getvalue())
    return index


def _scan_table(file: Path) -> Index:
    """Of a table: what stands for the bytes of an entry are those of its conversation as JSON."""
    version = file_version(file)
    table, found, bad = open_table(file, tuple(version)), [], {}
    for row in range(len(table)):
        try:
            entry = as_llava(table.entry(row))
            text = check_entry(entry, f"{file.name} entry {row}")
            size = len(json.dumps(entry["conversations"]))
            found.append((size, int("image" in entry), len(media_paths_of(entry)), text.count(" ") + 1))
        except DataError as error:
            bad[row] = str(error)
            found.append((0, 0, 0, 0))
    if not found:
        raise DataError(f"{file} must hold at least one conversation")
    size, medium, media, words = np.array(found).T
    return Index(np.zeros_like(size), size, medium.astype(np.int8), media, words, bad, version)


def _scan_index(file: Path, version: list[int]) -> Index:
    starts, stops, words, medium, media, bad = array("q"), array("q"), array("q"), array("b"), array("q"), {}
    try:
        for start, stop, entry in scan(file):
            try:
                entry = as_llava(entry)
                text = check_entry(entry, f"{file.name} entry {len(starts)}")
                words.append(text.count(" ") + text.count("\n") + 1)
                images, videos = len(media_paths_of(entry)), len(media_paths_of(entry, "video"))
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


def file_version(file: str | Path | int) -> list[int]:
    """What changes when a file, or one in a folder, does."""
    if isinstance(file, Path) and file.is_dir():
        stats = [part.stat() for part in sorted(file.iterdir()) if part.is_file()]
        return [sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)]
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


@cache
def _code() -> str:
    """Of what reads and checks data files, with the versions of the libraries that decode."""
    digest = hashlib.sha256(f"{PIL.__version__} {version_of('av')}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_path(file: Path, suffix: str, *more: object) -> Path:
    """Where something about ``file`` (and ``more``) is kept, as this code finds it."""
    key = hashlib.sha256(repr([str(part) for part in (file.resolve(), *more, _code())]).encode()).hexdigest()[:16]
    return CACHE / f"{file.stem}-{key}.{suffix}"


def keep(kept: Path, content: bytes) -> None:
    """Write ``content`` at once, whatever other processes do; where that cannot be, say so and go on without."""
    part = kept.with_name(f"{kept.name}.part{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(kept)
    except OSError as error:
        print(f"note: {kept} cannot be kept ({error}); it will be made again next time", file=sys.stderr)


def read_reasons(text: str) -> dict[int, str]:
    return {int(index): reason for index, reason in json.loads(text).items()}
