"""Generate Clips VQA: questions about short clips of moving handwritten digits.

A clip is an mp4 file of 16 frames of 48 x 48 pixels. Up to four digits appear one after the other,
while the digit that is shown moves left, right, up or down. Stills are images of the same size,
with up to three digits on a 3 x 3 grid. The scans and their split are those of ``digits``: no
held-out clip shows a scan that anything was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llavolta.data.video import FRAMES, frame_places
from llavolta.worlds import digits
from llavolta.worlds.digits import CAPTION, NONE

SIZE = 48  # pixels per side
LENGTH = 16  # frames
RATE = 8  # frames per second
SEEN = frame_places(LENGTH, FRAMES)  # the frames that are sampled
MOST = 4  # digits in a clip
LEAST = 3  # frames that each digit is shown for, so that at least one of 8 sampled frames has it
CELL = SIZE // digits.GRID  # pixels per side of the cells of a still

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTION_TYPES = ("direction", "place", "order", "appearance", "changes")
STILL_TURNS = (*digits.QUESTION_TYPES, "where", "where")
TURNS = (*QUESTION_TYPES, "place", "order", "appearance")  # questions on a clip to train on
CODEC = {"crf": "12", "preset": "ultrafast", "threads": "1"}  # one thread gives equal files


@dataclass
class Clips:
    """A batch of clips without their pixels.

    Attributes:
        digits: (B, 4) digits in their order, all different, ``NONE`` after the last.
        starts: (B, 4) first frame of each digit, 16 after the last.
        way: (B,) index of the direction in ``DIRECTIONS``.
        path: (B, 16, 2) x, y of the digit's centre in each frame, in pixels.
        size: (B, 1) side of the digit's box, in pixels.
    """

    digits: np.ndarray
    starts: np.ndarray
    way: np.ndarray
    path: np.ndarray
    size: np.ndarray

    @classmethod
    def sample(cls, count: int, rng: np.random.Generator) -> Clips:
        """Draw random clips: 1 to 4 digits, and all directions, are equally frequent.

        Each digit is shown for at least 3 frames.

        Args:
            count: Number of clips B.
            rng: Source of randomness.
        """
        number = rng.integers(1, MOST + 1, count)  # (B,) digits in each clip
        shown = np.arange(MOST) < number[:, None]
        sequence = rng.permuted(np.tile(np.arange(10), (count, 1)), axis=1)[:, :MOST]
        # Each digit starts at least LEAST frames after the one before. Sorted random cuts divide
        # the spare frames among them.
        spare = LENGTH + 1 - LEAST * number
        cuts = np.sort(np.where(shown[:, 1:], rng.random((count, MOST - 1)), 1), axis=1)
        later = (cuts * spare[:, None]).astype(int) + LEAST * np.arange(1, MOST)
        starts = np.concatenate([np.zeros((count, 1), int), later], axis=1)
        way = rng.integers(len(DIRECTIONS), size=count)
        size = rng.uniform(17, 23, (count, 1))
        room = (SIZE - size) / 2
        along = np.array(list(DIRECTIONS.values()))[way]  # (B, 2)
        # Across the direction the place is random; along it, the clip moves from side to side.
        middle = rng.uniform(-0.8, 0.8, (count, 2)) * room * (along == 0)
        time = np.linspace(-1, 1, LENGTH)[:, None] * rng.uniform(0.8, 1.0, (count, 1, 1))
        path = SIZE / 2 + middle[:, None] + along[:, None] * time * room[..., None]
        return cls(
            np.where(shown, sequence, NONE), np.where(shown, starts, LENGTH), way, path, size
        )

    @property
    def turn(self) -> np.ndarray:
        """(B, 16) index of the digit that each frame shows."""
        return (self.starts[:, None] <= np.arange(LENGTH)[:, None]).sum(2) - 1

    def places(self) -> list[list[str]]:
        """Return each clip's cell of the 3 x 3 grid, by name, in every sampled frame."""
        x, y = np.moveaxis((self.path[:, SEEN] // CELL).astype(int), 2, 0)
        return [[digits.PLACES[cell] for cell in clip] for clip in digits.GRID * y + x]

    def render(self, split: str, rng: np.random.Generator) -> np.ndarray:
        """Draw the clips, with random ink, paper and slant.

        Args:
            split: "train" or "heldout", whose scans are drawn.
            rng: Source of randomness.

        Returns:
            (B, 16, 48, 48, 3) bytes.
        """
        count = len(self.digits)
        glyphs = digits.draw_scans(self.digits.ravel(), split, rng).view(count, MOST, 8, 8)
        # (B, 4, 8, 8) -> (B * 16, 8, 8), the scan that each frame shows.
        glyphs = glyphs.gather(
            1, torch.tensor(self.turn)[..., None, None].expand(-1, -1, 8, 8)
        ).flatten(0, 1)
        every = [
            np.repeat(values, LENGTH)
            for values in (self.size.ravel(), rng.uniform(-0.2, 0.2, count))
        ]
        # Stacked in height, the frames of a clip share their ink and paper.
        ink = digits.place(glyphs, self.path.reshape(-1, 2), *every, SIZE)
        return _bytes(digits.paint(ink.reshape(count, 1, -1, SIZE), rng)).reshape(
            count, LENGTH, SIZE, SIZE, 3
        )


def _bytes(pictures: torch.Tensor) -> np.ndarray:
    """Convert (B, 3, h, w) in [0, 1] to (B, h, w, 3) bytes."""
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()


def ask(
    kind: str, sequence: np.ndarray, way: int, places: list[str], rng: np.random.Generator
) -> tuple[str, str]:
    """Make one question about a clip.

    Args:
        kind: One of QUESTION_TYPES.
        sequence: (n,) digits in their order.
        way: Index of the direction in ``DIRECTIONS``.
        places: Cell in every sampled frame.
        rng: Source of randomness.

    Returns:
        The question and its answer.

    Raises:
        ValueError: Unknown type.
    """
    if kind == "direction":
        return "Which way does it move?", list(DIRECTIONS)[way]
    if kind == "order":
        last = rng.random() < 0.5
        return f"Which digit is {'last' if last else 'first'}?", str(sequence[-1 if last else 0])
    if kind == "place":
        last = rng.random() < 0.5
        return f"Where is it {'last' if last else 'first'}?", places[-1 if last else 0]
    if kind == "changes":
        return "How often does it change?", str(len(sequence) - 1)
    if kind == "appearance":
        absent = np.setdiff1d(np.arange(10), sequence)
        first, second = (
            rng.permutation(sequence)[:2]
            if len(sequence) > 1
            else (sequence[0], rng.choice(absent))
        )
        if len(sequence) == 1:
            first, second = rng.permutation([first, second])
            return f"Is there a {first}?", "yes" if first == sequence[0] else "no"
        earlier = list(sequence).index(first) < list(sequence).index(second)
        return f"Is {first} before {second}?", "yes" if earlier else "no"
    raise ValueError(f"unknown question type {kind!r}; choose from {', '.join(QUESTION_TYPES)}")


def ask_still(kind: str, labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Make one question about a still.

    Args:
        kind: "where", or a type of ``digits.ask``.
        labels: (9,) digit of each cell, ``NONE`` where empty.
        rng: Source of randomness.

    Returns:
        The question and its answer.
    """
    if kind != "where":
        return digits.ask(kind, labels, rng)
    cell = rng.choice(np.flatnonzero(labels != NONE))
    return f"Where is {labels[cell]}?", digits.PLACES[
        int(np.flatnonzero(labels == labels[cell])[0])
    ]


def vocabulary() -> list[str]:
    """Return the words of the questions on clips that ``digits.vocabulary`` lacks."""
    words = "which way where does it move first last how often change before " + " ".join(
        DIRECTIONS
    )
    return [word for word in dict.fromkeys(words.split()) if word not in digits.vocabulary()]


def sample_stills(
    count: int, split: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw stills, each with 1 to 3 digits at random cells.

    Args:
        count: Number of stills B.
        split: "train" or "heldout", whose scans are drawn.
        rng: Source of randomness.

    Returns:
        The images, (B, 48, 48, 3) bytes, and the digits (B, 9), ``NONE`` where a cell is empty.
    """
    cells = digits.GRID**2
    order = rng.permuted(np.tile(np.arange(cells), (count, 1)), axis=1)
    full = order < rng.integers(1, 4, (count, 1))  # (B, 9), cells with a digit
    labels = np.where(full, rng.integers(0, 10, (count, cells)), NONE)
    glyphs = digits.draw_scans(labels.ravel(), split, rng)
    cell = np.stack([np.arange(cells) % digits.GRID, np.arange(cells) // digits.GRID], -1)
    centre = (cell + 0.5) * CELL + rng.uniform(-1, 1, (count, cells, 2))
    size, angle = rng.uniform(15, 18, count * cells), rng.uniform(-0.2, 0.2, count * cells)
    drawn = digits.place(glyphs, centre.reshape(-1, 2), size, angle, SIZE).view(
        count, cells, SIZE, SIZE
    )
    return _bytes(digits.paint(drawn.amax(1, keepdim=True), rng)), labels


def write_clip(file: str | Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Write frames as an H.264 file.

    Args:
        file: The file.
        frames: (T, h, w, 3) bytes.
        rate: Frames per second.
    """
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=CODEC)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def build(folder: str | Path, clips: int = 1500, heldout: int = 150, seed: int = 0) -> Path:
    """Write the data set to ``folder``, unless it is there already.

    Files: ``align.json`` (captions of the stills; frames pass the same projector), ``train.json``
    (questions on both), ``heldout.json`` (questions on clips alone, one of each type), ``clips/``
    and ``stills/``. Each entry lists its question types under ``"types"``. The same arguments
    always give the same files.

    Args:
        folder: The folder to write.
        clips: Clips to train on, and stills.
        heldout: Held-out clips.
        seed: Seed of the generator.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds anything else.
    """
    return digits.build_once(
        Path(folder), {"clips": clips, "heldout": heldout, "seed": seed, "version": 1}, _write
    )


def _write(part: Path, clips: int, heldout: int, seed: int, version: int) -> None:
    """Write the files to ``part``. ``version`` only distinguishes the data of other releases."""
    for name in ("clips", "stills"):
        (part / name).mkdir()
    for number, (split, count) in enumerate((("train", clips), ("heldout", heldout))):
        # A generator per split, so that the size of one does not change another.
        rng = np.random.default_rng([seed, number])
        entries, captions = [], []
        layout = Clips.sample(count, rng)
        places = layout.places()
        for row, frames in enumerate(layout.render(split, rng)):
            name, path = f"clip_{split}_{row:06d}", f"clips/{split}_{row:06d}.mp4"
            write_clip(part / path, frames)
            sequence = layout.digits[row][layout.digits[row] != NONE]
            types = [
                str(kind) for kind in rng.permutation(TURNS if split == "train" else QUESTION_TYPES)
            ]
            turns = [ask(kind, sequence, layout.way[row], places[row], rng) for kind in types]
            entries.append({**digits.entry(name, path, turns, "video"), "types": types})
        if split == "train":
            stills, labels = sample_stills(count, split, rng)
            for row, still in enumerate(stills):
                name, path = f"still_{split}_{row:06d}", f"stills/{split}_{row:06d}.png"
                Image.fromarray(still).save(part / path)
                types = [str(kind) for kind in rng.permutation(STILL_TURNS)]
                turns = [ask_still(kind, labels[row], rng) for kind in types]
                entries.append({**digits.entry(name, path, turns), "types": types})
                captions.append(digits.entry(name, path, [(CAPTION, digits.caption(labels[row]))]))
            (part / "align.json").write_text(json.dumps(captions))
        (part / f"{split}.json").write_text(json.dumps(entries))
