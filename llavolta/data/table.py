"""Conversations in tables: Parquet files, folders of these as the hub has them, and data sets saved by ``datasets``.

A row is an entry like one of JSON (see data.entries). Rows stay on disk, mapped into memory by Arrow, and images and
clips inside a table are read when they are asked for.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from llavolta.data.entries import MEDIA, Cell, form_of
from llavolta.errors import DataError

_SHARD = re.compile("(.+)-[0-9]{5}-of-[0-9]{5}")
_SPLIT = re.compile(
    "(?:.*[-._ ])?(train|validation|valid|val|dev|test|eval)(?:ing|uation)?(?:[-._ 0-9].*)?"
)


def is_table(file: Path) -> bool:
    """Whether ``file`` is a Parquet file, a folder of these, one that ``save_to_disk`` made, or a split of such."""
    return (
        file.suffix == ".parquet"
        or bool(_splits(file) or _split_of_parent(file))
        or _is_saved(file)
    )


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files, or the saved data set, of each split in ``folder``; "" holds files whose names tell none."""
    if (folder / "dataset_dict.json").is_file():
        return {part.parent.name: [part.parent] for part in sorted(folder.glob("*/state.json"))}
    found: dict[str, list[Path]] = {}
    for part in sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")):
        name = _SHARD.fullmatch(part.stem) or _SPLIT.fullmatch(part.stem)
        found.setdefault(name[1] if name else "", []).append(part)
    return found


def _split_of_parent(file: Path) -> list[Path] | None:
    """Of FOLDER/validation, where FOLDER holds files such as validation-00000-of-00001.parquet."""
    return None if file.exists() else _splits(file.parent).get(file.name)


def choose_split(file: Path) -> tuple[list[Path], str | None]:
    """What ``file`` is read from, and what to say where it is one of several splits. Raises DataError."""
    if (parts := _split_of_parent(file)) is not None:
        return parts, None
    splits = {} if file.is_file() or _is_saved(file) else _splits(file)
    if len(splits) <= 1:
        return next(iter(splits.values()), [file]), None
    names = ", ".join(name or "files of no split" for name in splits)
    if "train" not in splits:
        raise DataError(
            f"{file} holds several splits ({names}) and none is 'train'; give {file}/NAME"
        )
    return splits[
        "train"
    ], f"of {file}, with the splits {names}, 'train' is read; {file}/NAME reads another"


class Table:
    """The rows of a table as entries, and the images and clips inside it as bytes. Raises DataError."""

    def __init__(self, file: Path):
        import datasets  # seconds to import

        self.file = file
        parts, _ = choose_split(file)
        try:
            saved = len(parts) == 1 and parts[0].is_dir()
            rows = (
                datasets.load_from_disk(parts[0])
                if saved
                else datasets.Dataset.from_parquet(list(map(str, parts)))
            )
        except Exception as error:  # whatever Arrow makes of a damaged file
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(
                f"{file} cannot be read as a table ({why}); the download may be cut off"
            ) from None
        try:
            form = form_of(rows.column_names)
        except DataError as error:
            raise DataError(f"{file} {error}") from None
        if form is None:
            columns = ", ".join(rows.column_names)
            raise DataError(
                f"{file} has no column 'messages' nor 'conversations'; it has {columns}"
            )
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, row: int) -> dict:
        """The row; what it has of images and clips in binary is a Cell."""
        one = self.rows[row : row + 1]
        cells = {name: one.column(name)[0] for name in one.column_names}
        return {
            name: _outline(cell, name) if name.rstrip("s") in MEDIA else cell.as_py()
            for name, cell in cells.items()
        }

    def content(self, row: int, cell: Cell) -> object:
        """What the table holds at ``cell`` of a row: bytes, or bytes and path."""
        found = self.rows[row : row + 1].column(cell.column)[0]
        for number in cell.place:
            found = found[number]
        return found.as_py()


def _outline(value, column: str, place: tuple[int, ...] = ()) -> object:
    """A cell of Arrow's as Python has it, with a Cell for each binary, or structure of one, in it."""
    from pyarrow import types

    if not value.is_valid:
        return None
    kind = value.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_outline(one, column, (*place, number)) for number, one in enumerate(value.values)]
    inside = (
        [kind.field(number).type for number in range(kind.num_fields)]
        if types.is_struct(kind)
        else [kind]
    )
    if any(types.is_binary(one) or types.is_large_binary(one) for one in inside):
        return Cell(column, place)
    return value.as_py()


@lru_cache(maxsize=8)
def open_table(file: Path, version: tuple) -> Table:
    """One for all that read it; version: another where the file has changed."""
    return Table(file)
