"""Worlds: data to train on and to ask about, generated on first use, and the models that know their words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llavolta.errors import ConfigError, DataError
from llavolta.paths import DATA, NANO_TUNED, RUNS, TINY_LLAVA, expand


@dataclass(frozen=True)
class World:
    """A data set in LLaVA's format that the package makes itself.

    build: (folder, count, heldout, seed) -> the folder, with train.json, heldout.json, align.json and their media.
    count, heldout: entries to train on and held out, by default. steps: of a whole scheme, by default; None: one pass.
    unseen: the name of a second file of held-out questions, of a kind that nothing is trained on.
    """

    name: str
    build: Callable[[Path, int, int, int], Path]
    count: int
    heldout_count: int
    steps: int | None = None
    unseen: str | None = None

    def folder(self, count: int | None = None, seed: int = 0) -> Path:
        count = count or self.count
        name = f"{self.name}-{count}-{self.heldout_count}-{seed}"
        return self.build(DATA / "cache" / name, count, self.heldout_count, seed)

    def train(self, count: int | None = None) -> Path:
        """The JSON file to train on."""
        return self.folder(count) / "train.json"

    def heldout(self, count: int | None = None) -> Path:
        """The JSON file of held-out questions."""
        return self.folder(count) / "heldout.json"

    def align(self, count: int | None = None) -> Path:
        """The JSON file of captions, for projector alignment."""
        return self.folder(count) / "align.json"


def _made_by(module: str) -> Callable[[Path, int, int, int], Path]:
    """Its ``build``, imported when it is called: clips need a video decoder."""
    return lambda *arguments: import_module(f"llavolta.worlds.{module}").build(*arguments)


def _nano() -> Path:
    return import_module("llavolta.worlds.nano").nano()


def _nano_tuned() -> Path:
    """A run of the preset ``nano``, or the projector and adapters that are shipped."""
    found = [
        folder for folder in (RUNS / "nano-tuned", NANO_TUNED) if any(folder.glob("*.safetensors"))
    ]
    if not found:
        raise ConfigError(
            "nano-tuned is not trained yet; python -m llavolta.train nano --output data/runs/nano-tuned"
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
# Names of models that come with the package, and what gives the folder of each (made on first use).
MODELS: dict[str, Callable[[], Path]] = {
    "embedded": lambda: TINY_LLAVA,
    "embedded-video": _embedded_video,
    "nano": _nano,
    "nano-tuned": _nano_tuned,
}
HOMES = {
    "embedded-video": "clips",
    "nano": "pictures",
    "nano-tuned": "pictures",
}  # their worlds; digits, if not here


def world(name: str) -> World:
    """The world of that name. Raises DataError for an unknown one."""
    if name not in WORLDS:
        raise DataError(
            f"unknown data {name!r}; choose from {', '.join(WORLDS)}, or give a LLaVA JSON file"
        )
    return WORLDS[name]


def model_path(name: str) -> str:
    """The folder or hub name that ``name`` stands for. Raises ConfigError if it can be neither."""
    path = str(MODELS[name]()) if name in MODELS else expand(name)
    if not Path(path).exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ConfigError(
            f"no model folder {path}; give a Hugging Face folder, a hub name or one of {', '.join(MODELS)}"
        )
    return path
