"""The configuration of a training run: one flat, checked model, and presets of it by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llavolta.compression.plan import check_layers, parse_plan
from llavolta.errors import ConfigError
from llavolta.paths import expand
from llavolta.train.projectors import OWN, parse_projector
from llavolta.train.schemes import SCHEMES, Scheme, Stage

ENGINES = {
    file.stem: file
    for file in sorted(
        (Path(__file__).parent / "engines").glob("*.json"), key=lambda file: file.stem
    )
}
PRESETS = {file.stem: file for file in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def _number(value: Any) -> Any:
    """Convert text to a number: YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # pydantic's error says what it must be


_Number = Annotated[float, BeforeValidator(_number)]
_Rate = Annotated[_Number, Field(ge=1e-12, lt=1)]
_Epochs = Annotated[_Number, Field(ge=1e-6, lt=1e6)]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_Path = Annotated[str, AfterValidator(expand)]


class TrainConfig(BaseModel):
    """Everything that a run depends on.

    The defaults are the embedded scale; ``PRESETS`` names others. A path may begin with ~, the
    user's home folder. Environment variables in paths are not expanded. The docstrings of the
    fields are the text of ``python -m llavolta.train --help``.

    Raises:
        ConfigError: A parameter is unknown, missing or wrong, or two do not fit together.
        PlanError: A plan cannot be read.
        ConfigError: The scheme's stages are wrong.
        ConfigError: The projector cannot be read.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    # Run and model
    output: _Path
    """The folder that the run is written to."""
    model: _Path = "embedded"
    """A Hugging Face folder or hub name. "embedded" is the tiny LLaVA in data/, "embedded-video" a
    Video-LLaVA made of its parts, "nano" a LLaVA of small pretrained parts, "nano-tuned" that one,
    trained."""
    vision_tower: _Path | None = None
    """A folder or hub name. Together with language_model it replaces model: a LLaVA with a new
    projector is made of the two."""
    language_model: _Path | None = None
    """The language model of that LLaVA, a folder or hub name."""
    projector: str = OWN
    """A new projector that projector alignment trains, such as "stf:2" (see train.projectors).
    "mlp": the projector that the model comes with."""

    # Data
    data: _Path = "digits"
    """A data file in LLaVA's format (JSON, JSON Lines or Parquet), or "digits", "clips" or
    "pictures", which are generated."""
    images: _Path | None = None
    """Image folder of data. None: the folder of the file."""
    align_data: _Path | None = None
    """Data file of captions for projector alignment. None: the captions of the generated data.
    Beside a data file it is needed, unless align_steps is 0."""
    align_images: _Path | None = None
    """Image folder of align_data. None: the folder of the file."""
    bad_entries: Literal["fail", "skip"] = "fail"
    """"fail" stops at the first entry that cannot be used. "skip" checks all images and videos
    before training, and leaves bad entries out. It uses what ``python -m llavolta.data check``
    found before, so run that first for large data."""
    ignore_keys: list[str] = []
    """Keys of entries and turns that are treated as absent, such as "tools". Without this, an entry
    is bad if it has a key that changes the training and that nothing reads. The same as
    ``python -m llavolta.data check --ignore KEY``."""
    scenes: _Positive = 4000
    """Number of scenes of generated data."""

    # Scheme
    scheme: str | list = "three-stage"
    """A name of schemes.SCHEMES, whose layers are scaled to the model's depth. Or a list of plans,
    which share the steps equally. Or a list of stages ``{plan, share}``, which may also have
    slow_every, isolated, warmup and lr_scale (see schemes.Stage). The layers in a list are not
    scaled. The first item of a list may be ``{align: {plan, share}}``: the plan of projector
    alignment, in place of align_plan, and the share of its steps that is done."""
    pivots: list | None = None
    """The optimizer steps at which a stage ends and the next begins. None: the stages' shares
    decide."""
    stage: int | None = None
    """Train up to the end of this stage of the scheme, from 1. 0: only projector alignment. None:
    everything."""
    plan: str | None = None
    """Replaces the plan of stage."""
    align_plan: str = "none"
    """The plan of projector alignment, unless the scheme has one of its own."""

    # Steps and batches
    max_steps: _Positive | None = None
    """Optimizer steps of the whole scheme."""
    epochs: _Epochs | None = None
    """Passes over the data, in place of max_steps. Without both it is one pass; for "digits", 200
    steps."""
    align_steps: _Count = 240
    """Optimizer steps of projector alignment. 0 skips it, for a model that is aligned."""
    align_words: _Count = 0
    """Steps before projector alignment that fit the projector to the names of the objects in the
    data; see train.words."""
    align_epochs: _Epochs | None = None
    """Passes over the alignment data, in place of align_steps."""
    batch_size: _Positive = 32
    """Examples that a process computes at a time."""
    align_batch_size: _Positive | None = None
    """The same in projector alignment. None: batch_size."""
    global_batch: _Positive | None = None
    """Examples of an optimizer step over all processes, by gradient accumulation. None: one batch
    of each process."""
    align_global_batch: _Positive | None = None
    """The same in projector alignment. None: global_batch."""

    # Optimizer and adapters
    learning_rate: _Rate = 1.5e-3
    """Peak learning rate: it rises linearly during warm-up, then falls with a cosine."""
    align_learning_rate: _Rate = 4e-3
    """The same in projector alignment."""
    projector_learning_rate: _Rate | None = None
    """Peak learning rate of the projector in instruction tuning. None: learning_rate."""
    train_tower: bool = False
    """Whether instruction tuning also trains the vision tower."""
    tower_learning_rate: _Rate | None = None
    """Peak learning rate of the vision tower. None: learning_rate."""
    lora_rank: _Count = 0
    """Rank of LoRA adapters in the language model, which are trained in place of its weights. 0: no
    adapters. The finished model has the adapters merged in."""
    lora_alpha: _Positive | None = None
    """Adapters are scaled by lora_alpha / lora_rank. None: twice the rank."""
    lora_dropout: Annotated[_Number, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapter input. Slow on a CPU."""
    quantize: Literal["nf4"] | None = None
    """"nf4" keeps the frozen language model in 4 bits while it trains (QLoRA). The finished model
    is not quantized."""
    warmup: Annotated[_Number, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[_Number, Field(ge=0, lt=10)] = 0.0
    """Weight decay of AdamW."""

    # Sequence, precision and engine
    max_length: _Positive = 2048
    """Most tokens of an example, visual tokens included. Longer texts are cut. An entry is bad if
    visual tokens or all labels are cut off."""
    pad_to_square: bool = False
    """Whether images are padded to squares, as in LLaVA-1.5. If not, the model's processor may crop
    them."""
    bf16: bool | Literal["auto"] = False
    """Autocast to bfloat16. "auto": where that is faster, on a GPU or CPU that has instructions for
    it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass in place of saving them. Slower, with less
    memory."""
    deepspeed: _Path | None = None
    """"zero2", "zero3", "zero3-offload" or a DeepSpeed JSON file."""
    fsdp: _Path | None = None
    """"fsdp2" or a JSON file of Trainer's fsdp_config. Without deepspeed and fsdp, several
    processes use DistributedDataParallel."""

    # Checkpoints, logs and loading
    save_steps: _Count = 0
    """Save a checkpoint every so many steps, besides those at the ends of stages. 0: only those."""
    keep_checkpoints: _Positive = 2
    """How many of these checkpoints are kept. Those at the ends of stages always are."""
    log_steps: _Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    num_workers: _Count = 0
    """Processes that load data, per training process. 0: the training process loads them itself."""
    seed: _Count = 0
    """Seed of new weights, of the order of the data, and of what compressors draw."""

    def __init__(self, **values):
        unknown = [name for name in values if name not in TrainConfig.model_fields]
        if unknown:
            known = ", ".join(TrainConfig.model_fields)
            raise ConfigError(f"unknown parameter {', '.join(map(repr, unknown))}; known: {known}")
        if "output" not in values:
            raise ConfigError("output is missing: name the folder that the run is written to")
        try:
            super().__init__(**values)
        except ValidationError as error:
            # A field of several types has an error for each: its message names them all.
            wrong = error.errors()
            name = wrong[0]["loc"][0]
            may = " or ".join(
                e["msg"].removeprefix("Input should be ") for e in wrong if e["loc"][0] == name
            )
            raise ConfigError(f"{name} must be {may}, not {values[name]!r}") from None
        self._check()

    def _check(self) -> None:
        """Check what no single field can."""
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigError("give max_steps or epochs, not both")
        if (self.vision_tower is None) != (self.language_model is None):
            raise ConfigError(
                "vision_tower and language_model make a model together; give both or neither"
            )
        if self.vision_tower is not None and not self.aligns:
            raise ConfigError(
                "a model made of vision_tower and language_model is not aligned; raise align_steps"
            )
        if parse_projector(self.projector) is not None and not self.aligns:
            raise ConfigError(
                f"projector {self.projector!r} is a new one, which is not aligned; raise "
                "align_steps"
            )
        if self.quantize is not None and not self.lora_rank:
            raise ConfigError(
                f"quantize {self.quantize!r} freezes the language model; give a lora_rank above 0"
            )
        if self.tower_learning_rate is not None and not self.train_tower:
            raise ConfigError(
                "tower_learning_rate without train_tower changes nothing; set train_tower"
            )
        self._check_engine()
        parse_plan(self.align_plan)
        stages = len(self._written_scheme().stages)
        if self.stage is not None and self.stage not in range(stages + 1):
            raise ConfigError(
                f"stage must be 0 (projector alignment) .. {stages} for this scheme, not "
                f"{self.stage!r}"
            )
        if self.plan is not None and not self.stage:
            raise ConfigError(
                "plan replaces the plan of one stage of the scheme; say which with stage (from 1)"
            )
        if self.plan is not None:
            Stage(self.plan, 1)  # raises for a plan that cannot be read

    def changed(self, **changes) -> TrainConfig:
        """Return a copy with other values of some parameters, checked as a whole."""
        return TrainConfig(**{**self.model_dump(), **changes})

    def _check_engine(self) -> None:
        """Check the DeepSpeed or FSDP file."""
        if self.deepspeed and self.fsdp:
            raise ConfigError("deepspeed and fsdp both shard the model; give one")
        for kind, name in (("deepspeed", self.deepspeed), ("fsdp", self.fsdp)):
            if name is None:
                continue
            known = [engine for engine in ENGINES if engine.startswith("fsdp") == (kind == "fsdp")]
            if name not in known and not Path(name).is_file():
                raise ConfigError(f"{kind} must be {', '.join(known)} or a JSON file, not {name!r}")
            try:
                values = json.loads(Path(ENGINES.get(name, name)).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{kind} file {name} cannot be read as JSON ({error})") from None
            if "optimizer" in values or "scheduler" in values:
                raise ConfigError(
                    f"{kind} file {name} sets the optimizer or scheduler, which are this "
                    "configuration's"
                )

    @property
    def aligns(self) -> bool:
        """Whether projector alignment comes first."""
        return bool(self.align_steps or self.align_epochs)

    def _written_scheme(self) -> Scheme:
        """Return the scheme as it was given, before it is scaled to a model's depth."""
        if isinstance(self.scheme, str):
            if self.scheme not in SCHEMES:
                raise ConfigError(
                    f"unknown scheme {self.scheme!r}; choose from {', '.join(SCHEMES)}, or list "
                    "stages"
                )
            return SCHEMES[self.scheme]
        return Scheme.of("custom", self.scheme)

    def align_stage(self, scheme: Scheme) -> Stage:
        """Return the stage of projector alignment: the scheme's own, or one of ``align_plan``."""
        return scheme.align or Stage(self.align_plan, 1)

    def resolve_scheme(self, num_layers: int, total_steps: int) -> Scheme:
        """Return the scheme for a model and a number of steps.

        A named scheme is scaled to the model's depth; pivots and plan are applied.

        Args:
            num_layers: Decoder layers of the model.
            total_steps: Optimizer steps of the whole scheme.

        Returns:
            The scheme.

        Raises:
            PlanError: A plan does not fit the model.
            ConfigError: The pivots do not fit, or there are fewer steps than stages.
        """
        scheme = self._written_scheme()
        if isinstance(self.scheme, str):
            scheme = scheme.scaled(num_layers)
        if self.pivots is not None:
            plans = [stage.plan for stage in scheme.stages]
            timed = Scheme.from_pivots(scheme.name, plans, self.pivots, total_steps).stages
            pairs = zip(scheme.stages, timed, strict=True)
            scheme = replace(
                scheme, stages=tuple(replace(stage, share=new.share) for stage, new in pairs)
            )
        if self.plan is not None:
            stages = list(scheme.stages)
            stages[self.stage - 1] = replace(stages[self.stage - 1], plan=self.plan)
            name = f"{scheme.name} with {self.plan} in stage {self.stage}"
            scheme = replace(scheme, name=name, stages=tuple(stages))
        for stage in (*scheme.stages, self.align_stage(scheme)):
            for plan in stage.choices:
                check_layers(plan, num_layers)
        scheme.boundaries(total_steps)  # raises for fewer steps than stages
        return scheme

    def batches(self, phase: str, processes: int) -> tuple[int, int]:
        """Return the sizes of a batch and of an optimizer step.

        Args:
            phase: "align" or "instruct".
            processes: Number of processes.

        Returns:
            Examples that a process computes at a time, and how many such batches it accumulates.

        Raises:
            ConfigError: The global batch is no multiple of what all processes compute at a time.
        """
        size, whole = self.batch_size, self.global_batch
        if phase == "align":
            size, whole = self.align_batch_size or size, self.align_global_batch or whole
        together = size * processes
        if whole is not None and whole % together:
            raise ConfigError(
                f"a global batch of {whole} is no multiple of {size} examples in {processes} "
                "processes; change batch_size or the number of processes"
            )
        return size, (whole or together) // together

    def steps(self, phase: str, examples: int, processes: int) -> int:
        """Return the optimizer steps of a phase, as set or by its epochs (one by default).

        Args:
            phase: "align" or "instruct".
            examples: Examples of the phase's data.
            processes: Number of processes.
        """
        steps, epochs = (
            (self.align_steps, self.align_epochs)
            if phase == "align"
            else (self.max_steps, self.epochs)
        )
        if phase == "align" and epochs is None or steps is not None and phase != "align":
            return steps
        size, accumulated = self.batches(phase, processes)
        return max(1, math.ceil((epochs or 1) * examples / (size * accumulated * processes)))

    @classmethod
    def from_preset(cls, name: str, **changes) -> TrainConfig:
        """Return the configuration of the preset ``name`` with other values; output is required.

        If max_steps or epochs is among the changes, neither is taken from the preset.
        """
        values = preset(name)
        if {"max_steps", "epochs"} & changes.keys():
            values = {
                key: value for key, value in values.items() if key not in ("max_steps", "epochs")
            }
        return cls(**{**values, **changes})


def preset(name: str) -> dict:
    """Return the parameters that the preset ``name`` sets. Raise ConfigError if it is unknown."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return yaml.safe_load(PRESETS[name].read_text())


def parse_yaml(text: str, name: str):
    """Return the value of a YAML text. Raise ConfigError, which calls it ``name``, for others."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # malformed dates, numbers and tags raise other errors than YAML's
        raise ConfigError(
            f"{name} cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None


def parse_changes(given: Sequence[str]) -> dict:
    """Return the parameters of ``--set NAME=VALUE ...``. Raise ConfigError for other words."""
    changes = {}
    for change in given:
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not {change!r}")
        changes[name] = parse_yaml(value, f"--set {name}")
    return changes


def run_settings(model: str | Path) -> dict:
    """Return the parameters of the run that made a model, from its config.yaml.

    Args:
        model: The run folder, one of its checkpoints, or its aligned model.

    Returns:
        The values by name; an empty dict if there is no such file.
    """
    for folder in (Path(model), Path(model).parent):
        file = folder / "config.yaml"
        if file.is_file() and (
            folder == Path(model) or re.fullmatch(r"align|checkpoint-\d+", Path(model).name)
        ):
            held = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return held if isinstance(held, dict) else {}
    return {}
