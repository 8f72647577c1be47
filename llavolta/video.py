"""Frames of a clip, read with PyAV.

PyAV is FFmpeg's own libraries in one wheel for every platform, so it reads what MSVD (avi), MSRVTT (mp4), ActivityNet
(mp4, mkv, webm) and TGIF come in, writes real files for the embedded clips, and needs no system package. torchcodec
needs an FFmpeg on the system and a build that matches torch's; decord is no longer kept up.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

from llavolta.errors import DataError

FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,gif"  # no playlist, which would open other files
OPENING = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}


def frame_places(total: int, count: int) -> list[int]:
    """Which of ``total`` frames ``count`` uniform samples are: evenly from the first to the last, rounded.

    As in Video-LLaVA it is by number, not by time: where the frame rate varies, dense parts are sampled densely. A clip
    of fewer frames shows some of them several times.
    """
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def read_frames(path: str | Path, count: int, name: str | None = None) -> list[Image.Image]:
    """``count`` frames (RGB) of the clip at ``path``, at ``frame_places``; only these are in memory at a time.

    Raises DataError, naming ``name`` (default: the path), for a file that is missing, damaged, no video or without
    frames, and for frames of more than PIL.Image.MAX_IMAGE_PIXELS. Damage that the decoder does not notice passes.
    """
    name = name or f"the clip {path}"
    try:
        total = _count(path)
        kept, found = _decode(path, frame_places(total, count))
        if found != total:  # some packets hold no frame of their own
            if not found:
                raise ValueError("no frame can be decoded")
            total = found
            kept, found = _decode(path, frame_places(total, count))
        return [kept[place] for place in frame_places(total, count)]
    except (OSError, ValueError, LookupError, MemoryError) as error:  # PyAV's errors are of these kinds
        raise DataError(f"{name} cannot be read ({error}); fetch it again or drop the entry") from None


def _count(path: str | Path) -> int:
    """Packets of the first video stream, which are its frames in most files. Raises ValueError if there are none."""
    with _open(path) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    if not total:
        raise ValueError("it has no frames")
    return total


def _decode(path: str | Path, places: list[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames at ``places``, and how many there are."""
    kept, number = {}, -1
    with _open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            if number in places:
                _check_size(frame.width, frame.height)
                kept[number] = frame.to_image()
    return kept, number + 1


def _open(path: str | Path):
    container = av.open(str(path), options=OPENING)
    try:
        if not container.streams.video:
            raise ValueError("it has no video, only " + (", ".join({s.type for s in container.streams}) or "nothing"))
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height)
        stream.thread_type = "NONE" if stream.width * stream.height < 1 << 16 else "AUTO"
    except Exception:
        container.close()
        raise
    return container


def _check_size(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"frames of {width} x {height} pixels are too large")
