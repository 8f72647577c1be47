"""From a configuration to what a run needs: models, data, steps."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig

from llavolta.data import Collator, DataError, LlavaData, find_bad, find_too_long, padding_colour
from llavolta.data.boxes import box_notes
from llavolta.data.table import is_table
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.models import read_config
from llavolta.train.projectors import parse_projector, with_projector
from llavolta.train.schemes import Scheme
from llavolta.worlds import WORLDS, model_path
from llavolta.worlds.joining import tower_grid

ALIGN = "align"


def heldout_file(config: TrainConfig) -> Path:
    """The held-out questions of the world that ``config`` trains on; of the digits if it trains on a file."""
    return WORLDS.get(config.data, WORLDS["digits"]).heldout(config.scenes)


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to: the scheme for the model's depth, its sizes, data and number of steps."""

    scheme: Scheme
    num_layers: int
    num_tokens: int
    total_steps: int
    data: Path
    images: Path | None


def prepare(config: TrainConfig) -> Setup:
    """Resolve ``config`` without loading weights; builds the digits data on first use. Raises ConfigError."""
    num_layers, num_tokens = _sizes(config)
    world = WORLDS.get(config.data)
    data, images = (
        (world.train(config.scenes), None) if world else (Path(config.data), config.images)
    )
    if not data.is_file() and not is_table(data):
        raise ConfigError(
            f"no data file {data}; give a LLaVA JSON or Parquet file, or {' or '.join(map(repr, WORLDS))}"
        )
    if world and world.steps and config.max_steps is None and config.epochs is None:
        total = world.steps
    else:
        total = count_steps(config, "instruct", data, images)
    return Setup(
        config.resolve_scheme(num_layers, total), num_layers, num_tokens, total, data, images
    )


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Decoder layers and visual tokens an image, from the checkpoints' configurations alone."""

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
    grid = tower_grid(model_path(config.vision_tower), read(config.vision_tower))
    depth = read(config.language_model).num_hidden_layers
    projector = parse_projector(config.projector)
    return depth, projector.num_tokens(grid.side) if projector else grid.visual_tokens


def visual_tokens(config) -> int:
    """Of an image, or of a clip where the model is made for them; 0 where they vary."""
    tiled = (
        "image_grid_pinpoints",
        "downsample_ratio",
        "downsample_factor",
    )  # image_seq_length is then a tile's
    if any(getattr(config, name, None) for name in tiled):
        return 0
    return getattr(config, "video_seq_length", getattr(config, "image_seq_length", 0))


def count_steps(config: TrainConfig, phase: str, data: Path, images: str | Path | None) -> int:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config.batches(phase, processes)  # refuses what does not divide
    fixed = config.align_epochs is None if phase == "align" else config.max_steps is not None
    return config.steps(phase, 0 if fixed else len(open_data(config, data, images)), processes)


def open_data(
    config: TrainConfig,
    data: str | Path,
    images: str | Path | None,
    collate: Collator | None = None,
    progress=False,
) -> LlavaData:
    """The data set at ``data``, without its bad entries if ``config`` skips them. Raises DataError.

    collate: what makes batches of it. Then pictures are padded as ``config`` says, and entries of which ``max_length``
    leaves too little are bad, too; their number is not known to ``epochs``, which counts steps before.
    """
    pad = padding_colour(collate.processor) if collate and config.pad_to_square else None
    if config.bad_entries == "fail":
        opened = LlavaData(data, images, pad, ignore=config.ignore_keys)
    else:
        with PartialState().local_main_process_first():  # a machine looks for them once
            bad = find_bad(data, images, ignore=config.ignore_keys)
            opened = LlavaData(data, images, pad, skip=bad, ignore=config.ignore_keys)
    for note in box_notes(opened, config.pad_to_square) if collate else ():
        say(f"note: {note}", progress)
    too_long = find_too_long(opened, collate, progress) if collate else {}
    if too_long and config.bad_entries == "fail":
        raise DataError(
            f"{next(iter(too_long.values()))}. Entries that are too long or refused: {len(too_long)} of {len(opened)}; "
            "'bad_entries: skip' trains without them"
        )
    return opened.without(too_long) if too_long else opened


def record_skipped(output: Path, dataset: LlavaData, progress: bool) -> None:
    """Hold the run to the entries that it skips: the same on every machine, and whenever it is resumed."""
    skipped, file = dataset.skipped, output / "skipped.json"
    try:
        held = json.loads(file.read_text()) if file.exists() else skipped
    except ValueError as error:
        raise DataError(
            f"{file} cannot be read ({error}); remove it, and the run goes on"
        ) from None
    if any(other != skipped for other in gather_object([skipped])):
        raise DataError(
            f"the bad entries of {dataset.file.name} differ between machines; give them the same images"
        )
    if held != skipped:
        raise DataError(
            f"{dataset.file.name} has {len(skipped)} bad entries, not the {len(held)} that the run in {output} skipped "
            "when it began; restore its images, or name another output"
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
    """The folder that holds the model as it was at the end of the stage of ``config``, later stages trained or not."""
    output = Path(config.output)
    if config.stage == 0:
        return output / ALIGN
    ends = setup.scheme.boundaries(setup.total_steps)
    return output / f"checkpoint-{ends[(config.stage or len(ends)) - 1]}"


def say(text: str, progress: bool) -> None:
    if progress:
        print(text, flush=True)


def align_data(config: TrainConfig) -> tuple[Path, Path | None]:
    if config.align_data:
        return Path(config.align_data), config.align_images
    if config.data not in WORLDS:
        raise ConfigError(
            "projector alignment needs align_data (captions); give it, or align_steps 0 to skip it"
        )
    return WORLDS[config.data].align(config.scenes), None
