"""Models and data opened for asking, as they were trained."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from llavolta.compression.families import find_parts
from llavolta.data import LlavaData, padding_colour
from llavolta.errors import UserError
from llavolta.paths import RUNS
from llavolta.train.checkpoints import RECORD
from llavolta.train.config import TrainConfig, run_settings
from llavolta.train.models import load_model
from llavolta.train.run import train
from llavolta.worlds import HOMES, WORLDS
from llavolta.worlds import world as find_world


class StudyError(UserError, ValueError):
    """A study that cannot be made with these settings or data."""


def device() -> torch.device:
    """Where models answer and are timed: the accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def embedded_llava() -> Path:
    """The folder of the embedded LLaVA trained without compression (scheme "single-stage"), a plain LLaVA.

    Trained on first use, about 3 minutes on 2 cores: the shipped parts alone have an untrained projector.
    """
    folder = RUNS / "single-stage"
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / ".single-stage.lock"):  # a second notebook waits for the first
        first_use = not (folder / RECORD).exists()
        if first_use:
            print(
                "training the embedded LLaVA without compression, once; about 3 minutes on 2 cores",
                flush=True,
            )
        config = TrainConfig.from_preset(
            "embedded", output=str(folder), scheme="single-stage"
        )  # as 03 trains it
        return train(config, progress=first_use)


@contextmanager
def answering(model):
    """``model`` in evaluation mode; the mode of each of its modules is back afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def open_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple:
    """(model, processor, folder) of a run's folder, a Hugging Face folder or a hub name, on its device.

    "embedded" is the embedded LLaVA trained without compression. dtype: float32 unless given.
    """
    folder = str(embedded_llava() if name == "embedded" else name)
    model, processor = load_model(folder, dtype=dtype or torch.float32)
    return model.to(device()), processor, folder


@dataclass(frozen=True)
class Study:
    """What a study asks: a model on its device, its processor, questions with pictures opened as the model was trained.

    depth: decoder layers. folder: of the model.
    """

    model: torch.nn.Module
    processor: object
    data: LlavaData
    folder: str

    @property
    def depth(self) -> int:
        return len(find_parts(self.model).layers)


def open_study(
    model: str | Path,
    questions: str | Path | None = None,
    images: str | Path | None = None,
    pad_to_square: bool | None = None,
    dtype: torch.dtype | None = None,
    world: str | None = None,
) -> Study:
    """Open ``model`` (see ``open_model``) to be asked ``questions``, LLaVA JSON, about ``images``.

    questions: None: those held out of ``world``; None: the model's own, which it comes with or was trained on.
    pad_to_square: see ``trained_padding``.
    """
    questions = questions or find_world(world or home(model)).heldout()
    data = LlavaData(questions, images or None)  # refused before a model is loaded
    opened, processor, folder = open_model(model, dtype)
    data.pad = trained_padding(processor, folder, pad_to_square)
    return Study(opened, processor, data, folder)


def home(model: str | Path) -> str:
    """The world that ``model`` comes with, or was trained on by its run's config.yaml; "digits" if neither is known."""
    trained_on = run_settings(model).get("data")
    return HOMES.get(str(model), trained_on if trained_on in WORLDS else "digits")


def trained_padding(
    processor, model: str | Path, wanted: bool | None = None
) -> tuple[int, int, int] | None:
    """The colour that pads pictures to squares before the model in the folder ``model`` is asked, None for no padding:
    as it was trained, by its run's own config.yaml, unless ``wanted`` says. A model without one is not padded for."""
    if wanted is None:
        wanted = run_settings(model).get("pad_to_square", False)
    return padding_colour(processor) if wanted else None
