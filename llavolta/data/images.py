"""Pictures and clips as a viewer shows them: found below their folder, upright, RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from llavolta.data.kinds import kind_of
from llavolta.data.video import read_frames
from llavolta.errors import DataError

# No reader that starts other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
DEPTHS = (8, 10, 12, 14, 16)  # bits of what cameras and scanners save in 16


def check_folder(folder: Path) -> None:
    """Raise DataError unless ``folder`` is one."""
    if not folder.is_dir():
        kind = kind_of(folder) or "a file" if folder.is_file() else None
        why = f"the image folder {folder} is {kind}" if kind else f"no image folder {folder}"
        raise DataError(f"{why}; give the folder that the image paths are relative to")


def find_file(folder: Path, path: str, name: str, medium: str = "image") -> Path:
    """The file at ``path`` below ``folder``, also by Windows' backslashes.

    Links in the folder are followed: data sets are often spread over disks so. A path itself must not lead out, by
    '..' or by being absolute.

    Raises:
        DataError: there is no such file, or its path leads out.
    """
    root = os.path.abspath(folder)
    for written in dict.fromkeys((path, path.replace("\\", "/"))):
        # Normalised as text: behind a link, '..' would be the parent of the link's target.
        full = os.path.normpath(os.path.join(root, written))
        roots = (root, os.path.realpath(root)) if os.path.isabs(written) else (root,)
        if not any(full == base or full.startswith(os.path.join(base, "")) for base in roots):
            raise DataError(
                f"{name}: {medium} path {path!r} leads out of the {medium} folder {folder}; "
                "move the file in, or put a link to its folder there"
            )
        if os.path.isfile(full):
            return Path(full)
    if "://" in path:
        raise DataError(
            f"{name}: {medium} {path!r} is an address; download it and give its path in {folder}"
        )
    above = next((part for part in Path(full).parents if os.path.isfile(part)), None)
    if above and (kind := kind_of(above)):
        raise DataError(f"{name}: no {medium} {path!r}, as {above} is {kind}")
    raise DataError(
        f"{name}: no {medium} {path!r} in {folder}; check the {medium} folder or fetch the file"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture upright (by its EXIF orientation) and in RGB, 8 bits a channel, as a viewer shows it.

    ============================== =================================================================
    1, L, P, RGB, CMYK, YCbCr, HSV converted; of several frames, the first
    with transparency              composed on white (RGBA, RGBa, LA, La, PA; a transparent colour)
    I;16 and its byte orders, I    white is the largest value of 8, 10, 12, 14 or 16 bits: of the
                                   smallest of these depths that holds the image's own maximum
    F                              from 0 to 1 where 1 is white, or from 0 to 255
    others; I and F beyond these   ValueError
    ============================== =================================================================

    Files do not say how many of their 16 bits are used, so a dark image of 16 bits is taken for a bright one of fewer.
    Of colours with 16 bits a channel Pillow reads the upper 8.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        if image.mode == "F":
            white = 1 if high <= 1 else 255
        else:
            white = next((2**bits - 1 for bits in DEPTHS if high < 2**bits), 65535)
        if not 0 <= low <= high <= white:  # NaN, too
            raise ValueError(
                f"its {image.mode} values from {low:g} to {high:g} have no known white; save it with 8 bits"
            )
        return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def open_image(
    folder: Path,
    path: str,
    name: str,
    pad: tuple[int, int, int] | None = None,
    eighth: bool = False,
    content: bytes | None = None,
) -> Image.Image:
    """The picture at ``path`` below ``folder``, or of the file's ``content``, RGB. Raises DataError, naming the entry
    ``name``.

    eighth: a JPEG at an eighth of its size, which is decoded faster and breaks at the same faults. A picture of more
    than PIL.Image.MAX_IMAGE_PIXELS is refused, as its decoded form may not fit in memory.
    """
    full = find_file(folder, path, name) if content is None else io.BytesIO(content)
    try:
        with Image.open(full, formats=FORMATS) as opened:
            if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"{opened.width} x {opened.height} pixels are too many"
                )
            if eighth:
                opened.draft("RGB", (1, 1))
            image = to_rgb(opened)
    except Exception as error:  # Pillow raises whatever a broken file makes of its readers
        raise _unreadable(full, path, name, error) from None
    return pad_to_square(image, pad)


def _unreadable(file: Path | io.BytesIO, path: str, name: str, error: Exception) -> DataError:
    if kind := kind_of(file.getvalue() if isinstance(file, io.BytesIO) else file):
        return DataError(f"{name}: image {path!r} is {kind}, or drop the entry")
    return DataError(
        f"{name}: image {path!r} cannot be read ({error}); fetch it again or drop the entry"
    )


def open_video(
    folder: Path, path: str, name: str, frames: int, content: bytes | None = None
) -> list[Image.Image]:
    """``frames`` frames of the clip at ``path`` below ``folder``, or of the file's ``content``; see video.read_frames.
    Raises DataError."""
    clip = find_file(folder, path, name, "video") if content is None else content
    return read_frames(clip, frames, f"{name}: video {path!r}")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """``image`` in the middle of a square of ``colour`` (RGB), as LLaVA-1.5 sees it; None leaves it as it is."""
    if colour is None or image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def padding_colour(processor) -> tuple[int, int, int]:
    """The colour (RGB) that ``processor`` normalises to 0, which LLaVA-1.5 pads with."""
    return tuple(round(255 * mean) for mean in processor.image_processor.image_mean)


def image_size(
    folder: Path,
    path: str,
    name: str,
    pad: tuple[int, int, int] | None = None,
    content: bytes | None = None,
) -> tuple[int, int]:
    """(width, height) of a picture as ``open_image`` gives it, from the head of its file. Raises DataError."""
    full = find_file(folder, path, name) if content is None else io.BytesIO(content)
    try:
        with Image.open(full, formats=FORMATS) as opened:
            size, turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # as in open_image
        raise _unreadable(full, path, name, error) from None
    width, height = size[::-1] if turned else size
    return (width, height) if pad is None else (max(size), max(size))
