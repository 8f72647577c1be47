"""Provide data sets and models that the package makes itself.

A world is a data set in LLaVA's format, generated on first use. ``WORLDS`` lists the worlds,
``MODELS`` the models, and ``HOMES`` the world that each model is made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llavolta.errors import ConfigError, DataError
from llavolta.paths import DATA, NANO_TUNED, RUNS, TINY_LLAVA, expand


@dataclass(frozen=True)
class World:
    """A generated data set in LLaVA's format.

    Attributes:
        name: Name of the world.
        build: Called as ``build(folder, count, heldout_count, seed)``, writes train.json,
            heldout.json, align.json and their media to the folder, and returns it.
        count: Default number of scenes or clips to train on.
        heldout_count: Number of held-out scenes or clips.
        steps: Default number of optimizer steps of a whole scheme. None: one pass over the data.
        unseen: Name of a second file of held-out questions, about a kind of image that no training
            file has. None: there is none.
    """

    name: str
    build: Callable[[Path, int, int, int], Path]
    count: int
    heldout_count: int
    steps: int | None = None
    unseen: str | None = None

    def folder(self, count: int | None = None, seed: int = 0) -> Path:
        """Return the folder of the data set, generated on first use.

        Args:
            count: Number of scenes or clips to train on. None: the default.
            seed: Seed of the generator.
        """
        count = count or self.count
        name = f"{self.name}-{count}-{self.heldout_count}-{seed}"
        return self.build(DATA / "cache" / name, count, self.heldout_count, seed)

    def train(self, count: int | None = None) -> Path:
        """Return the JSON file of training data."""
        return self.folder(count) / "train.json"

    def heldout(self, count: int | None = None) -> Path:
        """Return the JSON file of held-out questions."""
        return self.folder(count) / "heldout.json"

    def align(self, count: int | None = None) -> Path:
        """Return the JSON file of captions, for projector alignment."""
        return self.folder(count) / "align.json"


def _made_by(module: str) -> Callable[[Path, int, int, int], Path]:
    """Return the ``build`` function of a module, imported when it is called.

    Clips need a video decoder, which a user of images may not have.
    """
    return lambda *arguments: import_module(f"llavolta.worlds.{module}").build(*arguments)


def _nano() -> Path:
    return import_module("llavolta.worlds.nano").nano()


def _nano_tuned() -> Path:
    """Return the folder of a run of the preset ``nano``, or of the shipped weights."""
    found = [
        folder for folder in (RUNS / "nano-tuned", NANO_TUNED) if any(folder.glob("*.safetensors"))
    ]
    if not found:
        raise ConfigError(
            "nano-tuned is not trained yet; "
            "python -m llavolta.train nano --output data/runs/nano-tuned"
        )
    return found[0]


def _embedded_video() -> Path:
    return import_module("llavolta.worlds.backbones").embedded_video()


WORLDS = {
    world.name: world
    for world in (
        World("digits", _made_by("digits"), count=4000, heldout_count=300, steps=200),
        World("clips", _made_by("clips"), count=1500, heldout_count=150),
        World(
            "pictures", _made_by("pictures"), count=12000, heldout_count=150, unseen="unseen.json"
        ),
    )
}
# Models that come with the package, by name, and the function that returns the folder of each.
MODELS: dict[str, Callable[[], Path]] = {
    "embedded": lambda: TINY_LLAVA,
    "embedded-video": _embedded_video,
    "nano": _nano,
    "nano-tuned": _nano_tuned,
}
# The world of each of these models. A model that is not listed belongs to digits.
HOMES = {
    "embedded-video": "clips",
    "nano": "pictures",
    "nano-tuned": "pictures",
}


def world(name: str) -> World:
    """Return the world of that name.

    Raises:
        DataError: Unknown name.
    """
    if name not in WORLDS:
        raise DataError(
            f"unknown data {name!r}; choose from {', '.join(WORLDS)}, or give a LLaVA JSON file"
        )
    return WORLDS[name]


def model_path(name: str) -> str:
    """Return the folder or hub name that ``name`` stands for.

    Args:
        name: A key of MODELS, whose folder is made on first use; a folder; or a Hugging Face hub
            name.

    Raises:
        ConfigError: It is none of these.
    """
    # A hub name has one slash and is no path.
    path = str(MODELS[name]()) if name in MODELS else expand(name)
    if not Path(path).exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ConfigError(
            f"no model folder {path}; give a Hugging Face folder, a hub name or one of "
            f"{', '.join(MODELS)}"
        )
    return path
