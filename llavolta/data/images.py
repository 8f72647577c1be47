"""Opens images as a viewer shows them (upright, RGB), and videos, from paths below a folder."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from llavolta.data.kinds import kind_of
from llavolta.data.video import read_frames
from llavolta.errors import DataError

# Pillow's readers of other formats may start other programs, such as Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners use of 16


def check_folder(folder: Path) -> None:
    """Raise DataError unless ``folder`` is a folder."""
    if not folder.is_dir():
        kind = kind_of(folder) or "a file" if folder.is_file() else None
        why = f"the image folder {folder} is {kind}" if kind else f"no image folder {folder}"
        raise DataError(f"{why}; give the folder that the image paths are relative to")


def find_file(folder: Path, path: str, name: str, medium: str = "image") -> Path:
    """Find an image or video below a folder. Windows' backslashes are accepted in its path.

    Links inside of the folder are followed, because data sets are often spread over disks this way.
    The path itself must not leave the folder, neither by ".." nor by being absolute.

    Args:
        folder: The image folder.
        path: The path as the entry has it.
        name: What the error calls the entry.
        medium: "image" or "video", for the error.

    Returns:
        The file.

    Raises:
        DataError: There is no such file, or its path leaves the folder.
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
    # An archive that was not unpacked may have the name of a folder of the path.
    above = next((part for part in Path(full).parents if os.path.isfile(part)), None)
    if above and (kind := kind_of(above)):
        raise DataError(f"{name}: no {medium} {path!r}, as {above} is {kind}")
    raise DataError(
        f"{name}: no {medium} {path!r} in {folder}; check the {medium} folder or fetch the file"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB with 8 bits per channel, upright by its EXIF orientation.

    ============================== ==============================================================
    Mode                           Conversion
    ============================== ==============================================================
    1, L, P, RGB, CMYK, YCbCr, HSV Pillow's. Of several frames, the first one is used.
    with transparency              Composed on white (RGBA, RGBa, LA, La, PA, one transparent
                                   colour).
    I;16 of any byte order, I      White is the largest value of 8, 10, 12, 14 or 16 bits: of the
                                   smallest of these depths that holds the image's maximum.
    F                              White is 1 if no value is above 1, else 255.
    ============================== ==============================================================

    Files do not say how many of their 16 bits are used, so a dark image of 16 bits is taken for a
    bright one of fewer. Of colours with 16 bits per channel Pillow reads the upper 8.

    Args:
        image: The image as Pillow opened it.

    Returns:
        The image in mode "RGB".

    Raises:
        ValueError: The mode is another one, or an I or F image has values outside of these ranges.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        if image.mode == "F":
            white = 1 if high <= 1 else 255
        else:
            white = next((2**bits - 1 for bits in DEPTHS if high < 2**bits), 65535)
        if not 0 <= low <= high <= white:  # also true for NaN
            raise ValueError(
                f"its {image.mode} values from {low:g} to {high:g} have no known white; save it "
                "with 8 bits"
            )
        return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied by transparency
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
    """Open an image in RGB, upright.

    Args:
        folder: The image folder.
        path: The image's path below it.
        name: What the error calls the entry.
        pad: Colour (RGB) that pads the image to a square; None: no padding.
        eighth: Whether to decode a JPEG at an eighth of its size. That is faster, and fails on the
            same damage.
        content: The bytes of the image's file, in place of the one at ``path``.

    Returns:
        The image.

    Raises:
        DataError: The file is missing or cannot be decoded. Or the image has more than
            ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, which might not fit in memory.
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
    except Exception as error:  # on broken files Pillow's readers raise errors of many classes
        raise _unreadable(full, path, name, error) from None
    return pad_to_square(image, pad)


def _unreadable(file: Path | io.BytesIO, path: str, name: str, error: Exception) -> DataError:
    """Return the error for an image that cannot be decoded."""
    if kind := kind_of(file.getvalue() if isinstance(file, io.BytesIO) else file):
        return DataError(f"{name}: image {path!r} is {kind}, or drop the entry")
    return DataError(
        f"{name}: image {path!r} cannot be read ({error}); fetch it again or drop the entry"
    )


def open_video(
    folder: Path, path: str, name: str, frames: int, content: bytes | None = None
) -> list[Image.Image]:
    """Read ``frames`` frames of a video; see ``open_image`` and ``video.read_frames``."""
    clip = find_file(folder, path, name, "video") if content is None else content
    return read_frames(clip, frames, f"{name}: video {path!r}")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """Put an image in the middle of a square of ``colour`` (RGB), as in LLaVA-1.5; None: do not."""
    if colour is None or image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def padding_colour(processor) -> tuple[int, int, int]:
    """Return the colour (RGB) that a processor normalises to 0, with which LLaVA-1.5 pads."""
    return tuple(round(255 * mean) for mean in processor.image_processor.image_mean)


def image_size(
    folder: Path,
    path: str,
    name: str,
    pad: tuple[int, int, int] | None = None,
    content: bytes | None = None,
) -> tuple[int, int]:
    """Read the size that ``open_image`` would return, from the head of the file alone.

    Takes and raises what ``open_image`` does.

    Returns:
        (width, height) in pixels, upright and padded.
    """
    full = find_file(folder, path, name) if content is None else io.BytesIO(content)
    try:
        with Image.open(full, formats=FORMATS) as opened:
            # EXIF orientations 5 to 8 swap width and height.
            size, turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # as in open_image
        raise _unreadable(full, path, name, error) from None
    width, height = size[::-1] if turned else size
    return (width, height) if pad is None else (max(size), max(size))
