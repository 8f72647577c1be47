"""Large JSON lists and JSON Lines, an element at a time: what each one is, and where it stands in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import TextIO

from llavolta.data.kinds import kind_of

LONGEST = 1 << 23  # characters of an element; a longer one means a broken file
_OPENING = re.compile(
    r"\ufeff?[ \t\n\r]*(?:\[[ \t\n\r]*(\]?)|(?=\{))"
)  # maybe behind a byte-order mark
_AFTER = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_AFTER_LINE = re.compile(r"[ \t\r]*(?:\n[ \t\n\r]*|\Z)")


class WrongFormat(ValueError):
    """A whole file of another format; the message goes on from the file's name."""


def scan(file: Path) -> Iterator[tuple[int, int, object]]:
    """First byte, end and value of each element of the list in ``file``, or of its lines; read once and in blocks.

    Raises ValueError for what is neither a JSON list nor JSON Lines in UTF-8, WrongFormat where that is by intent,
    RecursionError for one nested too deeply, and OSError.
    """
    decode = json.JSONDecoder().raw_decode
    if kind := kind_of(file):
        raise WrongFormat(f"is {kind}")
    with file.open("rb") as source:
        head = source.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            raise WrongFormat("is UTF-16; save it as UTF-8")
    with file.open(
        encoding="utf-8", newline="\n"
    ) as source:  # newlines as they are: bytes are counted
        text = _read(source)
        opening = _OPENING.match(text)
        if not opening:
            raise WrongFormat(
                f"begins with {short(text[:20])}; give a JSON list, JSON Lines, or a table named *.parquet"
            )
        at, byte, lines = opening.end(), _bytes(text, 0, opening.end()), opening[1] is None
        closed = bool(opening[1])
        while not closed:
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
            alone = lines and start == opening.end() and (not after or after.end() == len(text))
            if alone and (not after or file.suffix != ".jsonl"):
                raise WrongFormat("holds one object; write a list of conversations, or one a line")
            yield start, byte, element
            if not after:
                raise ValueError(
                    f"no {'end of the line' if lines else 'comma or end of the list'} at byte {byte}"
                )
            at, byte = after.end(), byte + after.end() - stop
            closed = at == len(text) if lines else after[1] == "]"
        if text[at:].strip() or _read(source).strip():
            raise ValueError(f"there is more behind the end of the list at byte {byte}")


def _read(source: TextIO) -> str:
    """The next block of ``source``, as the rules for UTF-8 have it."""
    try:
        return source.read(2 * LONGEST)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # cut off in a character
            raise
        raise WrongFormat(
            f"is not UTF-8 (byte 0x{error.object[error.start]:02x}), perhaps Latin-1 or Windows-1252; save it as "
            "UTF-8, as 'iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW' does"
        ) from None


def _bytes(text: str, start: int, stop: int) -> int:
    """Bytes of a part of ``text`` in UTF-8."""
    return stop - start if text.isascii() else len(text[start:stop].encode())
