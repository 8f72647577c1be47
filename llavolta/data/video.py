"""Clips: their frames, read with PyAV, and the processor that makes them a model's input.

PyAV is FFmpeg's own libraries in one wheel for every platform, so it reads what MSVD (avi), MSRVTT (mp4), ActivityNet
(mp4, mkv, webm) and TGIF come in, writes real files for the embedded clips, and needs no system package. torchcodec
needs an FFmpeg on the system and a build that matches torch's; decord is no longer kept up.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from llavolta.data.kinds import kind_of
from llavolta.errors import DataError

FRAMES = 8  # of a clip, as Video-LLaVA samples
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,gif"  # no playlist, which would open other files
OPENING = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}


def frame_places(total: int, count: int) -> list[int]:
    """Which of ``total`` frames ``count`` uniform samples are: evenly from the first to the last, rounded.

    As in Video-LLaVA it is by number, not by time: where the frame rate varies, dense parts are sampled densely. A clip
    of fewer frames shows some of them several times.
    """
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def read_frames(path: str | Path | bytes, count: int, name: str | None = None) -> list[Image.Image]:
    """``count`` frames (RGB, upright) of the clip at ``path``, or of a file of this content, at ``frame_places``; only
    these are in memory at a time.

    Raises DataError, naming ``name`` (default: the path), for a file that is missing, damaged, no video or without
    frames, and for frames of more than PIL.Image.MAX_IMAGE_PIXELS. Damage that the decoder does not notice passes.
    """
    name = name or f"the clip {path}"
    try:
        total = _count(path)
        kept, found = _decode(path, frame_places(total, count))
        if not found:
            raise ValueError("no frame can be decoded")
        if found != total:  # some packets hold no frame of their own
            kept, _ = _decode(path, frame_places(found, count))
        return [kept[place] for place in frame_places(found, count)]
    except (
        OSError,
        ValueError,
        LookupError,
        MemoryError,
    ) as error:  # PyAV's errors are of these kinds
        why = (
            f"is {kind}, or"
            if (kind := kind_of(path))
            else f"cannot be read ({error}); fetch it again or"
        )
        raise DataError(f"{name} {why} drop the entry") from None


def _count(path: str | Path | bytes) -> int:
    """Packets of the first video stream, which are its frames in most files. Raises ValueError if there are none."""
    with _open(path) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    if not total:
        raise ValueError("it has no frames")
    return total


def _decode(path: str | Path | bytes, places: list[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames at ``places``, and how many there are."""
    kept, number = {}, -1
    with _open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            if number in places:
                _check_size(frame.width, frame.height)
                kept[number] = frame.to_image()
                if (
                    frame.rotation
                ):  # of a phone that was held upright, as a player turns it: degrees to the left
                    kept[number] = kept[number].rotate(frame.rotation, expand=True)
    return kept, number + 1


def _open(path: str | Path | bytes):
    import av  # for clips alone: models of pictures do without it

    container = av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path), options=OPENING)
    try:
        if not container.streams.video:
            raise ValueError(
                "it has no video, only "
                + (", ".join({s.type for s in container.streams}) or "nothing")
            )
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


class FrameProcessor(VideoProcessorMixin):
    """The video processor of Video-LLaVA by way of its image processor, so that it needs no torchvision.

    Saved as a ``VideoLlavaVideoProcessor`` with the same settings, which transformers loads where torchvision is.
    """

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __call__(self, videos: list[list[Image.Image]], **kwargs) -> BatchFeature:
        """Clips, each a list of as many frames, to pixel_values_videos (clips, frames, 3, height, width)."""
        pixels = [self.images(frames, return_tensors="pt")["pixel_values"] for frames in videos]
        return BatchFeature({"pixel_values_videos": torch.stack(pixels)})

    def to_dict(self) -> dict:
        settings = self.images.to_dict() | {"video_processor_type": "VideoLlavaVideoProcessor"}
        return {name: value for name, value in settings.items() if name != "image_processor_type"}


class NoVideos(VideoProcessorMixin):
    """In the place of a model's video processor where there is no torchvision to load it: refuses clips, and is saved
    with the settings that it was found with, so that the model's folder stays whole."""

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings

    def __getattr__(self, name: str):
        try:
            return self.__dict__["settings"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __call__(self, *args, **kwargs):
        raise DataError(
            "this model's clips are read by torchvision, which is not installed; pip install torchvision"
        )

    def to_dict(self) -> dict:
        return dict(self.settings)


class Unchecked:
    """Mixed in before a processor's own class, whose check of a video processor would need torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


class VideoLlavaProcessor(Unchecked, transformers.VideoLlavaProcessor):
    """transformers' own, and saved under its name, with a FrameProcessor."""


def without_videos(kind: type, path: str):
    """The processor of class ``kind`` at ``path`` for pictures alone, where torchvision is missing; saved as a
    ``kind``, which reads clips again where torchvision is."""
    settings, _ = kind.get_processor_dict(path)
    clips = settings.get("video_processor")
    if clips is None:
        try:  # a file of its own, in folders of before transformers 5
            clips, _ = NoVideos.get_video_processor_dict(path)
        except OSError:
            clips = {}
    parts = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(path),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(path),
        "video_processor": lambda: NoVideos(clips),
    }
    blind = type(kind.__name__, (Unchecked, kind), {})  # saved under the name of ``kind``
    return blind.from_args_and_dict([parts[name]() for name in kind.get_attributes()], settings)
