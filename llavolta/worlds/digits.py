"""Generate Digits VQA: questions about scenes of real handwritten digits.

A scene is an image of 96 x 96 pixels with a 3 x 3 grid. Each cell is empty or shows one scan of a
handwritten digit from scikit-learn (UCI Optical Recognition of Handwritten Digits), at a random
size and place. The scans are split once into training and held-out ones, so no held-out scene shows
a scan that anything was trained on.

``build`` writes the scenes as PNG files with JSON in LLaVA's format. ``build_once`` and ``entry``
serve the other worlds, too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GRID = 3  # cells per side
CELL = 32  # pixels per cell side
SIZE = GRID * CELL  # pixels per image side
PATCH = 8  # pixels per visual token side
TOKENS = SIZE // PATCH  # visual tokens per side: 12, so 144 per image
NONE = 10  # the label of an empty cell or patch

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
WORDS = (*map(str, range(10)), "none")
QUESTION_TYPES = ("read", "count", "presence", "compare")
CAPTION = "Read all digits."


@lru_cache
def scans(split: str) -> tuple[torch.Tensor, np.ndarray]:
    """Return the handwritten digits of a split.

    Args:
        split: "train" or "heldout".

    Returns:
        Images (D, 8, 8) in [0, 1], and labels (D,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))  # the same split each time
    cut = len(order) * 3 // 4
    chosen = {"train": order[:cut], "heldout": order[cut:]}[split]
    return torch.tensor(digits.images[chosen] / 16, dtype=torch.float32), digits.target[chosen]


@dataclass
class Scenes:
    """A batch of scenes without their pixels.

    Attributes:
        digits: (B, 9) digit of each cell in raster order, ``NONE`` where empty.
        corner: (B, 9, 2) x, y of the corner of each digit's box in its cell, in pixels.
        size: (B, 9) side of the box, in pixels.
    """

    digits: np.ndarray
    corner: np.ndarray
    size: np.ndarray

    @classmethod
    def sample(cls, count: int, rng: np.random.Generator) -> Scenes:
        """Draw random scenes, of 2 to 6 digit classes each; a cell is empty with probability 0.2.

        Args:
            count: Number of scenes B.
            rng: Source of randomness.
        """
        cells = GRID * GRID
        pool_size = rng.integers(2, 7, (count, 1))
        # A random order of the digits per scene, which draws from the first pool_size of them.
        pool = rng.permuted(np.tile(np.arange(10), (count, 1)), axis=1)
        pick = (rng.random((count, cells)) * pool_size).astype(int)
        digits = np.take_along_axis(pool, pick, axis=1)
        digits[rng.random((count, cells)) < 0.2] = NONE
        # At least one digit, so that every question can be asked.
        first = rng.integers(0, cells, (2, count))
        digits[np.arange(count), first[0]] = pool[:, 0]
        size = rng.integers(15, 29, (count, cells))
        corner = (rng.random((count, cells, 2)) * (CELL - size[..., None] + 1)).astype(int)
        return cls(digits, corner, size)

    def patch_labels(self) -> np.ndarray:
        """Return the digit (B, 144) that covers each patch's centre, ``NONE`` elsewhere.

        A digit covers a patch if its box, larger by a quarter of a patch on each side, holds the
        centre.
        """
        per_cell = CELL // PATCH
        centre = (np.arange(per_cell) + 0.5) * PATCH  # pixel centres of the patches of one cell
        # Cells are squares of 4 x 4 patches.
        low, high = self.corner - PATCH / 4, self.corner + self.size[..., None] + PATCH / 4
        inside = (centre > low[..., None]) & (centre < high[..., None])  # (B, 9, 2, 4)
        covered = inside[:, :, 1, :, None] & inside[:, :, 0, None, :]  # (B, 9, y, x)
        labels = np.where(covered, self.digits[:, :, None, None], NONE)
        return _join_cells(labels).reshape(len(labels), -1)

    def render(self, split: str, rng: np.random.Generator) -> torch.Tensor:
        """Draw the scenes, with random ink, paper and slant.

        Args:
            split: "train" or "heldout", whose scans are drawn.
            rng: Source of randomness.

        Returns:
            (B, 3, 96, 96) in [0, 1].
        """
        count, cells = self.digits.shape
        glyphs = draw_scans(self.digits.ravel(), split, rng)
        angle = rng.uniform(-0.2, 0.2, count * cells)
        centre = (self.corner + self.size[..., None] / 2).reshape(-1, 2)
        drawn = place(glyphs, centre, self.size.ravel(), angle, CELL).reshape(
            count, cells, CELL, CELL
        )
        return paint(torch.tensor(_join_cells(drawn.numpy()))[:, None], rng)


def draw_scans(digits: np.ndarray, split: str, rng: np.random.Generator) -> torch.Tensor:
    """Draw a random scan for each digit.

    Args:
        digits: (n,) digits.
        split: "train" or "heldout", whose scans are drawn.
        rng: Source of randomness.

    Returns:
        (n, 8, 8) in [0, 1]; 0 where the digit is ``NONE``.
    """
    images, labels = scans(split)
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    counts = np.array([len(rows) for rows in by_label] + [1])
    # Row d lists the scans of digit d; the last row, NONE, has one entry that is blanked out below.
    table = np.zeros((11, counts.max()), dtype=int)
    for digit, rows in enumerate(by_label):
        table[digit, : len(rows)] = rows
    chosen = table[digits, (rng.random(len(digits)) * counts[digits]).astype(int)]
    return images[chosen] * torch.tensor(digits != NONE)[:, None, None]


def place(
    glyphs: torch.Tensor, centre: np.ndarray, size: np.ndarray, angle: np.ndarray, side: int
) -> torch.Tensor:
    """Resize, rotate and place each scan on a square of ``side`` pixels.

    Args:
        glyphs: (n, 8, 8) scans.
        centre: (n, 2) x, y of the centre, in pixels.
        size: (n,) side of the scan, in pixels.
        angle: (n,) rotation in radians.
        side: Side of the square, in pixels.

    Returns:
        (n, side, side).
    """
    zoom = side / size.reshape(-1, 1, 1)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(
        -1, 2, 2
    )
    # The inverse map, from the square to the scan, both in coordinates from -1 to 1: (n, 2, 3).
    affine = np.concatenate(
        [zoom * turn, -zoom * turn @ (centre[..., None] / side * 2 - 1)], axis=2
    )
    grid = F.affine_grid(
        torch.tensor(affine, dtype=torch.float32), [len(glyphs), 1, side, side], align_corners=False
    )
    return F.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]


def paint(ink: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Colour drawings with a random ink and paper, one of each per row, and grain.

    Args:
        ink: (B, 1, h, w) in [0, 1]. The frames of a clip may be stacked in height.
        rng: Source of randomness.

    Returns:
        (B, 3, h, w) in [0, 1].
    """
    count = len(ink)
    paper_colour = torch.tensor(rng.uniform(0.0, 0.3, (count, 3, 1, 1)), dtype=torch.float32)
    ink_colour = torch.tensor(rng.uniform(0.65, 1.0, (count, 3, 1, 1)), dtype=torch.float32)
    grain = torch.tensor(rng.normal(0, 0.02, ink.shape), dtype=torch.float32)
    return (paper_colour + (ink_colour - paper_colour) * ink + grain).clamp(0, 1)


def _join_cells(cells: np.ndarray) -> np.ndarray:
    """Join cells (B, 9, h, w) in raster order into images (B, 3h, 3w)."""
    batch, _, height, width = cells.shape
    grid = cells.reshape(batch, GRID, GRID, height, width).transpose(0, 1, 3, 2, 4)
    return grid.reshape(batch, GRID * height, GRID * width)


def ask(kind: str, digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Make one question about a scene.

    Args:
        kind: One of QUESTION_TYPES.
        digits: (9,) digit of each cell, ``NONE`` where empty.
        rng: Source of randomness.

    Returns:
        The question and its answer.

    Raises:
        ValueError: Unknown type.
    """
    full = np.flatnonzero(digits != NONE)
    if kind == "read":
        cell = rng.choice(full)
        return f"Which digit is {PLACES[cell]}?", str(digits[cell])
    if kind == "count":
        digit = digits[rng.choice(full)] if rng.random() < 0.8 else rng.integers(10)
        return f"How often does {digit} occur?", str((digits == digit).sum())
    if kind == "presence":
        present = np.unique(digits[full])
        absent = np.setdiff1d(np.arange(10), present)
        digit = rng.choice(present if rng.random() < 0.5 else absent)
        return f"Is there a {digit}?", "yes" if digit in present else "no"
    if kind == "compare":
        first = rng.choice(full)
        others = full[digits[full] != digits[first]]
        if not len(others):  # all digits alike: compare a digit with itself, which is not larger
            others = np.array([first])
        second = rng.choice(others)
        if rng.random() < 0.5:
            first, second = second, first
        return f"Is {PLACES[first]} larger than {PLACES[second]}?", "yes" if digits[first] > digits[
            second
        ] else "no"
    raise ValueError(f"unknown question type {kind!r}; choose from {', '.join(QUESTION_TYPES)}")


def caption(digits: np.ndarray) -> str:
    """Return the text of projector alignment: all nine cells in raster order.

    For example "7 none 3 ...".
    """
    return " ".join(WORDS[digit] for digit in digits)


def vocabulary() -> list[str]:
    """Return the words of all questions, answers and captions, in lower case and a fixed order."""
    text = (
        "which digit is ? how often does occur is there a larger than yes no "
        "read all digits . user: assistant: " + " ".join((*WORDS, *ROWS, *COLUMNS))
    )
    return list(dict.fromkeys(text.split()))


def build(folder: str | Path, scenes: int = 4000, heldout: int = 300, seed: int = 0) -> Path:
    """Write the data set to ``folder``, unless it is there already.

    Files: ``align.json`` (captions), ``train.json`` and ``heldout.json`` (four questions per scene,
    their types under ``"types"``), and ``images/``. The same arguments always give the same files.

    Args:
        folder: The folder to write.
        scenes: Scenes to train on.
        heldout: Held-out scenes.
        seed: Seed of the generator.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds anything else.
    """
    make = {"scenes": scenes, "heldout": heldout, "seed": seed, "version": 1}
    return build_once(Path(folder), make, _write)


def _write(part: Path, scenes: int, heldout: int, seed: int, version: int) -> None:
    """Write the files to ``part``. ``version`` only distinguishes the data of other releases."""
    (part / "images").mkdir()
    for number, (split, count) in enumerate((("train", scenes), ("heldout", heldout))):
        # A generator per split, so that the size of one does not change another.
        rng = np.random.default_rng([seed, number])
        layout = Scenes.sample(count, rng)
        pictures = (layout.render(split, rng) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        entries, captions = [], []
        for row, digits in enumerate(layout.digits):
            name = f"images/{split}_{row:06d}.png"
            Image.fromarray(pictures[row]).save(part / name)
            types = [str(kind) for kind in rng.permutation(QUESTION_TYPES)]
            turns = [ask(kind, digits, rng) for kind in types]
            entries.append({**entry(f"{split}_{row:06d}", name, turns), "types": types})
            captions.append(entry(f"{split}_{row:06d}", name, [(CAPTION, caption(digits))]))
        (part / f"{split}.json").write_text(json.dumps(entries))
        if split == "train":
            (part / "align.json").write_text(json.dumps(captions))


def build_once(folder: Path, make: dict, write: Callable[..., None]) -> Path:
    """Fill ``folder`` by ``write(part, **make)``, unless it has the content of ``make`` already.

    The folder appears complete or not at all: ``write`` fills a temporary folder beside it.

    Args:
        folder: The folder to fill.
        make: What determines the content; saved in make.json.
        write: Writes the files to the folder it is given.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds anything else.
    """
    done = folder / "make.json"
    if done.exists() and json.loads(done.read_text()) == make:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds something else than {make}; remove it or name another folder"
        )
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        write(part, **make)
        (part / "make.json").write_text(json.dumps(make))
    except BaseException:
        shutil.rmtree(part)
        raise
    try:
        part.rename(folder)  # atomic; it replaces an empty folder
    except OSError:
        shutil.rmtree(part)
        if not done.exists():
            raise
        # Another process finished first; its data set is used if it is the same.
        return build_once(folder, make, write)
    return folder


def entry(identifier: str, path: str, turns: list[tuple[str, str]], medium: str = "image") -> dict:
    """Return a conversation in LLaVA's format.

    Args:
        identifier: Its "id".
        path: The image or video file.
        turns: Questions and answers. The placeholder stands before the first question.
        medium: "image" or "video".
    """
    conversation = []
    for turn, (question, answer) in enumerate(turns):
        conversation.append(
            {"from": "human", "value": (f"<{medium}>\n" if turn == 0 else "") + question}
        )
        conversation.append({"from": "gpt", "value": answer})
    return {"id": identifier, medium: path, "conversations": conversation}
