"""Digits VQA: questions about scenes of real handwritten digits, the embedded data set.

A scene is a 96 x 96 picture of a 3 x 3 grid; each cell is empty or holds one scan of a handwritten digit from
scikit-learn (UCI Optical Recognition of Handwritten Digits), at a random size and place. The scans are
split once into training and held-out scans, so no held-out scene shows a scan that anything was trained on.

``build`` writes the scenes as PNG files with LLaVA-style JSON, the format of the 665k instruction set.
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
TOKENS = SIZE // PATCH  # visual tokens per side: 12, so 144 an image
NONE = 10  # the label of an empty cell or patch

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
WORDS = (*map(str, range(10)), "none")
QUESTION_TYPES = ("read", "count", "presence", "compare")
CAPTION = "Read all digits."


@lru_cache
def scans(split: str) -> tuple[torch.Tensor, np.ndarray]:
    """The handwritten digits of ``split`` ("train" or "heldout"): images (D, 8, 8) in [0, 1] and labels (D,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    cut = len(order) * 3 // 4
    chosen = {"train": order[:cut], "heldout": order[cut:]}[split]
    return torch.tensor(digits.images[chosen] / 16, dtype=torch.float32), digits.target[chosen]


@dataclass
class Scenes:
    """A batch of scene layouts, everything but the pixels.

    digits: (B, 9) the digit in each cell, raster order, ``NONE`` where empty.
    corner: (B, 9, 2) x, y of each digit's box in its cell, pixels. size: (B, 9) the box's side, pixels.
    """

    digits: np.ndarray
    corner: np.ndarray
    size: np.ndarray

    @classmethod
    def sample(cls, count: int, rng: np.random.Generator) -> Scenes:
        """Random layouts: 2 to 6 digit classes a scene, each cell empty with probability 0.2."""
        cells = GRID * GRID
        pool_size = rng.integers(2, 7, (count, 1))
        pool = rng.permuted(
            np.tile(np.arange(10), (count, 1)), axis=1
        )  # a scene draws from its first few
        pick = (rng.random((count, cells)) * pool_size).astype(int)
        digits = np.take_along_axis(pool, pick, axis=1)
        digits[rng.random((count, cells)) < 0.2] = NONE
        first = rng.integers(
            0, cells, (2, count)
        )  # at least one digit, so that every question can be asked
        digits[np.arange(count), first[0]] = pool[:, 0]
        size = rng.integers(15, 29, (count, cells))
        corner = (rng.random((count, cells, 2)) * (CELL - size[..., None] + 1)).astype(int)
        return cls(digits, corner, size)

    def patch_labels(self) -> np.ndarray:
        """(B, 144) the digit whose box covers most of each patch's centre region, ``NONE`` elsewhere."""
        per_cell = CELL // PATCH
        centre = (np.arange(per_cell) + 0.5) * PATCH  # pixel centres of the patches of one cell
        low, high = self.corner - PATCH / 4, self.corner + self.size[..., None] + PATCH / 4
        inside = (centre > low[..., None]) & (centre < high[..., None])  # (B, 9, 2, 4)
        covered = inside[:, :, 1, :, None] & inside[:, :, 0, None, :]  # (B, 9, y, x)
        labels = np.where(covered, self.digits[:, :, None, None], NONE)
        return _join_cells(labels).reshape(len(labels), -1)

    def render(self, split: str, rng: np.random.Generator) -> torch.Tensor:
        """Pictures (B, 3, 96, 96) in [0, 1], drawn with scans of ``split``; random ink, paper and slant."""
        count, cells = self.digits.shape
        glyphs = draw_scans(self.digits.ravel(), split, rng)
        angle = rng.uniform(-0.2, 0.2, count * cells)
        centre = (self.corner + self.size[..., None] / 2).reshape(-1, 2)
        drawn = place(glyphs, centre, self.size.ravel(), angle, CELL).reshape(
            count, cells, CELL, CELL
        )
        return paint(torch.tensor(_join_cells(drawn.numpy()))[:, None], rng)


def draw_scans(digits: np.ndarray, split: str, rng: np.random.Generator) -> torch.Tensor:
    """A random scan of ``split`` for each of ``digits`` (n,): (n, 8, 8) in [0, 1], 0 where the digit is ``NONE``."""
    images, labels = scans(split)
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    counts = np.array([len(rows) for rows in by_label] + [1])
    table = np.zeros((11, counts.max()), dtype=int)
    for digit, rows in enumerate(by_label):
        table[digit, : len(rows)] = rows
    chosen = table[digits, (rng.random(len(digits)) * counts[digits]).astype(int)]
    return images[chosen] * torch.tensor(digits != NONE)[:, None, None]


def place(
    glyphs: torch.Tensor, centre: np.ndarray, size: np.ndarray, angle: np.ndarray, side: int
) -> torch.Tensor:
    """Each of ``glyphs`` (n, 8, 8) as large as ``size`` (n,) pixels, turned by ``angle`` (n,), with its centre at x, y
    ``centre`` (n, 2) of a square of ``side`` pixels: (n, side, side)."""
    zoom = side / size.reshape(-1, 1, 1)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(
        -1, 2, 2
    )
    affine = np.concatenate(
        [zoom * turn, -zoom * turn @ (centre[..., None] / side * 2 - 1)], axis=2
    )
    grid = F.affine_grid(
        torch.tensor(affine, dtype=torch.float32), [len(glyphs), 1, side, side], align_corners=False
    )
    return F.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]


def paint(ink: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Frames (B, 3, T * h, w) in [0, 1] of ``ink`` (B, 1, T * h, w): a random ink and paper each, and grain."""
    count = len(ink)
    paper_colour = torch.tensor(rng.uniform(0.0, 0.3, (count, 3, 1, 1)), dtype=torch.float32)
    ink_colour = torch.tensor(rng.uniform(0.65, 1.0, (count, 3, 1, 1)), dtype=torch.float32)
    grain = torch.tensor(rng.normal(0, 0.02, ink.shape), dtype=torch.float32)
    return (paper_colour + (ink_colour - paper_colour) * ink + grain).clamp(0, 1)


def _join_cells(cells: np.ndarray) -> np.ndarray:
    """(B, 9, h, w) cells in raster order -> (B, 3h, 3w) pictures."""
    batch, _, height, width = cells.shape
    grid = cells.reshape(batch, GRID, GRID, height, width).transpose(0, 1, 3, 2, 4)
    return grid.reshape(batch, GRID * height, GRID * width)


def ask(kind: str, digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """One question of type ``kind`` about a scene's ``digits`` (9,), and its answer."""
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
    """All nine cells in raster order, for example ``"7 none 3 ..."``: the text of projector alignment."""
    return " ".join(WORDS[digit] for digit in digits)


def vocabulary() -> list[str]:
    """Every word that questions, answers and captions use, in lower case and in a fixed order."""
    text = (
        "which digit is ? how often does occur is there a larger than yes no read all digits . user: assistant: "
        + " ".join((*WORDS, *ROWS, *COLUMNS))
    )
    return list(dict.fromkeys(text.split()))


def build(folder: str | Path, scenes: int = 4000, heldout: int = 300, seed: int = 0) -> Path:
    """Write the data set to ``folder`` and return it; an existing complete data set of the same make is kept.

    Files: ``align.json`` (captions), ``train.json`` and ``heldout.json`` (four questions a scene, their types
    under ``"types"``), ``images/``. The same arguments always give the same files.
    """
    make = {"scenes": scenes, "heldout": heldout, "seed": seed, "version": 1}
    return build_once(Path(folder), make, _write)


def _write(part: Path, scenes: int, heldout: int, seed: int, version: int) -> None:
    (part / "images").mkdir()
    for number, (split, count) in enumerate((("train", scenes), ("heldout", heldout))):
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
    """``folder``, filled by ``write(part, **make)`` unless it holds the same make already; complete or not there."""
    done = folder / "make.json"
    if done.exists() and json.loads(done.read_text()) == make:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds something else than {make}; remove it or name another folder"
        )
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    write(part, **make)
    (part / "make.json").write_text(json.dumps(make))
    try:
        part.rename(folder)  # an empty folder gives way
    except OSError:
        shutil.rmtree(part)
        if not done.exists():
            raise
        # Another process finished first: its data set is taken if it is the same.
        return build_once(folder, make, write)
    return folder


def entry(identifier: str, path: str, turns: list[tuple[str, str]], medium: str = "image") -> dict:
    """A conversation in LLaVA's format about the ``medium`` ("image" or "video") at ``path``."""
    conversation = []
    for turn, (question, answer) in enumerate(turns):
        conversation.append(
            {"from": "human", "value": (f"<{medium}>\n" if turn == 0 else "") + question}
        )
        conversation.append({"from": "gpt", "value": answer})
    return {"id": identifier, medium: path, "conversations": conversation}
