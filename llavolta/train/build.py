"""What a run needs besides its model: the resolved scheme, the data, and the number of steps."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig

from llavolta.data import Collator, LlavaData, find_bad, find_too_long, padding_colour
from llavolta.data.boxes import box_notes
from llavolta.data.table import is_table
from llavolta.errors import ConfigError, DataError
from llavolta.train.config import TrainConfig
from llavolta.train.models import read_config
from llavolta.train.projectors import parse_projector, with_projector
from llavolta.train.schemes import Scheme
from llavolta.worlds import WORLDS, model_path
from llavolta.worlds.joining import tower_grid

ALIGN = "align"  # name of the alignment phase, of its folder and of its scheme


def heldout_file(config: TrainConfig) -> Path:
    """Return the file of held-out questions of the generated data that a run trains on.

    If it trains on a file of the user's, it is that of the digits.
    """
    return WORLDS.get(config.data, WORLDS["digits"]).heldout(config.scenes)


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to for its model and data.

    Attributes:
        scheme: The scheme, for the model's depth.
        num_layers: Decoder layers of the model.
        num_tokens: Visual tokens of an image; 0 if they vary.
        total_steps: Optimizer steps of the scheme.
        data: The data file.
        images: Its image folder; None: the folder of the file.
    """

    scheme: Scheme
    num_layers: int
    num_tokens: int
    total_steps: int
    data: Path
    images: Path | None


def prepare(config: TrainConfig) -> Setup:
    """Resolve a configuration without loading weights.

    Generated data are made on their first use.

    Args:
        config: The configuration of the run.

    Returns:
        The resolved values.

    Raises:
        ConfigError: The model or the data file cannot be read, or a number does not fit.
        DataError: The data have to be counted, and cannot be used.
        PlanError: A plan does not fit the model.
        ConfigError: The scheme does not fit the number of steps.
    """
    num_layers, num_tokens = _sizes(config)
    world = WORLDS.get(config.data)
    data, images = (
        (world.train(config.scenes), None) if world else (Path(config.data), config.images)
    )
    if not data.is_file() and not is_table(data):
        raise ConfigError(
            f"no data file {data}; give a LLaVA JSON or Parquet file, or "
            f"{' or '.join(map(repr, WORLDS))}"
        )
    # Some generated data have a number of steps that suits them.
    if world and world.steps and config.max_steps is None and config.epochs is None:
        total = world.steps
    else:
        total = count_steps(config, "instruct", data, images)
    return Setup(
        config.resolve_scheme(num_layers, total), num_layers, num_tokens, total, data, images
    )


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Return decoder layers, and visual tokens of an image, from configurations alone."""

    def read(name: str):
        try:
            return AutoConfig.from_pretrained(model_path(name))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {name!r} cannot be read: {str(error).splitlines()[0]}"
            ) from None

    if config.vision_tower is None:
        whole = with_projector(read_config(config.model), config.projector)
        return whole.get_text_config().num_hidden_layers, visual_tokens(whole)
    # The model will be made of a vision tower and a language model.
    grid = tower_grid(model_path(config.vision_tower), read(config.vision_tower))
    depth = read(config.language_model).num_hidden_layers
    projector = parse_projector(config.projector)
    return depth, projector.num_tokens(grid.side) if projector else grid.visual_tokens


def visual_tokens(config) -> int:
    """Return the visual tokens of an image, or of a video for a model of videos.

    Args:
        config: The model's configuration.

    Returns:
        Their number; 0 if it varies.
    """
    # In the configuration of a model with tiles, image_seq_length is that of one tile.
    tiled = ("image_grid_pinpoints", "downsample_ratio", "downsample_factor")
    if any(getattr(config, name, None) for name in tiled):
        return 0
    return getattr(config, "video_seq_length", getattr(config, "image_seq_length", 0))


def count_steps(config: TrainConfig, phase: str, data: Path, images: str | Path | None) -> int:
    """Return the optimizer steps of a phase, for the number of processes in WORLD_SIZE.

    Args:
        config: The configuration of the run.
        phase: "align" or "instruct".
        data: The phase's data file, which is opened unless the number of steps is set.
        images: Its image folder.

    Raises:
        ConfigError: The global batch is no multiple of what all processes compute at a time.
        DataError: The data cannot be used.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config.batches(phase, processes)  # raises for a global batch that does not divide
    fixed = config.align_epochs is None if phase == "align" else config.max_steps is not None
    return config.steps(phase, 0 if fixed else len(open_data(config, data, images)), processes)


def open_data(
    config: TrainConfig,
    data: str | Path,
    images: str | Path | None,
    collate: Collator | None = None,
    progress=False,
) -> LlavaData:
    """Open a data set, without its bad entries if ``config`` skips them.

    With a collator, images are padded as ``config`` says, and entries that do not fit into
    ``max_length`` are bad too. ``epochs`` are counted in steps before these are known.

    Args:
        config: The configuration of the run.
        data: The data file.
        images: Its image folder.
        collate: The collator that will make batches of it.
        progress: Whether to print notes and show a progress bar.

    Returns:
        The data set.

    Raises:
        DataError: The data cannot be read, or an entry is bad and ``config`` does not skip it.
    """
    pad = padding_colour(collate.processor) if collate and config.pad_to_square else None
    if config.bad_entries == "fail":
        opened = LlavaData(data, images, pad, ignore=config.ignore_keys)
    else:
        # One process of a machine checks the data; the others read what it has saved.
        with PartialState().local_main_process_first():
            bad = find_bad(data, images, ignore=config.ignore_keys)
            opened = LlavaData(data, images, pad, skip=bad, ignore=config.ignore_keys)
    for note in box_notes(opened, config.pad_to_square) if collate else ():
        say(f"note: {note}", progress)
    too_long = find_too_long(opened, collate, progress) if collate else {}
    if too_long and config.bad_entries == "fail":
        raise DataError(
            f"{next(iter(too_long.values()))}. Entries that are too long or refused: "
            f"{len(too_long)} of {len(opened)}; 'bad_entries: skip' trains without them"
        )
    return opened.without(too_long) if too_long else opened


def record_skipped(output: Path, dataset: LlavaData, progress: bool) -> None:
    """Write the skipped entries to skipped.json, or check that they are those written before.

    So all machines, and a resumed run, train on the same entries. All processes must call this.

    Args:
        output: The run folder.
        dataset: The data set.
        progress: Whether to print a note.

    Raises:
        DataError: The entries differ between machines, or from those that the run skipped before.
    """
    skipped, file = dataset.skipped, output / "skipped.json"
    try:
        held = json.loads(file.read_text()) if file.exists() else skipped
    except ValueError as error:
        raise DataError(
            f"{file} cannot be read ({error}); remove it, and the run goes on"
        ) from None
    if any(other != skipped for other in gather_object([skipped])):
        raise DataError(
            f"the bad entries of {dataset.file.name} differ between machines; give them the same "
            "images"
        )
    if held != skipped:
        raise DataError(
            f"{dataset.file.name} has {len(skipped)} bad entries, not the {len(held)} that the run "
            f"in {output} skipped when it began; restore its images, or name another output"
        )
    total = len(skipped) + len(dataset)
    say(
        f"skipping {len(skipped)} bad of {total} entries of {dataset.file.name}; {file} lists them",
        progress,
    )
    if PartialState().is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(skipped))


def stage_model(config: TrainConfig, setup: Setup) -> Path:
    """Return the checkpoint of the model at the end of the configuration's stage.

    It is the same whether later stages have been trained or not. For stage 0 it is the aligned
    model.

    Args:
        config: The configuration of the run.
        setup: Its resolved values.
    """
    output = Path(config.output)
    if config.stage == 0:
        return output / ALIGN
    ends = setup.scheme.boundaries(setup.total_steps)
    return output / f"checkpoint-{ends[(config.stage or len(ends)) - 1]}"


def say(text: str, progress: bool) -> None:
    """Print a message, if ``progress``."""
    if progress:
        print(text, flush=True)


def align_data(config: TrainConfig) -> tuple[Path, Path | None]:
    """Return the data file and image folder of projector alignment.

    Raises:
        ConfigError: The run trains on a file of the user's, and align_data is missing.
    """
    if config.align_data:
        return Path(config.align_data), config.align_images
    if config.data not in WORLDS:
        raise ConfigError(
            "projector alignment needs align_data (captions); give it, or align_steps 0 to skip it"
        )
    return WORLDS[config.data].align(config.scenes), None
