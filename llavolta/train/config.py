"""What a training run depends on: one flat, checked configuration, and presets of it by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import yaml

from llavolta.compression.plan import check_layers, parse_plan
from llavolta.errors import UserError
from llavolta.train.projectors import OWN, parse_projector
from llavolta.train.schemes import NAMED, Scheme, Stage

ENGINES = {
    file.stem: file for file in sorted((Path(__file__).parent / "engines").glob("*.json"), key=lambda file: file.stem)
}
PRESETS = {file.stem: file for file in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


class ConfigError(UserError, ValueError):
    """A training configuration that cannot be run; the message names the parameter and what it may be."""


# What the numbers of a configuration may be: whole ones and their least, others and their range.
_WHOLE = dict(
    align_steps=0,
    max_steps=1,
    batch_size=1,
    align_batch_size=1,
    global_batch=1,
    align_global_batch=1,
    max_length=1,
    save_steps=0,
    keep_checkpoints=1,
    log_steps=1,
    num_workers=0,
    scenes=1,
    lora_rank=0,
    lora_alpha=1,
    seed=0,
)
_NUMBERS = dict(
    learning_rate=(1e-12, 1),
    align_learning_rate=(1e-12, 1),
    projector_learning_rate=(1e-12, 1),
    tower_learning_rate=(1e-12, 1),
    warmup=(0, 1),
    weight_decay=(0, 10),
    epochs=(1e-6, 1e6),
    align_epochs=(1e-6, 1e6),
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. The defaults are the embedded scale; ``PRESETS`` names others.

    model: a Hugging Face folder or hub name; "embedded" is the tiny LLaVA in data/, "embedded-video" a Video-LLaVA of
    its parts. vision_tower, language_model: folders or hub names to make a LLaVA of, with a new projector, in place of
    ``model``. projector: a new one for projector alignment to train, such as "stf:2" (see train.projectors); "mlp"
    leaves the model's own. data, images: LLaVA JSON and image folder; "digits" and "clips" are the generated digits VQA
    and clips VQA of so many ``scenes``. bad_entries: "fail" at the first that cannot be read, or "skip" those that a
    check of all pictures and clips finds before training; for a large set run ``python -m llavolta.data check`` first,
    whose findings are used.

    scheme: a name of schemes.NAMED (layers are scaled to the model's depth), a list of plans, or a list of
    {plan, share}, maybe with slow_every (both taken as they are; see schemes.Stage). pivots: the optimizer steps at
    which a stage ends and the next begins; else stages have their shares. stage: train up to the end of this stage of
    the scheme (from 1), only projector alignment (0), or everything (None). plan: replaces the plan of ``stage``.
    align_plan: the plan of projector alignment.

    max_steps: optimizer steps of the whole scheme; epochs: the same as passes over the data (give one of the two).
    align_steps: those of projector alignment; 0 skips it, for a model that is aligned; align_epochs replaces them.
    batch_size: examples a process holds at a time. global_batch: examples of an optimizer step over all processes, by
    accumulation of gradients; None: one batch of each process.

    projector_learning_rate: None: ``learning_rate``. train_tower: also train the vision tower while tuning, at
    tower_learning_rate. lora_rank: train adapters of this rank in the language model in place of its weights, scaled by
    lora_alpha / lora_rank (lora_alpha None: twice the rank). quantize: "nf4" holds the frozen language model in 4 bits
    (QLoRA). The finished model is a plain one either way.

    deepspeed: "zero2", "zero3", "zero3-offload" or a DeepSpeed JSON file; fsdp: "fsdp2" or a file of Trainer's
    fsdp_config; neither: DistributedDataParallel. save_steps: a checkpoint after every so many steps, besides those at
    the ends of stages; keep_checkpoints: of them, the newest so many stay.
    """

    output: str
    model: str = "embedded"
    vision_tower: str | None = None
    language_model: str | None = None
    projector: str = OWN
    data: str = "digits"
    images: str | None = None
    align_data: str | None = None
    align_images: str | None = None
    bad_entries: str = "fail"
    scenes: int = 4000
    scheme: str | list = "three-stage"
    pivots: list | None = None
    stage: int | None = None
    plan: str | None = None
    align_plan: str = "none"
    max_steps: int | None = None
    epochs: float | None = None
    align_steps: int = 240
    align_epochs: float | None = None
    batch_size: int = 32
    align_batch_size: int | None = None
    global_batch: int | None = None
    align_global_batch: int | None = None
    learning_rate: float = 1.5e-3
    align_learning_rate: float = 4e-3
    projector_learning_rate: float | None = None
    train_tower: bool = False
    tower_learning_rate: float | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    quantize: str | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048
    pad_to_square: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    fsdp: str | None = None
    save_steps: int = 0
    keep_checkpoints: int = 2
    log_steps: int = 10
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, kind in get_type_hints(TrainConfig).items():
            if name not in (*_WHOLE, *_NUMBERS, "stage") and not isinstance(getattr(self, name), kind):
                kind = str(kind).removeprefix("<class '").removesuffix("'>")
                raise ConfigError(f"{name} must be of type {kind}, not {getattr(self, name)!r}")
        optional = {field.name for field in fields(self) if field.default is None}
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
                raise ConfigError(f"{name} must be a number from {low} to below {high}, not {value!r}")
        if self.bad_entries not in ("fail", "skip"):
            raise ConfigError(f"bad_entries must be 'fail' or 'skip', not {self.bad_entries!r}")
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigError("give max_steps or epochs, not both")
        if (self.vision_tower is None) != (self.language_model is None):
            raise ConfigError("vision_tower and language_model make a model together; give both or neither")
        if self.vision_tower is not None and not self.aligns:
            raise ConfigError("a model made of vision_tower and language_model is not aligned; raise align_steps")
        if parse_projector(self.projector) is not None and not self.aligns:
            raise ConfigError(f"projector {self.projector!r} is a new one, which is not aligned; raise align_steps")
        if self.quantize is not None and (self.quantize != "nf4" or not self.lora_rank):
            raise ConfigError(f"quantize must be 'nf4', with a lora_rank above 0, not {self.quantize!r}")
        if self.tower_learning_rate is not None and not self.train_tower:
            raise ConfigError("tower_learning_rate without train_tower changes nothing; set train_tower")
        self._check_engine()
        parse_plan(self.align_plan)
        stages = len(self._written_stages())
        if self.stage is not None and (type(self.stage) is not int or self.stage not in range(stages + 1)):
            raise ConfigError(f"stage must be 0 (projector alignment) .. {stages} for this scheme, not {self.stage!r}")
        if self.plan is not None and not self.stage:
            raise ConfigError("plan replaces the plan of one stage of the scheme; say which with stage (from 1)")
        if self.plan is not None:
            parse_plan(self.plan)

    def _check_engine(self) -> None:
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
                raise ConfigError(f"{kind} file {name} sets the optimizer or scheduler, which are this configuration's")

    @property
    def aligns(self) -> bool:
        """Whether projector alignment comes first."""
        return bool(self.align_steps or self.align_epochs)

    def _written_stages(self) -> tuple[Stage, ...]:
        if isinstance(self.scheme, str):
            if self.scheme not in NAMED:
                raise ConfigError(f"unknown scheme {self.scheme!r}; choose from {', '.join(NAMED)}, or list stages")
            return NAMED[self.scheme].stages
        return Scheme.of("custom", self.scheme).stages

    def resolve_scheme(self, num_layers: int, total_steps: int) -> Scheme:
        """The scheme for a model of ``num_layers`` decoder layers over ``total_steps`` optimizer steps."""
        if isinstance(self.scheme, str):
            scheme = NAMED[self.scheme].scaled(num_layers)
        else:
            scheme = Scheme("custom", self._written_stages())
        if self.pivots is not None:
            plans = [stage.plan for stage in scheme.stages]
            timed = Scheme.from_pivots(scheme.name, plans, self.pivots, total_steps).stages
            pairs = zip(scheme.stages, timed, strict=True)
            scheme = replace(scheme, stages=tuple(replace(stage, share=new.share) for stage, new in pairs))
        if self.plan is not None:
            stages = list(scheme.stages)
            stages[self.stage - 1] = replace(stages[self.stage - 1], plan=self.plan)
            scheme = Scheme(f"{scheme.name} with {self.plan} in stage {self.stage}", tuple(stages))
        for plan in (*(stage.plan for stage in scheme.stages), self.align_plan):
            check_layers(parse_plan(plan), num_layers)
        scheme.boundaries(total_steps)
        return scheme

    def batches(self, phase: str, processes: int) -> tuple[int, int]:
        """(examples a process holds at a time, batches accumulated to an optimizer step) of "align" or "instruct"."""
        size, whole = self.batch_size, self.global_batch
        if phase == "align":
            size, whole = self.align_batch_size or size, self.align_global_batch or whole
        together = size * processes
        if whole is not None and whole % together:
            raise ConfigError(
                f"a global batch of {whole} is no multiple of {size} examples in {processes} processes; "
                "change batch_size or the number of processes"
            )
        return size, (whole or together) // together

    def steps(self, phase: str, examples: int, processes: int) -> int:
        """Optimizer steps of ``phase`` over ``examples``; without max_steps and epochs it is one pass."""
        steps, epochs = (self.align_steps, self.align_epochs) if phase == "align" else (self.max_steps, self.epochs)
        if phase == "align" and epochs is None or steps is not None and phase != "align":
            return steps
        size, accumulated = self.batches(phase, processes)
        return max(1, math.ceil((epochs or 1) * examples / (size * accumulated * processes)))

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """A configuration from parsed YAML or notebook parameters; unknown names are errors."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"unknown parameter {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        if "output" not in values:
            raise ConfigError("output is missing: name the folder that the run is written to")
        # YAML reads 1e-3, without a point, as text.
        return cls(**{name: _number(value) if name in _NUMBERS else value for name, value in values.items()})

    @classmethod
    def from_preset(cls, name: str, **changes) -> TrainConfig:
        """The preset ``name`` with ``changes``, of which output is one. max_steps and epochs replace each other."""
        values = preset(name)
        if {"max_steps", "epochs"} & changes.keys():
            values = {key: value for key, value in values.items() if key not in ("max_steps", "epochs")}
        return cls.from_dict({**values, **changes})


def preset(name: str) -> dict:
    """The parameters that the preset ``name`` sets. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return yaml.safe_load(PRESETS[name].read_text())


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of copies of copies would fill any memory
            raise ConfigError("aliases (*name) cannot be used; write the value again")
        return super().compose_node(parent, index)


def parse_yaml(text: str, name: str):
    """The value that ``text`` is in YAML. Raises ConfigError, naming it ``name``."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises whatever a malformed number, date or tag makes of it
        raise ConfigError(f"{name} cannot be read as YAML ({' '.join(str(error).split())})") from None


def _number(value):
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def run_settings(model: str | Path) -> dict:
    """The parameters of the run that made the model in the folder ``model`` (the run's own, one of its checkpoints, or
    its aligned model), by its config.yaml; none if there is no such file."""
    for folder in (Path(model), Path(model).parent):
        file = folder / "config.yaml"
        if file.is_file() and (folder == Path(model) or re.fullmatch(r"align|checkpoint-\d+", Path(model).name)):
            held = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return held if isinstance(held, dict) else {}
    return {}
