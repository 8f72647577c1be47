"""Pictures VQA: questions in plain English about scenes of everyday objects, drawn by several vendors.

A scene is a 168 x 168 picture of two to seven drawings (data/pictures) in the cells of a grid of 2 x 2 to 5 x 5, on a
background that says nothing. Noto's and Twemoji's drawings are trained on; Fluent's, of the same objects, are only
ever asked about ("unseen"), in scenes of their own.

``build`` writes the scenes as JPEG files with LLaVA-style JSON: several questions about each picture, what of each
type stands under ``"types"``, and under ``"objects"`` the name, box (x0, y0, x1, y1 in pixels) and vendor of each.
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

SIZE = 168  # pixels a side: 12 x 12 patches of 14
TRAINED, UNSEEN = ("noto", "twemoji"), ("fluent3d",)
GRIDS = {2: 0.15, 3: 0.45, 4: 0.3, 5: 0.1}  # cells a side, and how often
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
MARGIN = 6  # pixels that an object's centre keeps from the line between two places, to be said to be in one

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
    """What can be in a scene, by number: name, slug, article, is (or are), plural (none for what is
    not counted), colour, avoid (numbers not beside it), and whether it is of each of KINDS."""
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
    """The drawings (RGBA) of each object by ``vendor``. Raises DataError, naming the file, if one cannot be read."""
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
    """A drawing in a scene. number: of the object. cell: column, row. box: x0, y0, x1, y1 in pixels."""

    number: int
    cell: tuple[int, int]
    box: tuple[int, int, int, int]
    vendor: str

    @property
    def name(self) -> str:
        return objects().name[self.number]

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @cached_property
    def place(self) -> str | None:
        """Such as "top left" or "center"; None near the line between two places."""
        if any(min(abs(at - SIZE / 3), abs(at - 2 * SIZE / 3)) < MARGIN for at in self.centre):
            return None
        column, row = (int(at * 3 // SIZE) for at in self.centre)
        return "center" if (column, row) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"

    def is_a(self, kind: str) -> bool:
        return bool(objects()[kind][self.number])


@dataclass(frozen=True)
class Scene:
    """Things in cells of a grid of ``grid`` x ``grid``."""

    grid: int
    things: tuple[Thing, ...]

    @classmethod
    def sample(cls, rng: np.random.Generator, vendors: tuple[str, ...]) -> Scene:
        """A random scene; one of four has all but one of a kind, one of four an object several times."""
        table = objects()
        grid = int(rng.choice(list(GRIDS), p=list(GRIDS.values())))
        count = int(rng.integers(2 if grid == 2 else 3, min(7, grid * grid) + 1))
        shape = rng.random()
        pool = rng.permutation(len(table))
        if shape < 0.25 and count > 2:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            of_kind = table[kind].to_numpy(dtype=bool)[pool]
            pool = np.concatenate([pool[~of_kind][:1], pool[of_kind]])
        chosen: list[int] = []
        for number in pool.tolist():
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
        picture = background(rng)
        for thing in self.things:
            views = drawings(thing.vendor)[thing.number]
            views = (
                views[:1] if objects().colour[thing.number] else views
            )  # others may be of another colour
            side = thing.box[2] - thing.box[0]
            drawn = views[rng.integers(len(views))].resize((side, side), Image.Resampling.LANCZOS)
            if rng.random() < 0.2:
                drawn = drawn.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
            picture.paste(drawn, thing.box[:2], drawn)
        return picture

    def only(self, thing: Thing) -> bool:
        """Whether no other thing of the scene is the same object."""
        return sum(other.number == thing.number for other in self.things) == 1

    def at(self, place: str) -> list[Thing]:
        """What may be said to be there: with those too near to its lines to be sure."""
        return [thing for thing in self.things if thing.place in (place, None)]


def _put(
    number: int, cell: int, grid: int, vendors: tuple[str, ...], rng: np.random.Generator
) -> Thing:
    side = SIZE // grid
    size = int(min(72, side) * rng.uniform(0.75, 1))
    column, row = cell % grid, cell // grid
    x, y = (int(at * side + rng.integers(0, side - size + 1)) for at in (column, row))
    return Thing(
        number, (column, row), (x, y, x + size, y + size), vendors[rng.integers(len(vendors))]
    )


def background(rng: np.random.Generator) -> Image.Image:
    """Paper: a gradient of two colours, light or dark, with grain, and blobs or stripes in one of two pictures."""
    dark = rng.random() < 0.15
    first, last = rng.uniform(*((20, 90) if dark else (150, 255)), (2, 3))
    axis = np.linspace(0, 1, SIZE)
    slope = axis[:, None] if rng.random() < 0.5 else axis[None, :]
    pixels = first + (last - first) * np.broadcast_to(slope, (SIZE, SIZE))[..., None]
    kind = rng.random()
    if kind < 0.25:  # soft blobs
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
    """A thing's, or object's, name and verb."""
    row = objects().iloc[thing if isinstance(thing, int) else thing.number]
    return dict(name=row["name"], is_=row["is"], Is=row["is"].capitalize())


def _where(place: str) -> str:
    return f"in the {place}"


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """One question of type ``kind`` about ``scene`` with its one right answer; None if there is none to ask."""
    asked = _QUESTIONS[kind](scene, rng)
    if asked is None:
        return None
    words, answer = asked
    phrasings = ASKED[kind]
    return phrasings[rng.integers(len(phrasings))].format(**words), answer


def _pick(rng: np.random.Generator, things: list) -> object | None:
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
        if (a.cell[0] - b.cell[0]) * dx + (a.cell[1] - b.cell[1]) * dy
        > 0  # so, and clearly: a cell apart
    ]
    found = _pick(rng, pairs)
    if found is None:
        return None
    a, side, b = found if yes else found[::-1]
    return dict(_words(a), side=side, other=b.name), "yes" if yes else "no"


def _count(scene: Scene, rng) -> tuple[dict, str] | None:
    plural = objects().plural
    counts = [
        (plural[t.number], sum(o.number == t.number for o in scene.things)) for t in scene.things
    ]
    counts += [
        (words, sum(thing.is_a(kind) for thing in scene.things)) for kind, words in KINDS.items()
    ]
    asked = [
        (words, n) for words, n in counts if words and (n > 1 or n == 1 and rng.random() < 0.1)
    ]
    found = _pick(rng, asked)  # one of a thing is seldom worth counting
    return found and (dict(plural=found[0]), NUMBERS[found[1]])


def _presence(scene: Scene, rng) -> tuple[dict, str] | None:
    table, shown = objects(), {thing.number for thing in scene.things}
    if rng.random() < 0.5:
        number, answer = int(rng.choice(sorted(shown))), "yes"
    else:  # what could be taken for something shown is not asked about; what is of its kind often is
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
    """A question for all that is there, and what is, row by row."""
    ordered = sorted(scene.things, key=lambda thing: (thing.cell[1], thing.cell[0]))
    table = objects()
    said = [
        f"{table.article[t.number]} {t.name}" + (f" {_where(t.place)}" if t.place else "")
        for t in ordered
    ]
    text = ", ".join(said[:-1]) + f" and {said[-1]}."
    return CAPTION[rng.integers(len(CAPTION))], text[0].upper() + text[1:]


def turns(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Up to ``count`` (type, question, answer), none asked twice: half of them ask for names and places."""
    names, others = (
        rng.permutation(["what", "what", "where", "neighbour"]),
        rng.permutation(TYPES[3:]),
    )
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
    """Write the data set to ``folder`` and return it; an existing complete data set of the same make is kept.

    Files: ``align.json`` (captions), ``train.json`` (six questions a scene, or four and a caption),
    ``heldout.json`` and ``unseen.json`` (four a scene; new scenes of the vendors trained on, and of the one held out),
    ``images/``. The same arguments always give the same files.
    """
    make = {"scenes": scenes, "heldout": heldout, "seed": seed, "version": 2}
    return build_once(Path(folder), make, _write)


def _write(part: Path, scenes: int, heldout: int, seed: int, version: int) -> None:
    (part / "images").mkdir()
    splits = (
        ("train", scenes, TRAINED, 6),
        ("heldout", heldout, TRAINED, 4),
        ("unseen", heldout, UNSEEN, 4),
    )
    for number, (split, count, vendors, questions) in enumerate(splits):
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
            if (
                split == "train" and rng.random() < 0.5
            ):  # one of two is described, too, by fewer questions
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
