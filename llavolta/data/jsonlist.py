"""Reads large JSON lists and JSON Lines one element at a time, with its place in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import TextIO

from llavolta.data.kinds import kind_of

LONGEST = 1 << 23  # characters of an element; a longer one means a broken file
# How a file begins, maybe after a byte-order mark. Group 1 is "]" for an empty list, "" for
# another list, and None for JSON Lines, which begin with an object.
_OPENING = re.compile(r"\ufeff?[ \t\n\r]*(?:\[[ \t\n\r]*(\]?)|(?=\{))")
# What follows an element: a comma or the end of the list, or the end of the line.
_AFTER = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_AFTER_LINE = re.compile(r"[ \t\r]*(?:\n[ \t\n\r]*|\Z)")


class WrongFormat(ValueError):
    """A file of another format. The message follows the file's name."""


def scan(file: Path) -> Iterator[tuple[int, int, object]]:
    """Read the elements of a JSON list, or the lines of JSON Lines, in blocks.

    Args:
        file: The file, in UTF-8.

    Yields:
        First byte, byte after the end, and value of each element.

    Raises:
        WrongFormat: The file is of another format or encoding, or holds a single object.
        ValueError: The JSON is broken or cut off; the message says at which byte.
        RecursionError: An element is nested too deeply.
        OSError: The file cannot be read.
    """
    decode = json.JSONDecoder().raw_decode
    if kind := kind_of(file):
        raise WrongFormat(f"is {kind}")
    with file.open("rb") as source:
        head = source.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            raise WrongFormat("is UTF-16; save it as UTF-8")
    # newline="\n" leaves line ends as they are, so that characters can be counted as bytes.
    with file.open(encoding="utf-8", newline="\n") as source:
        text = _read(source)
        opening = _OPENING.match(text)
        if not opening:
            raise WrongFormat(
                f"begins with {short(text[:20])}; give a JSON list, JSON Lines, or a table named "
                "*.parquet"
            )
        at, byte, lines = opening.end(), _bytes(text, 0, opening.end()), opening[1] is None
        closed = bool(opening[1])
        while not closed:
            # An element must be in memory as a whole, so LONGEST characters are read ahead.
            if len(text) - at < LONGEST and (more := _read(source)):
                text, at = text[at:] + more, 0
            try:
                element, stop = decode(text, at)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{error.msg} at byte {byte + _bytes(text, at, error.pos)}"
                ) from None
            start, byte = byte, byte + _bytes(text, at, stop)
            after = (_AFTER_LINE if lines else _AFTER).match(text, stop)
            # One object in JSON Lines may be a list of one, if the file's name says so. Else it is
            # JSON of another kind, such as {"data": [...]}.
            alone = lines and start == opening.end() and (not after or after.end() == len(text))
            if alone and (not after or file.suffix != ".jsonl"):
                raise WrongFormat("holds one object; write a list of conversations, or one a line")
            yield start, byte, element
            if not after:
                raise ValueError(
                    f"no {'end of the line' if lines else 'comma or end of the list'} at byte "
                    f"{byte}"
                )
            at, byte = after.end(), byte + after.end() - stop
            closed = at == len(text) if lines else after[1] == "]"
        if text[at:].strip() or _read(source).strip():
            raise ValueError(f"there is more behind the end of the list at byte {byte}")


def _read(source: TextIO) -> str:
    """Read the next block. Raise WrongFormat if it is not UTF-8."""
    try:
        return source.read(2 * LONGEST)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # cut off in a character
            raise
        raise WrongFormat(
            f"is not UTF-8 (byte 0x{error.object[error.start]:02x}), perhaps Latin-1 or "
            "Windows-1252; save it as UTF-8, as 'iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW' does"
        ) from None


def _bytes(text: str, start: int, stop: int) -> int:
    """Count the bytes of a part of ``text`` in UTF-8."""
    return stop - start if text.isascii() else len(text[start:stop].encode())
