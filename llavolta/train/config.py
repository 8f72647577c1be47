"""What a training run depends on: one flat, checked configuration, and presets of it by name."""

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
    try:
        return (
            float(value) if isinstance(value, str) else value
        )  # YAML reads 1e-3, without a point, as text
    except ValueError:
        return value


_Number = Annotated[float, BeforeValidator(_number)]
_Rate = Annotated[_Number, Field(ge=1e-12, lt=1)]
_Epochs = Annotated[_Number, Field(ge=1e-6, lt=1e6)]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_Path = Annotated[str, AfterValidator(expand)]


class TrainConfig(BaseModel):
    """Everything a run depends on. The defaults are the embedded scale; ``PRESETS`` names others.

    A path may begin with ~, the user's home folder. Environment variables are not expanded.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    output: _Path
    """The folder that the run is written to."""
    model: _Path = "embedded"
    """A Hugging Face folder or hub name; "embedded" is the tiny LLaVA in data/, "embedded-video" a Video-LLaVA of its
    parts."""
    vision_tower: _Path | None = None
    """With language_model, in place of ``model``: a folder or hub name, to make a LLaVA with a new projector of."""
    language_model: _Path | None = None
    """The other part of that LLaVA."""
    projector: str = OWN
    """A new one for projector alignment to train, such as "stf:2" (see train.projectors); "mlp": the model's own."""

    data: _Path = "digits"
    """LLaVA JSON; "digits" and "clips" are the generated digits VQA and clips VQA."""
    images: _Path | None = None
    """Image folder of ``data``."""
    align_data: _Path | None = None
    """LLaVA JSON for projector alignment; None: that of ``data``."""
    align_images: _Path | None = None
    """Image folder of ``align_data``."""
    bad_entries: Literal["fail", "skip"] = "fail"
    """"fail" at the first entry that cannot be read, or "skip" those that a check of all pictures and clips finds
    before training; for a large set run ``python -m llavolta.data check`` first, whose findings are used."""
    ignore_keys: list[str] = []
    """Keys of entries and turns that are taken as not there, such as "tools", which nothing here follows; without
    this, an entry that has one is bad. ``python -m llavolta.data check --ignore KEY`` is the same."""
    scenes: _Positive = 4000
    """How many scenes of a generated world."""

    scheme: str | list = "three-stage"
    """A name of schemes.SCHEMES (layers are scaled to the model's depth), a list of plans, or a list of {plan, share},
    maybe with slow_every, warmup, lr_scale (both taken as they are; see schemes.Stage). The first entry of a list may
    be ``{align: {plan, share}}``, what projector alignment is, in place of align_plan, and in how many of its steps."""
    pivots: list | None = None
    """The optimizer steps at which a stage ends and the next begins; None: stages have their shares."""
    stage: int | None = None
    """Train up to the end of this stage of the scheme (from 1), only projector alignment (0), or everything (None)."""
    plan: str | None = None
    """Replaces the plan of ``stage``."""
    align_plan: str = "none"
    """The plan of projector alignment, where the scheme has none of its own."""

    max_steps: _Positive | None = None
    """Optimizer steps of the whole scheme."""
    epochs: _Epochs | None = None
    """The same as passes over the data; give one of the two."""
    align_steps: _Count = 240
    """Optimizer steps of projector alignment; 0 skips it, for a model that is aligned."""
    align_words: _Count = 0
    """Before it, so many steps that fit the projector to the names of objects, where the data tell them; see
    train.words."""
    align_epochs: _Epochs | None = None
    """The same as passes over the data; replaces align_steps."""
    batch_size: _Positive = 32
    """Examples that a process holds at a time."""
    align_batch_size: _Positive | None = None
    """The same in projector alignment; None: batch_size."""
    global_batch: _Positive | None = None
    """Examples of an optimizer step over all processes, by accumulation of gradients; None: one batch of each."""
    align_global_batch: _Positive | None = None
    """The same in projector alignment; None: global_batch."""

    learning_rate: _Rate = 1.5e-3
    """The peak, after warm-up and before the cosine's decay."""
    align_learning_rate: _Rate = 4e-3
    """The same in projector alignment."""
    projector_learning_rate: _Rate | None = None
    """That of the projector while tuning; None: learning_rate."""
    train_tower: bool = False
    """Also train the vision tower while tuning."""
    tower_learning_rate: _Rate | None = None
    """That of the vision tower; None: learning_rate."""
    lora_rank: _Count = 0
    """Train adapters of this rank in the language model in place of its weights. The finished model is a plain one."""
    lora_alpha: _Positive | None = None
    """Adapters are scaled by lora_alpha / lora_rank; None: twice the rank."""
    lora_dropout: Annotated[_Number, Field(ge=0, lt=1)] = 0.05
    """Share of what adapters read that is dropped; drawing what is takes a CPU long."""
    quantize: Literal["nf4"] | None = None
    """"nf4" holds the frozen language model in 4 bits (QLoRA). The finished model is a plain one."""
    warmup: Annotated[_Number, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[_Number, Field(ge=0, lt=10)] = 0.0
    """Of AdamW."""

    max_length: _Positive = 2048
    """Tokens of an example, visual ones among them; a longer text is cut."""
    pad_to_square: bool = False
    """Pad pictures to squares in place of cropping them, as LLaVA-1.5 does."""
    bf16: bool | Literal["auto"] = False
    """Autocast to bfloat16. "auto": where it is faster, on a GPU or a CPU that has instructions for it."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass in place of keeping what they computed."""
    deepspeed: _Path | None = None
    """"zero2", "zero3", "zero3-offload" or a DeepSpeed JSON file."""
    fsdp: _Path | None = None
    """"fsdp2" or a file of Trainer's fsdp_config. Neither: DistributedDataParallel."""

    save_steps: _Count = 0
    """A checkpoint after every so many steps, besides those at the ends of stages."""
    keep_checkpoints: _Positive = 2
    """Of those, the newest so many stay."""
    log_steps: _Positive = 10
    """Steps from one line of metrics.jsonl to the next."""
    num_workers: _Count = 0
    """Processes that load data, beside each that trains."""
    seed: _Count = 0
    """Of the weights that are new, the order of the data, and what compressors draw."""

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
            wrong = error.errors()
            name = wrong[0]["loc"][0]
            may = " or ".join(
                e["msg"].removeprefix("Input should be ") for e in wrong if e["loc"][0] == name
            )
            raise ConfigError(f"{name} must be {may}, not {values[name]!r}") from None
        self._check()

    def _check(self) -> None:
        """What no field shows alone."""
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
                f"projector {self.projector!r} is a new one, which is not aligned; raise align_steps"
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
                f"stage must be 0 (projector alignment) .. {stages} for this scheme, not {self.stage!r}"
            )
        if self.plan is not None and not self.stage:
            raise ConfigError(
                "plan replaces the plan of one stage of the scheme; say which with stage (from 1)"
            )
        if self.plan is not None:
            Stage(self.plan, 1)

    def changed(self, **changes) -> TrainConfig:
        """This configuration with other values of some parameters, checked as a whole."""
        return TrainConfig(**{**self.model_dump(), **changes})

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
                raise ConfigError(
                    f"{kind} file {name} sets the optimizer or scheduler, which are this configuration's"
                )

    @property
    def aligns(self) -> bool:
        """Whether projector alignment comes first."""
        return bool(self.align_steps or self.align_epochs)

    def _written_scheme(self) -> Scheme:
        if isinstance(self.scheme, str):
            if self.scheme not in SCHEMES:
                raise ConfigError(
                    f"unknown scheme {self.scheme!r}; choose from {', '.join(SCHEMES)}, or list stages"
                )
            return SCHEMES[self.scheme]
        return Scheme.of("custom", self.scheme)

    def align_stage(self, scheme: Scheme) -> Stage:
        """What projector alignment before ``scheme`` is."""
        return scheme.align or Stage(self.align_plan, 1)

    def resolve_scheme(self, num_layers: int, total_steps: int) -> Scheme:
        """The scheme for a model of ``num_layers`` decoder layers over ``total_steps`` optimizer steps."""
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
        """The preset ``name`` with ``changes``, of which output is one. max_steps and epochs replace each other."""
        values = preset(name)
        if {"max_steps", "epochs"} & changes.keys():
            values = {
                key: value for key, value in values.items() if key not in ("max_steps", "epochs")
            }
        return cls(**{**values, **changes})


def preset(name: str) -> dict:
    """The parameters that the preset ``name`` sets. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return yaml.safe_load(PRESETS[name].read_text())


def parse_yaml(text: str, name: str):
    """The value that ``text`` is in YAML. Raises ConfigError, naming it ``name``."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises whatever a malformed number, date or tag makes of it
        raise ConfigError(
            f"{name} cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None


def parse_changes(given: Sequence[str]) -> dict:
    """The parameters of a command line's ``--set NAME=VALUE ...``. Raises ConfigError."""
    changes = {}
    for change in given:
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not {change!r}")
        changes[name] = parse_yaml(value, f"--set {name}")
    return changes


def run_settings(model: str | Path) -> dict:
    """The parameters of the run that made the model in the folder ``model`` (the run's own, one of its checkpoints, or
    its aligned model), by its config.yaml; none if there is no such file."""
    for folder in (Path(model), Path(model).parent):
        file = folder / "config.yaml"
        if file.is_file() and (
            folder == Path(model) or re.fullmatch(r"align|checkpoint-\d+", Path(model).name)
        ):
            held = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return held if isinstance(held, dict) else {}
    return {}
