"""Conversations in tables: Parquet files, folders of them, and data sets that ``datasets`` saved.

A row is an entry, as in JSON (see ``data.entries``). Arrow maps the rows from disk, and the images
and videos inside of a table are read only when they are needed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from llavolta.data.entries import MEDIA, Cell, form_of
from llavolta.errors import DataError

_SHARD = re.compile("(.+)-[0-9]{5}-of-[0-9]{5}")  # the hub's: train-00000-of-00002
# Other names that tell a split, such as "my_train", "validation-part-1" and "training".
_SPLIT = re.compile(
    "(?:.*[-._ ])?(train|validation|valid|val|dev|test|eval)(?:ing|uation)?(?:[-._ 0-9].*)?"
)


def is_table(file: Path) -> bool:
    """Return whether a path is a table.

    Args:
        file: A Parquet file, a folder of these, a folder that ``save_to_disk`` wrote, or
            FOLDER/SPLIT for a split of such a folder.

    Returns:
        True for these. A name that ends in .parquet is enough.
    """
    return (
        file.suffix == ".parquet"
        or bool(_splits(file) or _split_of_parent(file))
        or _is_saved(file)
    )


def _is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote a single data set to ``folder``."""
    return (folder / "state.json").is_file()


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split in ``folder``; "" has those whose names tell no split."""
    if (folder / "dataset_dict.json").is_file():
        return {part.parent.name: [part.parent] for part in sorted(folder.glob("*/state.json"))}
    found: dict[str, list[Path]] = {}
    for part in sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")):
        name = _SHARD.fullmatch(part.stem) or _SPLIT.fullmatch(part.stem)
        found.setdefault(name[1] if name else "", []).append(part)
    return found


def _split_of_parent(file: Path) -> list[Path] | None:
    """Return the files of FOLDER/validation, for example; None if the folder has no such split."""
    return None if file.exists() else _splits(file.parent).get(file.name)


def choose_split(file: Path) -> tuple[list[Path], str | None]:
    """Choose the files that a table is read from.

    Args:
        file: The path of the table.

    Returns:
        The files, and a note if "train" was chosen of several splits, else None.

    Raises:
        DataError: There are several splits, and none is "train".
    """
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
    """The rows of a table as entries.

    Attributes:
        file: The path of the table.
        rows: The rows as a ``datasets.Dataset`` in Arrow format.

    Raises:
        DataError: The table cannot be read, or has no column with conversations.
    """

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
        """Read a row by column. Binary content in an image or video column is a Cell."""
        one = self.rows[row : row + 1]  # an Arrow table of one row
        cells = {name: one.column(name)[0] for name in one.column_names}
        return {
            name: _outline(cell, name) if name.rstrip("s") in MEDIA else cell.as_py()
            for name, cell in cells.items()
        }

    def content(self, row: int, cell: Cell) -> object:
        """Read what a cell of a row holds: bytes, or a dict of bytes and path."""
        found = self.rows[row : row + 1].column(cell.column)[0]
        for number in cell.place:
            found = found[number]
        return found.as_py()


def _outline(value, column: str, place: tuple[int, ...] = ()) -> object:
    """Convert an Arrow cell to Python, with a Cell for binary content or a struct that has it."""
    from pyarrow import types

    if not value.is_valid:
        return None
    kind = value.type
    # Lists of any depth are followed, so that each binary in them is a Cell of its own.
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
    """Open a table once for all that read it in this process.

    Args:
        file: The path of the table.
        version: The file's ``index.file_version``, so that a changed file is opened anew.
    """
    return Table(file)
