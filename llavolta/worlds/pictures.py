"""Generate Pictures VQA: questions in plain English about scenes of everyday objects.

A scene is an image of 168 x 168 pixels. Two to seven drawings (data/pictures) stand in the cells of
a grid of 2 x 2 to 5 x 5, on a background without information. The drawings of Noto and Twemoji are
used for training. Those of Fluent, of the same objects, appear only in the "unseen" questions, in
scenes of their own.

``build`` writes the scenes as JPEG files with JSON in LLaVA's format. Each entry has several
questions, their types under ``"types"``, and under ``"objects"`` the name, box (x0, y0, x1, y1 in
pixels) and vendor of each drawing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from llavolta.errors import DataError
from llavolta.paths import PICTURES
from llavolta.worlds.digits import build_once, entry

SIZE = 168  # pixels per side: 12 x 12 patches of 14
TRAINED, UNSEEN = ("noto", "twemoji"), ("fluent3d",)
GRIDS = {2: 0.15, 3: 0.45, 4: 0.3, 5: 0.1}  # cells per side, and their probability
TYPES = ("what", "where", "neighbour", "relation", "count", "presence", "kind", "colour", "odd")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
KINDS = {
    "animal": "animals",
    "edible": "things to eat",
    "vehicle": "vehicles",
    "wearable": "things to wear",
}
KIND_NAMES = {
    "animal": "an animal",
    "edible": "food",
    "vehicle": "a vehicle",
    "wearable": "clothing",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
MARGIN = 6  # pixels: an object nearer than this to a line between two places has no place

ASKED = {
    "what": [
        "What is {place}?",
        "What do you see {place}?",
        "Which object is {place}?",
        "Name the thing {place}.",
    ],
    "where": [
        "Where {is_} the {name}?",
        "Where can you see the {name}?",
        "In which part {is_} the {name}?",
    ],
    "neighbour": ["What is just {side} the {name}?", "Which object is directly {side} the {name}?"],
    "relation": [
        "{Is} the {name} {side} the {other}?",
        "Can you see the {name} {side} the {other}?",
    ],
    "count": [
        "How many {plural} are there?",
        "How many {plural} do you see?",
        "Count the {plural}.",
    ],
    "presence": [
        "{Is} there {a} {name}?",
        "Do you see {a} {name}?",
        "Does the picture show {a} {name}?",
    ],
    "kind": [
        "What kind of thing is {place}?",
        "Is the thing {place} an animal, food, a vehicle or clothing?",
    ],
    "colour": ["What color {is_} the {name}?", "Which color {is_} the {name}?"],
    "odd": ["Which one is not {kind}?", "One of these is not {kind}. Which one?"],
}
CAPTION = [
    "What is in the picture?",
    "What does the picture show?",
    "Describe the picture.",
    "List what you see.",
]
SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@lru_cache
def objects() -> pd.DataFrame:
    """Return the table of the objects that a scene may show, one row per object number.

    Columns: name, slug, article, is ("is" or "are"), plural (empty if the object is not counted),
    category, colour, avoid (a set of objects that never stand beside it), and one truth value for
    each of KINDS.

    Raises:
        DataError: The table cannot be read.
    """
    file = PICTURES / "objects.csv"
    try:
        table = pd.read_csv(file, keep_default_na=False)
    except OSError as error:
        raise DataError(
            f"the drawings' list {file} cannot be read ({error}); restore data/pictures"
        ) from None
    number = {name: row for row, name in enumerate(table.name)}
    table["avoid"] = [
        {number[n] for n in names.split("|") if n in number} for names in table.avoid_with
    ]
    return table


@lru_cache
def drawings(vendor: str) -> list[list[Image.Image]]:
    """Return the drawings (RGBA) of each object by ``vendor``.

    Raises:
        DataError: A drawing cannot be read.
    """
    found = []
    for slug in objects().slug:
        files = [
            PICTURES / vendor / f"{slug}.webp",
            *sorted((PICTURES / vendor).glob(f"{slug}.[0-9].webp")),
        ]
        try:
            found.append([Image.open(file).convert("RGBA") for file in files])
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"a drawing of {slug} cannot be read ({error}); restore data/pictures"
            ) from None
    return found


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene.

    Attributes:
        number: Number of the object in ``objects()``.
        cell: Column and row in the grid.
        box: x0, y0, x1, y1 in pixels.
        vendor: Who drew it.
    """

    number: int
    cell: tuple[int, int]
    box: tuple[int, int, int, int]
    vendor: str

    @property
    def name(self) -> str:
        """Name of the object."""
        return objects().name[self.number]

    @property
    def centre(self) -> tuple[float, float]:
        """x, y of the centre in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @cached_property
    def place(self) -> str | None:
        """The part of the image, such as "top left" or "center".

        None near a line between two parts.
        """
        if any(min(abs(at - SIZE / 3), abs(at - 2 * SIZE / 3)) < MARGIN for at in self.centre):
            return None
        column, row = (int(at * 3 // SIZE) for at in self.centre)  # of the 3 x 3 parts
        return "center" if (column, row) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"

    def is_a(self, kind: str) -> bool:
        """Return whether the object is of a kind, a key of KINDS."""
        return bool(objects()[kind][self.number])


@dataclass(frozen=True)
class Scene:
    """Drawings in a grid.

    Attributes:
        grid: Cells along a side.
        things: The drawings, each in a cell of its own.
    """

    grid: int
    things: tuple[Thing, ...]

    @classmethod
    def sample(cls, rng: np.random.Generator, vendors: tuple[str, ...]) -> Scene:
        """Draw a random scene.

        A quarter of the scenes shows objects of one kind but for a single one, another quarter
        shows one object several times.

        Args:
            rng: Source of randomness.
            vendors: Whose drawings may be used.
        """
        table = objects()
        grid = int(rng.choice(list(GRIDS), p=list(GRIDS.values())))
        count = int(rng.integers(2 if grid == 2 else 3, min(7, grid * grid) + 1))
        shape = rng.random()
        pool = rng.permutation(len(table))
        if shape < 0.25 and count > 2:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            of_kind = table[kind].to_numpy(dtype=bool)[pool]
            # The first object is of another kind, all others are of this one.
            pool = np.concatenate([pool[~of_kind][:1], pool[of_kind]])
        chosen: list[int] = []
        for number in pool.tolist():  # the first ones that may stand beside one another
            if not any(
                number in table.avoid[other] or other in table.avoid[number] for other in chosen
            ):
                chosen.append(number)
            if len(chosen) == count:
                break
        if 0.25 <= shape < 0.5:
            again = int(rng.integers(1, count))
            chosen = [chosen[0]] * (again + 1) + chosen[1 : count - again]
        cells = rng.permutation(grid * grid)[: len(chosen)]
        return cls(
            grid,
            tuple(_put(n, int(c), grid, vendors, rng) for n, c in zip(chosen, cells, strict=True)),
        )

    def render(self, rng: np.random.Generator) -> Image.Image:
        """Draw the scene on a random background."""
        picture = background(rng)
        for thing in self.things:
            views = drawings(thing.vendor)[thing.number]
            # Where questions on the colour are possible, only the first drawing has that colour.
            views = views[:1] if objects().colour[thing.number] else views
            side = thing.box[2] - thing.box[0]
            drawn = views[rng.integers(len(views))].resize((side, side), Image.Resampling.LANCZOS)
            if rng.random() < 0.2:
                drawn = drawn.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
            picture.paste(drawn, thing.box[:2], drawn)
        return picture

    def only(self, thing: Thing) -> bool:
        """Return whether no other thing of the scene is the same object."""
        return sum(other.number == thing.number for other in self.things) == 1

    def at(self, place: str) -> list[Thing]:
        """Return the things that may stand at ``place``.

        These include things without a place, which are near a line.
        """
        return [thing for thing in self.things if thing.place in (place, None)]


def _put(
    number: int, cell: int, grid: int, vendors: tuple[str, ...], rng: np.random.Generator
) -> Thing:
    """Return a drawing of object ``number`` at a random place in ``cell``."""
    side = SIZE // grid
    size = int(min(72, side) * rng.uniform(0.75, 1))  # fits into the cell
    column, row = cell % grid, cell // grid
    x, y = (int(at * side + rng.integers(0, side - size + 1)) for at in (column, row))
    return Thing(
        number, (column, row), (x, y, x + size, y + size), vendors[rng.integers(len(vendors))]
    )


def background(rng: np.random.Generator) -> Image.Image:
    """Draw a random background.

    It is a gradient between two light or two dark colours, with grain; half of the backgrounds also
    have blobs, stripes or checks.
    """
    dark = rng.random() < 0.15
    first, last = rng.uniform(*((20, 90) if dark else (150, 255)), (2, 3))
    axis = np.linspace(0, 1, SIZE)
    slope = axis[:, None] if rng.random() < 0.5 else axis[None, :]
    pixels = first + (last - first) * np.broadcast_to(slope, (SIZE, SIZE))[..., None]
    kind = rng.random()
    if kind < 0.25:  # soft blobs: a coarse random image, enlarged
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (SIZE, SIZE), 3
        )
        pixels = 0.75 * pixels + 0.25 * np.asarray(coarse)
    elif kind < 0.5:  # stripes or checks
        width = int(rng.integers(8, 40))
        bands = (np.arange(SIZE) // width) % 2
        mark = (
            bands[:, None] ^ bands[None, :]
            if kind < 0.4
            else np.broadcast_to(bands[None, :], (SIZE, SIZE))
        )
        pixels = pixels + rng.uniform(-25, 25, 3) * mark[..., None]
    pixels = pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _words(thing: Thing | int) -> dict[str, str]:
    """Return the name and verb of a thing or object number, as question templates take them."""
    row = objects().iloc[thing if isinstance(thing, int) else thing.number]
    return dict(name=row["name"], is_=row["is"], Is=row["is"].capitalize())


def _where(place: str) -> str:
    return f"in the {place}"


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Make one question about a scene.

    Args:
        kind: One of TYPES.
        scene: The scene.
        rng: Source of randomness.

    Returns:
        The question and its only right answer; None if the scene allows no such question.
    """
    asked = _QUESTIONS[kind](scene, rng)
    if asked is None:
        return None
    words, answer = asked
    phrasings = ASKED[kind]
    return phrasings[rng.integers(len(phrasings))].format(**words), answer


def _pick(rng: np.random.Generator, things: list) -> object | None:
    """Return a random item, None of an empty list."""
    return things[rng.integers(len(things))] if things else None


def _what(scene: Scene, rng) -> tuple[dict, str] | None:
    thing = _pick(rng, [t for t in scene.things if t.place and scene.at(t.place) == [t]])
    return thing and (dict(place=_where(thing.place)), thing.name)


def _where_is(scene: Scene, rng) -> tuple[dict, str] | None:
    thing = _pick(rng, [t for t in scene.things if t.place and scene.only(t)])
    return thing and (_words(thing), thing.place)


def _neighbour(scene: Scene, rng) -> tuple[dict, str] | None:
    cells = {thing.cell: thing for thing in scene.things}
    pairs = [
        (thing, side, cells[thing.cell[0] + dx, thing.cell[1] + dy])
        for thing in scene.things
        for side, (dx, dy) in SIDES.items()
        if scene.only(thing) and (thing.cell[0] + dx, thing.cell[1] + dy) in cells
    ]
    found = _pick(rng, pairs)
    return found and (dict(_words(found[0]), side=found[1]), found[2].name)


def _relation(scene: Scene, rng) -> tuple[dict, str] | None:
    yes = rng.random() < 0.5
    single = [thing for thing in scene.things if scene.only(thing)]
    pairs = [
        (a, side, b)
        for a in single
        for b in single
        for side, (dx, dy) in SIDES.items()
        # a is on this side of b, by a cell at least.
        if (a.cell[0] - b.cell[0]) * dx + (a.cell[1] - b.cell[1]) * dy > 0
    ]
    found = _pick(rng, pairs)
    if found is None:
        return None
    a, side, b = found if yes else found[::-1]  # the wrong way round for "no"
    return dict(_words(a), side=side, other=b.name), "yes" if yes else "no"


def _count(scene: Scene, rng) -> tuple[dict, str] | None:
    plural = objects().plural
    counts = [
        (plural[t.number], sum(o.number == t.number for o in scene.things)) for t in scene.things
    ]
    counts += [
        (words, sum(thing.is_a(kind) for thing in scene.things)) for kind, words in KINDS.items()
    ]
    # Single objects are seldom counted.
    asked = [
        (words, n) for words, n in counts if words and (n > 1 or n == 1 and rng.random() < 0.1)
    ]
    found = _pick(rng, asked)
    return found and (dict(plural=found[0]), NUMBERS[found[1]])


def _presence(scene: Scene, rng) -> tuple[dict, str] | None:
    table, shown = objects(), {thing.number for thing in scene.things}
    if rng.random() < 0.5:
        number, answer = int(rng.choice(sorted(shown))), "yes"
    else:
        # Often of the category of a shown object, but never one to be mistaken for it.
        alike = {table.category[n] for n in shown} if rng.random() < 0.5 else set(table.category)
        near = shown.union(*(table.avoid[n] for n in shown))
        absent = [n for n in range(len(table)) if n not in near and table.category[n] in alike]
        if not absent:
            return None
        number, answer = int(rng.choice(absent)), "no"
    return dict(_words(number), a=table.article[number]), answer


def _kind(scene: Scene, rng) -> tuple[dict, str] | None:
    crisp = [
        t
        for t in scene.things
        if t.place and scene.at(t.place) == [t] and sum(map(t.is_a, KINDS)) == 1
    ]
    thing = _pick(rng, crisp)
    return thing and (
        dict(place=_where(thing.place)),
        next(KIND_NAMES[k] for k in KINDS if thing.is_a(k)),
    )


def _colour(scene: Scene, rng) -> tuple[dict, str] | None:
    thing = _pick(rng, [t for t in scene.things if scene.only(t) and objects().colour[t.number]])
    return thing and (_words(thing), objects().colour[thing.number])


def _odd(scene: Scene, rng) -> tuple[dict, str] | None:
    found = []
    for kind in KINDS:
        others = [thing for thing in scene.things if not thing.is_a(kind)]
        if len(others) == 1 and len(scene.things) > 2:
            found.append((dict(kind=KIND_NAMES[kind]), others[0].name))
    return _pick(rng, found)


_QUESTIONS: dict[str, Callable] = dict(
    zip(
        TYPES,
        (_what, _where_is, _neighbour, _relation, _count, _presence, _kind, _colour, _odd),
        strict=True,
    )
)


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question for everything that a scene shows, and its answer, row by row."""
    ordered = sorted(scene.things, key=lambda thing: (thing.cell[1], thing.cell[0]))
    table = objects()
    said = [
        f"{table.article[t.number]} {t.name}" + (f" {_where(t.place)}" if t.place else "")
        for t in ordered
    ]
    text = ", ".join(said[:-1]) + f" and {said[-1]}."
    return CAPTION[rng.integers(len(CAPTION))], text[0].upper() + text[1:]


def turns(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Make up to ``count`` questions about a scene, half of them about names and places.

    Returns:
        Type, question and answer of each, without repetitions.
    """
    names, others = (
        rng.permutation(["what", "what", "where", "neighbour"]),
        rng.permutation(TYPES[3:]),
    )
    # Half of the questions from each list; the rest replaces those that the scene does not allow.
    order = [
        *names[: count // 2],
        *others[: count - count // 2],
        *names[count // 2 :],
        *others[count - count // 2 :],
    ]
    order = list(map(str, order))
    asked: dict[str, tuple[str, str]] = {}
    answers: set[tuple[str, str]] = set()
    for kind in order:
        found = ask(kind, scene, rng)
        if found and (kind, found[1]) not in answers and found[0] not in asked:
            answers.add((kind, found[1]))
            asked[found[0]] = (kind, found[1])
        if len(asked) == count:
            break
    rows = [(kind, question, answer) for question, (kind, answer) in asked.items()]
    return [rows[place] for place in rng.permutation(len(rows))]


def build(folder: str | Path, scenes: int = 12000, heldout: int = 150, seed: int = 0) -> Path:
    """Write the data set to ``folder``, unless it is there already.

    Files: ``align.json`` (captions), ``train.json`` (six questions per scene, or four and a
    caption), ``heldout.json`` and ``unseen.json`` (four questions per scene), and ``images/``.
    Held-out scenes are new scenes by the vendors of training, unseen ones by the other vendor. The
    same arguments always give the same files.

    Args:
        folder: The folder to write.
        scenes: Scenes to train on.
        heldout: Held-out scenes, and unseen scenes.
        seed: Seed of the generator.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds anything else.
        DataError: The drawings cannot be read.
    """
    make = {"scenes": scenes, "heldout": heldout, "seed": seed, "version": 2}
    return build_once(Path(folder), make, _write)


def _write(part: Path, scenes: int, heldout: int, seed: int, version: int) -> None:
    """Write the files to ``part``. ``version`` only distinguishes the data of other releases."""
    (part / "images").mkdir()
    splits = (
        ("train", scenes, TRAINED, 6),
        ("heldout", heldout, TRAINED, 4),
        ("unseen", heldout, UNSEEN, 4),
    )
    for number, (split, count, vendors, questions) in enumerate(splits):
        # A generator per split, so that the size of one does not change another.
        rng = np.random.default_rng([seed, number])
        entries, captions = [], []
        for row in tqdm(
            range(count), desc=f"pictures: {split}", unit="scene", mininterval=2, leave=False
        ):
            scene = Scene.sample(rng, vendors)
            identifier, name = f"{split}_{row:06d}", f"images/{split}_{row:06d}.jpg"
            scene.render(rng).save(part / name, quality=92, subsampling=0)
            shown = [
                dict(name=thing.name, box=thing.box, vendor=thing.vendor) for thing in scene.things
            ]
            asked_of = turns(scene, rng, questions)
            # Half of the training scenes have a caption in place of two questions.
            if split == "train" and rng.random() < 0.5:
                asked_of = [("caption", *caption(scene, rng)), *asked_of[:-2]]
            types, *asked = zip(*asked_of, strict=True)
            pairs = list(zip(*asked, strict=True))
            entries.append(
                {**entry(identifier, name, pairs), "types": list(types), "objects": shown}
            )
            captions.append({**entry(identifier, name, [caption(scene, rng)]), "objects": shown})
        (part / f"{split}.json").write_text(json.dumps(entries))
        if split == "train":
            (part / "align.json").write_text(json.dumps(captions))
