"""Conversations in tables: Parquet files and data sets saved by ``datasets``, with columns ``messages`` and ``images``.

The form that TRL and the hub's chat data sets have: a row's ``messages`` are transformers' chat format, contents text
or parts; its ``images`` (or ``image``) pictures inside the table, in their order. Where no message says where they
stand, they go before the first question. Rows stay on disk, mapped into memory by Arrow.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from llavolta.errors import DataError

MESSAGES, IMAGES = ("messages", "conversations"), ("images", "image")
MARK = "<image>"


def is_table(file: Path) -> bool:
    """Whether ``file`` is a Parquet file, a folder of these, or one that ``Dataset.save_to_disk`` made."""
    return file.suffix == ".parquet" or file.is_dir() and bool(_parts(file) or (file / "state.json").exists())


def _parts(folder: Path) -> list[str]:
    return sorted(str(part) for part in folder.glob("*.parquet"))


class Table:
    """The rows of a table as entries in LLaVA's format, and their pictures as bytes. Raises DataError."""

    def __init__(self, file: Path):
        import datasets  # seconds to import
        import pyarrow
        from pyarrow import compute

        self.file = file
        try:
            if file.is_dir() and not _parts(file):
                rows = datasets.load_from_disk(str(file))
            else:
                rows = datasets.Dataset.from_parquet(_parts(file) or str(file))
        except Exception as error:  # whatever Arrow makes of a damaged file
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{file} cannot be read as a table ({why}); the download may be cut off") from None
        if isinstance(rows, datasets.DatasetDict):
            raise DataError(f"{file} holds several splits ({', '.join(rows)}); give the folder of one")
        columns = rows.column_names
        self.messages = next((name for name in MESSAGES if name in columns), None)
        self.images = next((name for name in IMAGES if name in columns), None)
        if self.messages is None:
            raise DataError(f"{file} has no column 'messages'; it has {', '.join(columns)}")
        self.count, others = None, [name for name in columns if name != self.images]
        if self.images is not None:  # pictures as bytes, decoded when they are asked for
            held = rows.data.column(self.images)
            several = pyarrow.types.is_list(held.type) or pyarrow.types.is_large_list(held.type)
            self.count = compute.list_value_length(held).fill_null(0) if several else compute.is_valid(held)
            self.pictures = rows.select_columns([self.images]).with_format("arrow")
        self.rows = rows.select_columns(others).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, row: int) -> dict:
        """In LLaVA's format; ``image`` numbers the row's pictures."""
        [held] = self.rows[row : row + 1].to_pylist()
        pictures = 0 if self.count is None else int(self.count[row].as_py())
        entry = {name: value for name, value in held.items() if name != self.messages}
        entry["messages"] = [_without_nulls(turn) for turn in held[self.messages] or []]
        if not pictures and _marks(entry["messages"], parts_only=True):
            raise DataError(f"{self.file.name} entry {row} has a place for an image and no image in {self.images!r}")
        if pictures:
            entry["image"] = [str(number) for number in range(pictures)]
            if not _marks(entry["messages"]):
                _put_first(entry["messages"], pictures)
        return entry

    def picture(self, row: int, path: str) -> tuple[bytes | None, str | None]:
        """(bytes, path) of the picture that ``entry(row)`` calls ``path``; the table has one of the two."""
        [held] = self.pictures[row : row + 1].to_pylist()
        found = held[self.images]
        one = found if isinstance(found, dict) else found[int(path)]
        return one.get("bytes"), one.get("path")


def _without_nulls(turn: dict) -> dict:
    """Arrow gives every part every key."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [{key: value for key, value in part.items() if value is not None} for part in content]
        turn = {**turn, "content": parts}
    return {key: value for key, value in turn.items() if value is not None}


def _marks(messages: list[dict], parts_only: bool = False) -> bool:
    """Whether a message says where a picture stands, by a part of its content or by the word for it."""
    for turn in messages:
        content = turn.get("content", turn.get("value"))
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if any(part.get("type") == "image" for part in parts):
            return True
        if not parts_only and any(MARK in (part.get("text") or "") for part in parts):
            return True
    return False


def _put_first(messages: list[dict], count: int) -> None:
    for turn in messages:
        if turn.get("role", turn.get("from")) in ("user", "human"):
            key = "content" if "content" in turn else "value"
            if isinstance(turn[key], list):
                turn[key] = [{"type": "image"}] * count + turn[key]
            else:
                turn[key] = f"{MARK}\n" * count + str(turn[key])
            return


@lru_cache(maxsize=8)
def open_table(file: Path, version: tuple) -> Table:
    """One for all that read it; version: another where the file has changed."""
    return Table(file)
