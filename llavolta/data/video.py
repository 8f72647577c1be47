"""Reads the frames of videos with PyAV, and processes them without torchvision.

PyAV has FFmpeg's libraries in one wheel for every platform. So it needs no system package, reads
the formats of MSVD (avi), MSRVTT (mp4), ActivityNet (mp4, mkv, webm) and TGIF, and writes the files
of the generated videos. torchcodec needs an FFmpeg on the system and a build that matches torch's.
decord is no longer maintained.
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

FRAMES = 8  # per video, as in Video-LLaVA
# No playlists: they would open other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,gif"
OPENING = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}


def frame_places(total: int, count: int) -> list[int]:
    """Choose ``count`` frames, evenly from the first to the last one.

    As in Video-LLaVA, frames are counted and not timed: where the frame rate varies, more are taken
    from dense parts. A video of fewer frames shows some of them several times.

    Args:
        total: Frames of the video.
        count: Frames to choose.

    Returns:
        ``count`` frame numbers from 0, rising.
    """
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def read_frames(path: str | Path | bytes, count: int, name: str | None = None) -> list[Image.Image]:
    """Read frames of a video, evenly from the first to the last. Only these are in memory.

    Args:
        path: The file, or its content.
        count: How many frames to read; see ``frame_places``.
        name: What the error calls the video; None: its path.

    Returns:
        ``count`` frames, RGB and upright.

    Raises:
        DataError: The file is missing, damaged, no video, or without frames, or a frame has more
            than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels. Damage that the decoder does not notice
            passes.
    """
    name = name or f"the clip {path}"
    try:
        total = _count(path)
        kept, found = _decode(path, frame_places(total, count))
        if not found:
            raise ValueError("no frame can be decoded")
        if found != total:  # some packets have no frame of their own; now the number is known
            kept, _ = _decode(path, frame_places(found, count))
        return [kept[place] for place in frame_places(found, count)]
    # PyAV's errors are subclasses of these.
    except (OSError, ValueError, LookupError, MemoryError) as error:
        why = (
            f"is {kind}, or"
            if (kind := kind_of(path))
            else f"cannot be read ({error}); fetch it again or"
        )
        raise DataError(f"{name} {why} drop the entry") from None


def _count(path: str | Path | bytes) -> int:
    """Count the packets of the first video stream, in most files one per frame."""
    with _open(path) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    if not total:
        raise ValueError("it has no frames")
    return total


def _decode(path: str | Path | bytes, places: list[int]) -> tuple[dict[int, Image.Image], int]:
    """Return the frames at ``places`` by their number, and how many frames there are."""
    kept, number = {}, -1
    with _open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            if number in places:
                _check_size(frame.width, frame.height)
                kept[number] = frame.to_image()
                if frame.rotation:  # of a phone held upright; in degrees, counter-clockwise
                    kept[number] = kept[number].rotate(frame.rotation, expand=True)
    return kept, number + 1


def _open(path: str | Path | bytes):
    """Open a video, and check its streams and its size. Raise ValueError if they are unfit."""
    import av  # imported here, as only videos need it

    container = av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path), options=OPENING)
    try:
        if not container.streams.video:
            raise ValueError(
                "it has no video, only "
                + (", ".join({s.type for s in container.streams}) or "nothing")
            )
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height)
        # Threads cost more than they save on small frames.
        stream.thread_type = "NONE" if stream.width * stream.height < 1 << 16 else "AUTO"
    except Exception:
        container.close()
        raise
    return container


def _check_size(width: int, height: int) -> None:
    """Raise ValueError for frames that might not fit in memory."""
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"frames of {width} x {height} pixels are too large")


class FrameProcessor(VideoProcessorMixin):
    """Video-LLaVA's video processor without torchvision: it uses the image processor.

    It is saved as a ``VideoLlavaVideoProcessor`` with the same settings, which transformers loads
    where torchvision is installed.

    Args:
        images: The image processor.
    """

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __call__(self, videos: list[list[Image.Image]], **kwargs) -> BatchFeature:
        """Process N videos of F frames each to pixel_values_videos (N, F, 3, H, W)."""
        pixels = [self.images(frames, return_tensors="pt")["pixel_values"] for frames in videos]
        return BatchFeature({"pixel_values_videos": torch.stack(pixels)})

    def to_dict(self) -> dict:
        """Return the image processor's settings as those of ``VideoLlavaVideoProcessor``."""
        settings = self.images.to_dict() | {"video_processor_type": "VideoLlavaVideoProcessor"}
        return {name: value for name, value in settings.items() if name != "image_processor_type"}


class NoVideos(VideoProcessorMixin):
    """Stands for a video processor that needs torchvision, where that is not installed.

    It raises for videos. It is saved with the settings that it was given, so a model that is saved
    keeps them.

    Args:
        settings: The settings of the video processor that it stands for.
    """

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings

    def __getattr__(self, name: str):
        # self.settings would call this method again while the object is still empty, as in a copy.
        try:
            return self.__dict__["settings"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __call__(self, *args, **kwargs):
        """Raise DataError, as videos need torchvision."""
        raise DataError(
            "this model's clips are read by torchvision, which is not installed; pip install "
            "torchvision"
        )

    def to_dict(self) -> dict:
        """Return the settings that it was given."""
        return dict(self.settings)


class Unchecked:
    """Mixin for a processor class that skips the check of its video processor's class.

    The check would import torchvision.
    """

    def check_argument_for_proper_class(self, argument_name, argument):
        """Check an argument of the processor, unless it is the video processor."""
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


class VideoLlavaProcessor(Unchecked, transformers.VideoLlavaProcessor):
    """Video-LLaVA's processor with a ``FrameProcessor``. It is saved under transformers' name."""


def without_videos(kind: type, path: str):
    """Load a processor without torchvision, for images alone.

    Args:
        kind: The processor's class.
        path: Its folder or hub name.

    Returns:
        The processor. It is saved as a ``kind``, which reads videos again where torchvision is
        installed.
    """
    settings, _ = kind.get_processor_dict(path)
    clips = settings.get("video_processor")
    if clips is None:
        try:  # before transformers 5 it had a file of its own
            clips, _ = NoVideos.get_video_processor_dict(path)
        except OSError:
            clips = {}
    parts = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(path),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(path),
        "video_processor": lambda: NoVideos(clips),
    }
    # A subclass of the same name, as a processor is saved under the name of its class.
    blind = type(kind.__name__, (Unchecked, kind), {})
    return blind.from_args_and_dict([parts[name]() for name in kind.get_attributes()], settings)
