"""Recognises files that are not what was expected, such as an archive, and says what to do."""

from __future__ import annotations

from pathlib import Path

HEAD = 512  # bytes that are read; the mark of a tar archive starts at byte 257
_FETCH = "fetch the file itself"
_BEGINNINGS = (
    (b"version https://git-lfs", f"a Git LFS pointer; {_FETCH} with 'git lfs pull'"),
    (b"PAR1", "a Parquet table; name it *.parquet and give it as the data file"),
    (b"%PDF", "a PDF document; save its pages as PNG"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x1f\x8b", "compressed with gzip; unpack it (gunzip, or tar -xzf)"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard; unpack it (zstd -d)"),
    (b"BZh", "compressed with bzip2; unpack it (bunzip2, or tar -xjf)"),
    (b"\xfd7zXZ", "compressed with xz; unpack it (unxz, or tar -xJf)"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def kind_of(file: str | Path | bytes) -> str | None:
    """Say what a file is by its first bytes, and what to do about it.

    Args:
        file: The path of the file, or its content.

    Returns:
        Text that follows "is" in an error message. None if the file cannot be opened or is of no
        kind that is known here.
    """
    if isinstance(file, bytes):
        head = file[:HEAD]
    else:
        try:
            with open(file, "rb") as source:
                head = source.read(HEAD)
        except OSError:
            return None
    if not head:
        return f"empty; {_FETCH} again"
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    # The others cannot be recognised by a fixed beginning.
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "HEIC, a phone's format, which is not read here; save it as JPEG"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return f"a web page, such as a server's error; {_FETCH}"
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text:
        return "an SVG drawing; save it as PNG"
    return None
