"""Open models and data for evaluation, with the image padding that the model was trained with."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from llavolta.compression.families import find_parts
from llavolta.data import LlavaData, padding_colour
from llavolta.paths import RUNS
from llavolta.train.checkpoints import RECORD
from llavolta.train.config import TrainConfig, run_settings
from llavolta.train.models import load_model
from llavolta.train.run import train
from llavolta.worlds import HOMES, WORLDS
from llavolta.worlds import world as find_world


def device() -> torch.device:
    """Return the device for answering and timing: the accelerator, or the CPU without one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def embedded_llava() -> Path:
    """Train the embedded LLaVA without compression, on first use.

    The shipped parts alone have an untrained projector. Training takes about 3 minutes on 2 cores.

    Returns:
        The run folder of the scheme "single-stage", a plain Hugging Face folder.

    Raises:
        ConfigError: The folder has another run.
    """
    folder = RUNS / "single-stage"
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / ".single-stage.lock"):  # a second process waits for the first
        first_use = not (folder / RECORD).exists()
        if first_use:
            print(
                "training the embedded LLaVA without compression, once; about 3 minutes on 2 cores",
                flush=True,
            )
        # The parameters of notebook 03, so that both share one run.
        config = TrainConfig.from_preset("embedded", output=str(folder), scheme="single-stage")
        return train(config, progress=first_use)


@contextmanager
def answering(model):
    """Put ``model`` in evaluation mode within the block.

    Each module's mode is restored afterwards, also after an error.

    Args:
        model: The model.

    Yields:
        The same model.
    """
    # model.train() would set all modules to one mode, but they may differ.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def open_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple:
    """Load a model onto its device.

    Args:
        name: A run folder, a Hugging Face folder, a hub name, or a model that comes with the
            package. "embedded" is the embedded LLaVA trained without compression.
        dtype: Of the weights; None: float32.

    Returns:
        Model, processor, and the folder or name that was loaded.

    Raises:
        ConfigError: There is no such model, or weights are missing.
    """
    folder = str(embedded_llava() if name == "embedded" else name)
    model, processor = load_model(folder, dtype=dtype or torch.float32)
    return model.to(device()), processor, folder


@dataclass(frozen=True)
class Study:
    """A model with the questions to ask it.

    Attributes:
        model: The model, on its device.
        processor: The model's processor.
        data: The questions. Their images are padded as in the model's training.
        folder: The folder or name of the model.
    """

    model: torch.nn.Module
    processor: object
    data: LlavaData
    folder: str

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(find_parts(self.model).layers)


def open_study(
    model: str | Path,
    questions: str | Path | None = None,
    images: str | Path | None = None,
    pad_to_square: bool | None = None,
    dtype: torch.dtype | None = None,
    world: str | None = None,
) -> Study:
    """Open a model and the questions to ask it.

    Args:
        model: A model's name; see ``open_model``.
        questions: LLaVA JSON; None: the held-out questions of ``world``.
        images: The folder of the questions' images; None: the folder of ``questions``.
        pad_to_square: Pad images to squares; None: as in the model's training.
        dtype: Of the weights; None: float32.
        world: Generated data; None: the data that the model comes with or was trained on, else
            "digits".

    Returns:
        The model, processor and questions.

    Raises:
        DataError: The questions cannot be read, or ``world`` is unknown.
        ConfigError: There is no such model, or weights are missing.
    """
    questions = questions or find_world(world or home(model)).heldout()
    data = LlavaData(questions, images or None)  # raises before the model is loaded
    opened, processor, folder = open_model(model, dtype)
    # The colour depends on the processor, so the data set gets it only now.
    data.pad = trained_padding(processor, folder, pad_to_square)
    return Study(opened, processor, data, folder)


def home(model: str | Path) -> str:
    """Return the generated data that a model comes with, or was trained on.

    Args:
        model: A model's name or folder. A run folder's config.yaml names the data.

    Returns:
        A key of WORLDS; "digits" if neither is known.
    """
    # ``data`` of a run may also be a file, which is no generated data.
    trained_on = run_settings(model).get("data")
    return HOMES.get(str(model), trained_on if trained_on in WORLDS else "digits")


def trained_padding(
    processor, model: str | Path, wanted: bool | None = None
) -> tuple[int, int, int] | None:
    """Return the colour that pads a model's images to squares.

    Args:
        processor: The model's processor.
        model: The model's folder. A run folder's config.yaml tells whether training padded.
        wanted: Whether to pad; None: as in training. A model without a config.yaml was not padded.

    Returns:
        RGB from 0 to 255, or None for no padding.
    """
    if wanted is None:
        wanted = run_settings(model).get("pad_to_square", False)
    return padding_colour(processor) if wanted else None
