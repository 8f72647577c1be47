"""Large JSON lists, an element at a time: what each one is, and where it stands in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST = 1 << 23  # characters of an element; a longer one means a broken file
_OPENING = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\]?)")
_AFTER = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


def scan(file: Path) -> Iterator[tuple[int, int, object]]:
    """First byte, end and value of each element of the list in ``file``, which is read once and in blocks.

    Raises ValueError for what is not a JSON list in UTF-8, RecursionError for one nested too deeply, and OSError.
    """
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8", newline="\n") as source:  # newlines as they are: bytes are counted
        text = source.read(2 * LONGEST)
        opening = _OPENING.match(text)
        if not opening:
            raise ValueError("it does not begin as a list")
        at = byte = opening.end()
        closed = bool(opening[1])
        while not closed:
            if len(text) - at < LONGEST and (more := source.read(2 * LONGEST)):
                text, at = text[at:] + more, 0
            try:
                element, stop = decode(text, at)
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg} at byte {byte + _bytes(text, at, error.pos)}") from None
            start, byte = byte, byte + _bytes(text, at, stop)
            yield start, byte, element
            after = _AFTER.match(text, stop)
            if not after:
                raise ValueError(f"no comma or end of the list at byte {byte}")
            at, byte, closed = after.end(), byte + after.end() - stop, after[1] == "]"
        if text[at:].strip() or source.read(1).strip():
            raise ValueError(f"there is more behind the end of the list at byte {byte}")


def _bytes(text: str, start: int, stop: int) -> int:
    """Bytes of a part of ``text`` in UTF-8."""
    return stop - start if text.isascii() else len(text[start:stop].encode())
