"""Training by stages on transformers' Trainer: projector alignment, then instruction tuning under a scheme.

``python -m llavolta.train CONFIG.yaml`` runs what the 03 notebook runs. One run folder holds one run:

    config.yaml      the resolved configuration; another one is refused
    metrics.jsonl    one JSON object every few steps
    skipped.json     the entries left out, under bad_entries: skip
    align/           projector alignment (stage 0), a run folder of its own
    checkpoint-*/    where training can resume; one at the end of every stage (see llavolta.checkpoints)
    model.safetensors, config.json, ...   the model of the newest finished stage, a plain Hugging Face folder
    scheme.json      which stage that is

Stage i of a scheme is the run from the checkpoint at the end of stage i - 1 to the one at the end of stage i, so
stages trained one by one give the same weights as the whole scheme in one go.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from filelock import FileLock
from torch.utils.data import Dataset
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llavolta import checkpoints, digits
from llavolta import clips as clips_vqa
from llavolta.config import ENGINES, PRESETS, ConfigError, TrainConfig, parse_yaml
from llavolta.data import (
    Collator,
    DataError,
    GroupedSampler,
    LlavaData,
    check_words,
    find_bad,
    find_too_long,
    padding_colour,
)
from llavolta.dualspeed import ISOLATOR, add_isolator, fast_mode, load_isolator, save_isolator, slow_mode
from llavolta.errors import Stopped, UserError
from llavolta.families import PIXELS, find_parts, unwrap
from llavolta.models import (
    PROJECTOR,
    TOWER,
    check_tower,
    join,
    load_model,
    model_path,
    parameter_groups,
    read_config,
    set_trainable,
    spare_frozen_towers,
    with_adapters,
)
from llavolta.patch import Compression
from llavolta.paths import DATA
from llavolta.projectors import ProjectorSpec, parse_projector, replace_projector, with_projector
from llavolta.schemes import Scheme

RUNS = DATA / "runs"
ALIGN = "align"
DIGITS_STEPS = 200  # of a whole scheme on the digits, unless the configuration says otherwise


# What may differ between two calls on one run folder: how far to train, and how, not what.
_FREE = ("output", "stage", "num_workers", "log_steps", "save_steps", "keep_checkpoints")
WANTED_PROCESSES = "LLAVOLTA_PROCESSES"  # environment variable: so many must come up


def digits_data(scenes: int = 4000, heldout: int = 300, seed: int = 0) -> Path:
    """The generated digits VQA data set in data/cache, built on first use."""
    return digits.build(DATA / "cache" / f"digits-{scenes}-{heldout}-{seed}", scenes, heldout, seed)


def clips_data(clips: int = 1500, heldout: int = 150, seed: int = 0) -> Path:
    """The generated clips VQA data set in data/cache, built on first use."""
    return clips_vqa.build(DATA / "cache" / f"clips-{clips}-{heldout}-{seed}", clips, heldout, seed)


GENERATED = {"digits": digits_data, "clips": clips_data}  # what ``data`` may name besides a file


def heldout_file(config: TrainConfig) -> Path:
    """The held-out questions of the generated data that ``config`` trains on; of the digits if it trains on a file."""
    return GENERATED.get(config.data, digits_data)(config.scenes) / "heldout.json"


def embedded_llava() -> Path:
    """The folder of the embedded LLaVA trained without compression (scheme "single-stage"), a plain LLaVA.

    Trained on first use, about 3 minutes on 2 cores: the shipped parts alone have an untrained projector.
    """
    folder = RUNS / "single-stage"
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / ".single-stage.lock"):  # a second notebook waits for the first
        first_use = not (folder / checkpoints.RECORD).exists()
        if first_use:
            print("training the embedded LLaVA without compression, once; about 3 minutes on 2 cores", flush=True)
        config = TrainConfig.from_preset("embedded", output=str(folder), scheme="single-stage")  # as 03 trains it
        return train(config, progress=first_use)


class StageCallback(TrainerCallback):
    """Sets the plan of the stage that the optimizer step belongs to, and stops after the last stage asked for.

    In a slow step none is set: StageTrainer.compute_loss sets two in turn. stopping: asked after every step whether to
    save and stop.
    """

    def __init__(self, scheme: Scheme, stop_after: int | None, stopping: Callable[[], bool]):
        self.scheme, self.stop_after, self.stopping = scheme, stop_after, stopping
        self.handle: Compression | None = None
        self.stage: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        spare_frozen_towers(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        stage = self.scheme.stage_at(state.global_step, state.max_steps)
        slow = self.scheme.is_slow(state.global_step, state.max_steps)
        if self.handle is None or slow or stage != self.stage:
            self.release()
            self.stage = stage
            self.handle = None if slow else fast_mode(model, self.scheme.stages[stage])

    def on_step_end(self, args, state, control, **kwargs):
        ends = self.scheme.boundaries(state.max_steps)
        if state.global_step in ends:
            control.should_save = control.should_log = True
            if self.stop_after is not None and state.global_step >= ends[self.stop_after - 1]:
                control.should_training_stop = True
        if self.stopping():
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.release()

    def release(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


class MetricsCallback(TrainerCallback):
    """Appends step, stage, plan, loss, rates, gradient norm, tokens per layer and seconds a step to metrics.jsonl."""

    def __init__(self, file: Path, scheme: Scheme, num_layers: int, num_tokens: int):
        self.file, self.scheme = file, scheme
        self.tokens = [stage.tokens_per_layer(num_layers, num_tokens) for stage in scheme.stages]
        self.visual_tokens = num_tokens
        self.seconds, self.steps, self.started = 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.file) if row["step"] <= state.global_step]  # a resumed run
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        stage = self.scheme.stage_at(state.global_step - 1, state.max_steps)
        row = {
            "step": state.global_step,
            "stage": stage + 1,
            "plan": self.scheme.stages[stage].plan,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "visual_tokens": self.visual_tokens,
            "tokens_per_layer": self.tokens[stage],
            "seconds": self.seconds / max(self.steps, 1),
        }
        self.seconds, self.steps = 0.0, 0
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


class StageTrainer(Trainer):
    """Trainer that groups batches by modality and length, saves what resumes, and stops at a NaN loss.

    keep: checkpoints to keep besides those at the ends of stages.
    """

    def __init__(self, *args, scheme: Scheme, rates: dict[str, float | None], keep: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.scheme, self.rates, self.keep = scheme, rates, keep
        self.staging: Path | None = None
        self.media = list(find_parts(unwrap(self.model)).visual_ids)

    def _get_output_dir(self, trial=None):
        return str(self.staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        run, step = Path(self.args.output_dir), self.state.global_step
        name, barrier = f"{PREFIX_CHECKPOINT_DIR}-{step}", self.accelerator.wait_for_everyone
        self.staging = run / checkpoints.STAGING
        if self.args.should_save:
            shutil.rmtree(self.staging, ignore_errors=True)
        barrier()
        with checkpoints.saving(run, name):
            super()._save_checkpoint(model, trial)
            barrier()
            if self.args.should_save:
                checkpoints.publish(self.staging / name, run / name)
                checkpoints.prune(run, self.keep, set(self.scheme.boundaries(self.state.max_steps)))
        self.staging = None
        barrier()

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        data = train_dataset if train_dataset is not None else self.train_dataset
        return GroupedSampler(data.lengths, data.medium, self.examples_per_step, self.args.seed)

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None and any(self.rates.values()):
            groups = parameter_groups(
                model, self.args.weight_decay, set(self.get_decay_parameter_names(model)), self.rates
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.args.world_size == 1 or len(self.media) == 1:
            return inputs
        # The last batches of an epoch mix stills, clips and text: no process may need a part that another does not.
        held = torch.tensor([int(PIXELS[name] in inputs) for name in self.media], device=self.args.device)
        anywhere = self.accelerator.reduce(held.clone())
        for name, here, there in zip(self.media, held.tolist(), anywhere.tolist(), strict=True):
            if there and not here:
                inputs = self.data_collator.with_black(inputs, name)
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        step, total = self.state.global_step, self.state.max_steps
        stage = self.scheme.stages[self.scheme.stage_at(step, total)]
        with slow_mode(model, stage, inputs) if self.scheme.is_slow(step, total) else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            stage = self.scheme.stage_at(self.state.global_step, self.state.max_steps)
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} (stage {stage + 1}, plan "
                f"{self.scheme.stages[stage].plan}); nothing was saved over. Lower learning_rate (now "
                f"{self.args.learning_rate}) or check the data, and run again: training resumes at the last checkpoint"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict=None):
        # Trainer would save LLaVA under its old key names, which its own resume then fails to load.
        model = unwrap(self.model)
        sharded = [state_dict.pop(name) for name in list(state_dict or ()) if ISOLATOR in name]  # by ZeRO-3
        save = model.save_pretrained
        try:
            model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "save_original_format": False})
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if hasattr(model, ISOLATOR) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            save_isolator(model, folder, *sharded)
        step, total = self.state.global_step, self.state.max_steps
        stages = self.scheme.written
        stage = self.scheme.stage_at(min(step, total - 1), total) + 1
        record = {"scheme": self.scheme.name, "stages": stages, "step": step, "total_steps": total, "next_stage": stage}
        record |= {"examples_per_step": self.examples_per_step, "processes": self.args.world_size}
        (folder / checkpoints.RECORD).write_text(json.dumps(record, indent=1))

    @property
    def examples_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size


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
    data, images = (
        (GENERATED[config.data](config.scenes) / "train.json", None)
        if config.data in GENERATED
        else (Path(config.data), config.images)
    )
    if not data.is_file():
        raise ConfigError(f"no data file {data}; give a LLaVA JSON file, or {' or '.join(map(repr, GENERATED))}")
    if config.data == "digits" and config.max_steps is None and config.epochs is None:
        total = DIGITS_STEPS
    else:
        total = _steps(config, "instruct", data, images)
    return Setup(config.resolve_scheme(num_layers, total), num_layers, num_tokens, total, data, images)


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Decoder layers and visual tokens an image, from the checkpoints' configurations alone."""

    def read(name: str):
        try:
            return AutoConfig.from_pretrained(model_path(name))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {name!r} cannot be read: {str(error).splitlines()[0]}") from None

    if config.vision_tower is None:
        whole = with_projector(read_config(config.model), config.projector)
        return whole.get_text_config().num_hidden_layers, _visual_tokens(whole)
    vision = read(config.vision_tower)
    check_tower(config.vision_tower, vision)
    vision = getattr(vision, "vision_config", vision)
    projector = parse_projector(config.projector) or ProjectorSpec()
    return read(config.language_model).num_hidden_layers, projector.num_tokens(vision.image_size // vision.patch_size)


def _visual_tokens(config) -> int:
    """Of an image, or of a clip where the model is made for them; 0 where they vary."""
    return getattr(config, "video_seq_length", getattr(config, "image_seq_length", 0))


def _steps(config: TrainConfig, phase: str, data: Path, images: str | Path | None) -> int:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config.batches(phase, processes)  # refuses what does not divide
    fixed = config.align_epochs is None if phase == "align" else config.max_steps is not None
    return config.steps(phase, 0 if fixed else len(open_data(config, data, images)), processes)


def open_data(
    config: TrainConfig, data: str | Path, images: str | Path | None, collate: Collator | None = None, progress=False
) -> LlavaData:
    """The data set at ``data``, without its bad entries if ``config`` skips them. Raises DataError.

    collate: what makes batches of it. Then pictures are padded as ``config`` says, and entries of which ``max_length``
    leaves too little are bad, too; their number is not known to ``epochs``, which counts steps before.
    """
    pad = padding_colour(collate.processor) if collate and config.pad_to_square else None
    if config.bad_entries == "fail":
        opened = LlavaData(data, images, pad)
    else:
        with PartialState().local_main_process_first():  # a machine looks for them once
            opened = LlavaData(data, images, pad, skip=find_bad(data, images))
    too_long = find_too_long(opened, collate, progress) if collate else {}
    if too_long and config.bad_entries == "fail":
        raise DataError(
            f"{next(iter(too_long.values()))}. Entries that are too long: {len(too_long)} of {len(opened)}; "
            "'bad_entries: skip' trains without them"
        )
    return opened.without(too_long) if too_long else opened


def _record_skipped(output: Path, dataset: LlavaData, progress: bool) -> None:
    """Hold the run to the entries that it skips: the same on every machine, and whenever it is resumed."""
    skipped, file = dataset.skipped, output / "skipped.json"
    try:
        held = json.loads(file.read_text()) if file.exists() else skipped
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}); remove it, and the run goes on") from None
    if any(other != skipped for other in gather_object([skipped])):
        raise DataError(f"the bad entries of {dataset.file.name} differ between machines; give them the same images")
    if held != skipped:
        raise DataError(
            f"{dataset.file.name} has {len(skipped)} bad entries, not the {len(held)} that the run in {output} skipped "
            "when it began; restore its images, or name another output"
        )
    total = len(skipped) + len(dataset)
    _say(f"skipping {len(skipped)} bad of {total} entries of {dataset.file.name}; {file} lists them", progress)
    if PartialState().is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(skipped))


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Run ``config`` up to its stage, doing only what its output folder does not hold yet. Returns that folder.

    Missing earlier stages, projector alignment among them, are trained first. Raises ConfigError, PlanError,
    DataError, SaveError, FloatingPointError, and Stopped at SIGTERM; whatever was finished before stays.
    """
    output = Path(config.output)
    if (config.deepspeed or config.fsdp) and "RANK" not in os.environ:
        raise ConfigError(
            f"{config.deepspeed or config.fsdp} needs a launcher, also for one process: --num-processes 1, or launch()"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns on import if it has to find out itself
    if config.deepspeed:  # it calls ninja, which pip puts beside this Python
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    state = PartialState(cpu=not torch.cuda.is_available())
    wanted = int(os.environ.get(WANTED_PROCESSES, state.num_processes))
    if wanted != state.num_processes:
        raise ConfigError(f"{wanted} processes were asked for, but {state.num_processes} came up; launch with torchrun")
    progress = progress and state.is_main_process
    with state.main_process_first():
        setup = prepare(config)
        if state.is_main_process:
            _claim(output, config, setup)
    with checkpoints.lock(output) if state.is_main_process else nullcontext():
        return _train(config, setup, progress)


@dataclass(frozen=True)
class Phase:
    """Projector alignment or instruction tuning: what is trained on what, where, and up to the end of which stage."""

    name: str  # "align" or "instruct"
    output: Path
    model: str
    data: Path
    images: Path | None
    scheme: Scheme
    total_steps: int
    last: int
    then: tuple[Path, Path | None] | None = None  # data and images that are trained on later, to be checked now

    @property
    def end(self) -> int:
        """The optimizer step that ends stage ``last``."""
        return self.scheme.boundaries(self.total_steps)[self.last - 1]


def _train(config: TrainConfig, setup: Setup, progress: bool) -> Path:
    output, model, state = Path(config.output), config.model, PartialState()
    if config.aligns:
        align = output / ALIGN
        with state.main_process_first():
            data, images = _align_data(config)
        steps = _steps(config, "align", data, images)
        scheme = Scheme.equal(ALIGN, config.align_plan)
        then = (setup.data, setup.images) if config.stage != 0 else None
        _bring(config, Phase("align", align, model, data, images, scheme, steps, 1, then), progress)
        if config.stage == 0:
            if state.is_main_process and checkpoints.finished(output, ALIGN, scheme.written, steps) < steps:
                checkpoints.export(align, output)
            return output
        model = str(align)
    elif config.stage == 0:
        raise ConfigError("stage 0 is projector alignment, which align_steps 0 skips; raise align_steps")
    last = config.stage or len(setup.scheme.stages)
    phase = Phase("instruct", output, model, setup.data, setup.images, setup.scheme, setup.total_steps, last)
    _bring(config, phase, progress)
    return output


def _bring(config: TrainConfig, phase: Phase, progress: bool) -> None:
    """Bring the phase's folder to the model at the end of its last stage, from what it holds already."""
    state, output, scheme = PartialState(), phase.output, phase.scheme
    held = checkpoint = None
    if state.is_main_process:
        held = checkpoints.finished(output, scheme.name, scheme.written, phase.total_steps)
        if held < phase.end:
            checkpoint = checkpoints.newest(output, lambda text: _say(text, True))
    held, checkpoint = broadcast_object_list([held, checkpoint])
    if held >= phase.end:
        if phase.name == "instruct":
            _say(f"stage {phase.last} is trained already in {output.name}", progress)
        return
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    if done < phase.end:
        ends = scheme.boundaries(phase.total_steps)
        first = sum(done >= end for end in ends) + 1
        earlier = f" (stages {first}..{phase.last - 1} are missing and come first)" if first < phase.last else ""
        what = f"stage {phase.last} of {len(ends)}, plan {scheme.stages[phase.last - 1].plan}"
        what = what if phase.name == "instruct" else "stage 0, projector alignment"
        _say(f"{what}: training{earlier}", progress)
        _run(config, phase, checkpoint, progress)
    if state.is_main_process:
        _finish(output, output / f"{PREFIX_CHECKPOINT_DIR}-{phase.end}")
    state.wait_for_everyone()  # the next phase loads what the main process has just written


def stage_model(config: TrainConfig, setup: Setup) -> Path:
    """The folder that holds the model as it was at the end of the stage of ``config``, later stages trained or not."""
    output = Path(config.output)
    if config.stage == 0:
        return output / ALIGN
    ends = setup.scheme.boundaries(setup.total_steps)
    return output / f"checkpoint-{ends[(config.stage or len(ends)) - 1]}"


def _say(text: str, progress: bool) -> None:
    if progress:
        print(text, flush=True)


def _claim(output: Path, config: TrainConfig, setup: Setup) -> None:
    """Write config.yaml, or check that the folder's is the same run; refuse the folder of another one.

    max_steps and epochs are two ways to say how many steps a run has, which is what must be the same.
    """
    values = {**asdict(config), "resolved_stages": setup.scheme.written}
    file = output / "config.yaml"
    if file.exists():
        defaults = {field.name: field.default for field in fields(config)}  # of parameters younger than the run
        written = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), str(file))
        if not isinstance(written, dict) or not written:
            raise ConfigError(f"{file} holds no run's parameters; it is damaged: restore it, or name another output")
        held = defaults | written
        differ = [name for name in values if name not in _FREE and name != "plan" and held.get(name) != values[name]]
        if differ and {*differ} <= {"max_steps", "epochs"}:
            same = prepare(TrainConfig.from_dict({name: held[name] for name in defaults})).total_steps
            differ = differ if same != setup.total_steps else []
        if differ:
            changes = ", ".join(f"{name} {held.get(name)!r} -> {values[name]!r}" for name in differ)
            raise ConfigError(f"{output} holds another run ({changes}); name another output, or remove it")
    elif output.exists() and any(path.name != checkpoints.LOCK for path in output.iterdir()):
        raise ConfigError(f"{output} is not empty and holds no config.yaml of a run; name another output")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def _align_data(config: TrainConfig) -> tuple[Path, Path | None]:
    if config.align_data:
        return Path(config.align_data), config.align_images
    if config.data not in GENERATED:
        raise ConfigError("projector alignment needs align_data (captions); give it, or align_steps 0 to skip it")
    return GENERATED[config.data](config.scenes) / "align.json", None


def _run(config: TrainConfig, phase: Phase, checkpoint: Path | None, progress: bool) -> None:
    """Train ``phase`` from ``checkpoint``, or from its model, to the end of its last stage."""
    set_seed(config.seed)
    output, scheme, total, aligning = phase.output, phase.scheme, phase.total_steps, phase.name == "align"
    if aligning and config.vision_tower is not None:
        model, processor = join(config.vision_tower, config.language_model)
    else:
        model, processor = load_model(phase.model, None if aligning else config.quantize)
    if aligning:
        model, processor = replace_projector(model, processor, config.projector)
    num_layers, num_tokens = len(find_parts(model).layers), _visual_tokens(model.config)
    set_trainable(model, phase.name, config.train_tower)
    if config.lora_rank and not aligning:
        base = Path(phase.model).resolve()  # the adapters may be loaded from elsewhere
        model = with_adapters(model, config, str(base) if base.exists() else phase.model)
    slow = any(stage.slow_every for stage in scheme.stages)
    if slow:
        add_isolator(model)
    size, accumulated = config.batches(phase.name, int(os.environ.get("WORLD_SIZE", 1)))
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        activation_checkpointing=config.gradient_checkpointing,
        max_steps=total,
        learning_rate=float(config.align_learning_rate if aligning else config.learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * total),
        weight_decay=config.weight_decay,
        bf16=config.bf16,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
        ddp_find_unused_parameters=True if slow else None,  # the mode isolator has no part in slow steps
        deepspeed=_engine_file(config.deepspeed),
        fsdp=True if config.fsdp else None,
        fsdp_config=_fsdp_config(config.fsdp, model) if config.fsdp else None,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    if config.fsdp and arguments.device.type == "cpu":
        # accelerate would leave FSDP out on a CPU, and say nothing; over gloo it works like on GPUs
        PartialState().distributed_type = DistributedType.MULTI_GPU
    collate = Collator(processor, config.max_length, always_picture=True)
    dataset = open_data(config, phase.data, phase.images, collate, progress)
    if phase.then and config.bad_entries == "fail":
        open_data(config, *phase.then, collate, progress)  # an error is told before hours of alignment
    if config.bad_entries == "skip":
        _record_skipped(output, dataset, progress)
    check_words(dataset.texts(), processor.tokenizer, dataset.file.name)
    asked = threading.Event()
    stages = StageCallback(scheme, phase.last, lambda: _on_any_process(trainer, asked))
    tuned = {PROJECTOR: config.projector_learning_rate, TOWER: config.tower_learning_rate}
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=processor,
        callbacks=[stages, MetricsCallback(output / "metrics.jsonl", scheme, num_layers, num_tokens)],
        scheme=scheme,
        rates={} if aligning else tuned,
        keep=config.keep_checkpoints,
    )
    for engine, wanted, on in (
        ("deepspeed", config.deepspeed, trainer.is_deepspeed_enabled),
        ("fsdp", config.fsdp, trainer.is_fsdp_enabled),
    ):
        if wanted and not on:
            raise ConfigError(f"{engine} {wanted!r} was asked for, but accelerate left it out; see its warnings above")
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl holds it all
    if checkpoint:
        _check_checkpoint(checkpoint, trainer, config)
        if slow:
            load_isolator(model, checkpoint)
    try:
        with on_sigterm(asked.set):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stages.release()
    step = trainer.state.global_step
    if step < phase.end:
        raise Stopped(f"SIGTERM stopped training after step {step}, saved as checkpoint-{step}; run again to go on")


@contextmanager
def on_sigterm(act: Callable[[], None]):
    """Call ``act`` at SIGTERM in place of ending the process; only the main thread of a process can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_any_process(trainer: Trainer, event: threading.Event) -> bool:
    """Whether ``event`` is set on any process; to be asked by all of them."""
    if trainer.args.world_size == 1:
        return event.is_set()
    if event.is_set():
        trainer.accelerator.set_trigger()
    return trainer.accelerator.check_trigger()


def _engine_file(name: str | None) -> str | None:
    """The configuration file of a DeepSpeed or FSDP engine: a name of ENGINES, or a file's own."""
    return str(ENGINES.get(name, name)) if name else None


def _fsdp_config(name: str, model) -> dict:
    """Trainer's fsdp_config: the file's, sharding layer by layer unless it says what to wrap.

    transformers' own list of LLaVA's layers names some that the model does not have, which accelerate refuses.
    """
    stacks = [part for part in unwrap(model).modules() if isinstance(part, torch.nn.ModuleList) and len(part)]
    layers = sorted({type(stack[0]).__name__ for stack in stacks})
    return {"transformer_layer_cls_to_wrap": layers} | json.loads(Path(_engine_file(name)).read_text(encoding="utf-8"))


def _finish(output: Path, checkpoint: Path) -> None:
    """Make the plain Hugging Face folder ``output`` of ``checkpoint``; adapters are merged, in full precision."""
    if not (checkpoint / "adapter_config.json").exists():
        checkpoints.export(checkpoint, output)
        return
    model, processor = load_model(str(checkpoint))
    with checkpoints.saving(output, "the model"):
        staging = output / checkpoints.STAGING
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging, save_original_format=False)
        processor.save_pretrained(staging)
        checkpoints.install(staging, checkpoint / checkpoints.RECORD, output)


def _check_checkpoint(checkpoint: Path, trainer: StageTrainer, config: TrainConfig) -> None:
    """Refuse to go on from a checkpoint of another scheme, batch, or partition of the optimizer."""
    held = json.loads((checkpoint / checkpoints.RECORD).read_text())
    scheme, total = trainer.scheme, trainer.args.max_steps
    if held["total_steps"] != total or held["stages"] != scheme.written:
        raise ConfigError(
            f"{checkpoint} belongs to scheme {held['scheme']!r} over {held['total_steps']} steps, this run is "
            f"{scheme.name!r} over {total}; name another output"
        )
    processes, now = held["processes"], trainer.args.world_size
    if held["examples_per_step"] != trainer.examples_per_step:
        raise ConfigError(
            f"{checkpoint} was trained on {held['examples_per_step']} examples a step in {processes} processes, "
            f"this run has {trainer.examples_per_step} in {now}; set global_batch or batch_size"
        )
    if (config.deepspeed or config.fsdp) and processes != now:
        raise ConfigError(
            f"{checkpoint} is in parts for {processes} processes, not {now}; use as many, or begin the next stages in "
            "another output, with this one's folder as the model"
        )


def summary(config: TrainConfig, setup: Setup, table, times) -> str:
    """A paragraph of Markdown: the stage's accuracy and the time that its compression saves.

    table: from evaluate.accuracy_table. times: from bench.step_times, with the scheme's stages.
    """
    overall = table.loc["overall"]
    ratio = dict(zip(times.plan, times.ratio, strict=True))
    stages = setup.scheme.stages
    last = len(stages) if config.stage is None else config.stage
    accuracy = (
        f"held-out accuracy after stage {last} of `{setup.scheme.name}`: **{overall.accuracy:.1%}** "
        f"(95% interval {overall.low:.1%} to {overall.high:.1%}, best constant answers {overall.constant:.1%})"
    )
    whole = sum(stage.share * ratio[str(stage)] for stage in stages)
    lines = [accuracy]
    if last:
        plan = str(stages[last - 1])
        lines.append(
            f"a step under this stage's plan `{plan}` takes **{1 - ratio[plan]:.0%}** less time than without it"
        )
    lines.append(f"the whole scheme takes **{1 - whole:.0%}** less training time than no compression")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def read_metrics(file: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl; none if it does not exist. A line cut off by a crash is left out."""
    rows = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _leave() -> None:
    """Close the process group, if there is one: gloo's threads abort a process that ends with them at work."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llavolta.train", description="Train a stage or a scheme.")
    parser.add_argument("config", help=f"YAML file of TrainConfig's parameters, or a preset: {', '.join(PRESETS)}")
    parser.add_argument("--stage", type=int, help="overrides the file's stage")
    parser.add_argument("--output", help="overrides the file's output")
    parser.add_argument("--num-processes", type=int, metavar="N", help="processes of this machine, by torchrun")
    parser.add_argument("--torchrun", default="", metavar="OPTIONS", help="its options for several machines")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="overrides any other parameter")
    options = parser.parse_args(arguments)
    try:
        changes = {key: getattr(options, key) for key in ("stage", "output") if getattr(options, key) is not None}
        for change in options.set:
            name, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(f"--set takes NAME=VALUE, not {change!r}")
            changes[name] = parse_yaml(value, f"--set {name}")
        if options.config in PRESETS:
            config = TrainConfig.from_preset(options.config, **changes)
        else:
            try:
                text = Path(options.config).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{options.config} is not UTF-8 text ({error})") from None
            values = parse_yaml(text, options.config)
            if not isinstance(values, dict):
                raise ConfigError(f"{options.config} must hold 'name: value' lines")
            config = TrainConfig.from_dict(values | changes)
        if options.num_processes and "WORLD_SIZE" in os.environ:  # under a launcher
            os.environ[WANTED_PROCESSES] = str(options.num_processes)
            train(config)
            _leave()
        elif options.num_processes or options.torchrun:
            from llavolta.launch import launch  # which stands on this module

            launch(config, options.num_processes or 1, options.torchrun)
        else:
            train(config)
            _leave()
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (UserError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
