"""Training by stages on transformers' Trainer: projector alignment, then instruction tuning under a scheme.

``python -m llavolta.train CONFIG.yaml`` runs what the 03 notebook runs. One run folder holds one run:

    config.yaml      the resolved configuration; another one is refused
    metrics.jsonl    one JSON object every few steps
    skipped.json     the entries left out, under bad_entries: skip
    align/           projector alignment (stage 0), a run folder of its own
    checkpoint-*/    where training can resume; one at the end of every stage (see llavolta.train.checkpoints)
    model.safetensors, config.json, ...   the model of the newest finished stage, a plain Hugging Face folder
    scheme.json      which stage that is

Stage i of a scheme is the run from the checkpoint at the end of stage i - 1 to the one at the end of stage i, so
stages trained one by one give the same weights as the whole scheme in one go.
"""

from __future__ import annotations

import ctypes
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llavolta.compression.families import find_parts, unwrap
from llavolta.data import Collator, check_words, token_statistics
from llavolta.errors import Stopped
from llavolta.quiet import quiet
from llavolta.train import checkpoints
from llavolta.train.build import (
    ALIGN,
    Setup,
    align_data,
    count_steps,
    open_data,
    prepare,
    record_skipped,
    say,
    visual_tokens,
)
from llavolta.train.callback import check_processes
from llavolta.train.card import CARD, write_card
from llavolta.train.config import ENGINES, ConfigError, TrainConfig, parse_yaml
from llavolta.train.dualspeed import add_isolator, holds_isolator, keep_isolator, load_isolator
from llavolta.train.models import (
    ADAPTERS,
    autocasts,
    load_model,
    load_to_adapt,
    save_plain,
    set_trainable,
    source_dtype,
)
from llavolta.train.projectors import replace_projector
from llavolta.train.schemes import Scheme
from llavolta.train.trainer import MetricsCallback, StageCallback, StageTrainer, StepBar
from llavolta.train.words import fit_to_words
from llavolta.worlds import model_path
from llavolta.worlds.joining import join

# What may differ between two calls on one run folder: how far to train, and how, not what.
_FREE = ("output", "stage", "num_workers", "log_steps", "save_steps", "keep_checkpoints")
WANTED_PROCESSES = "LLAVOLTA_PROCESSES"  # environment variable: so many must come up


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Run ``config`` up to its stage, doing only what its output folder does not hold yet. Returns that folder.

    Missing earlier stages, projector alignment among them, are trained first. Raises ConfigError, PlanError,
    DataError, SaveError, FloatingPointError, and Stopped at SIGTERM,
    SIGHUP or Ctrl-C; whatever was finished before stays.
    """
    output = Path(config.output)
    if (config.deepspeed or config.fsdp) and "RANK" not in os.environ:
        raise ConfigError(
            f"{config.deepspeed or config.fsdp} needs a launcher, also for one process: --num-processes 1, or launch()"
        )
    if not torch.cuda.is_available():
        _keep_freed_memory()
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed warns on import if it has to find out itself
    if config.deepspeed:  # it calls ninja, which pip puts beside this Python
        os.environ["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        )
    state = PartialState(cpu=not torch.cuda.is_available())
    wanted = int(os.environ.get(WANTED_PROCESSES, state.num_processes))
    if wanted != state.num_processes:
        raise ConfigError(
            f"{wanted} processes were asked for, but {state.num_processes} came up; launch with torchrun"
        )
    progress = progress and state.is_main_process
    with state.main_process_first():
        setup = prepare(config)
        if state.is_main_process:
            _check_folder(output, config, setup)  # before the lock, which leaves a file
    with checkpoints.lock(output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _claim(output, config, setup)
        return _train(config, setup, progress)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step. On a CPU each step frees and asks for gigabytes, and giving them
    back to the system in between, page by page, took half of the time of a step of ``nano``."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too


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
    then: tuple[Path, Path | None] | None = (
        None  # data and images that are trained on later, to be checked now
    )
    later: Scheme | None = None  # what they are trained by, to be tried now

    @property
    def end(self) -> int:
        """The optimizer step that ends stage ``last``."""
        return self.scheme.boundaries(self.total_steps)[self.last - 1]


def _train(config: TrainConfig, setup: Setup, progress: bool) -> Path:
    output, model, state = Path(config.output), config.model, PartialState()
    if config.aligns:
        align = output / ALIGN
        with state.main_process_first():
            data, images = align_data(config)
        stage = config.align_stage(setup.scheme)
        steps = max(1, round(stage.share * count_steps(config, "align", data, images)))
        scheme = Scheme(ALIGN, (replace(stage, share=1),))
        then = (setup.data, setup.images) if config.stage != 0 else None
        later = setup.scheme if then else None
        _bring(
            config,
            Phase("align", align, model, data, images, scheme, steps, 1, then, later),
            progress,
        )
        if config.stage == 0:
            if (
                state.is_main_process
                and checkpoints.finished(output, ALIGN, scheme.written, steps) < steps
            ):
                _finish(output, align, source_dtype(config))
            return output
        model = str(align)
    elif config.stage == 0:
        raise ConfigError(
            "stage 0 is projector alignment, which align_steps 0 skips; raise align_steps"
        )
    last = config.stage or len(setup.scheme.stages)
    phase = Phase(
        "instruct", output, model, setup.data, setup.images, setup.scheme, setup.total_steps, last
    )
    _bring(config, phase, progress)
    return output


def _bring(config: TrainConfig, phase: Phase, progress: bool) -> None:
    """Bring the phase's folder to the model at the end of its last stage, from what it holds already."""
    state, output, scheme = PartialState(), phase.output, phase.scheme
    held = checkpoint = None
    if state.is_main_process:
        checkpoints.clear(output)
        held = checkpoints.finished(output, scheme.name, scheme.written, phase.total_steps)
        if held < phase.end:
            checkpoint = checkpoints.newest(output, lambda text: say(text, True))
    held, checkpoint = broadcast_object_list([held, checkpoint])
    if held >= phase.end:
        if phase.name == "instruct":
            say(f"stage {phase.last} is trained already in {output.name}", progress)
        return
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    if done < phase.end:
        ends = scheme.boundaries(phase.total_steps)
        first = sum(done >= end for end in ends) + 1
        earlier = (
            f" (stages {first}..{phase.last - 1} are missing and come first)"
            if first < phase.last
            else ""
        )
        what = f"stage {phase.last} of {len(ends)}, plan {scheme.stages[phase.last - 1].plan}"
        what = what if phase.name == "instruct" else "stage 0, projector alignment"
        say(f"{what}: training{earlier}", progress)
        _run(config, phase, checkpoint, progress)
        unset_hf_deepspeed_config()  # under ZeRO-3 models would load in parts, one a process
    if state.is_main_process:
        checkpoint = output / f"{PREFIX_CHECKPOINT_DIR}-{phase.end}"
        # Before the model, which says that all is there: a kill in between must not lose them.
        if phase.name == ALIGN:  # whose isolator tuning starts from
            keep_isolator(checkpoint, output)
        else:
            write_card(output, config, scheme, phase.total_steps, phase.end)
        # What is only aligned is trained on, so it keeps what training computed.
        _finish(output, checkpoint, torch.float32 if phase.name == ALIGN else source_dtype(config))
    state.wait_for_everyone()  # the next phase loads what the main process has just written


def _claim(output: Path, config: TrainConfig, setup: Setup) -> None:
    """Write config.yaml into the folder, which must be locked. Raises ConfigError for another run's."""
    _check_folder(output, config, setup)  # again: another training may have been here meanwhile
    if not _has_trained(output):  # what a configuration that was refused has left out
        (output / "skipped.json").unlink(missing_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(_written(config, setup), sort_keys=False))


def _written(config: TrainConfig, setup: Setup) -> dict:
    return {**config.model_dump(), "resolved_stages": setup.scheme.written}


def _has_trained(output: Path) -> bool:
    """Whether a run folder holds more than the configuration of a run that never saved a step."""
    folders = (output, output / ALIGN)
    return any(
        (run / checkpoints.RECORD).exists() or any(run.glob("*checkpoint-*")) for run in folders
    )


def _check_folder(output: Path, config: TrainConfig, setup: Setup) -> None:
    """Refuse the folder of another run, unless that one has saved nothing. Raises ConfigError.

    max_steps and epochs are two ways to say how many steps a run has, which is what must be the same.
    """
    values, file = _written(config, setup), output / "config.yaml"
    if file.exists():
        fields = TrainConfig.model_fields
        defaults = {
            name: fields[name].get_default() for name in fields
        }  # of parameters younger than the run
        written = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), str(file))
        if not isinstance(written, dict) or not written:
            raise ConfigError(
                f"{file} holds no run's parameters; it is damaged: restore it, or name another output"
            )
        if "resolved_stages" in written and not _has_trained(output):
            return
        held = defaults | written
        differ = [
            name
            for name in values
            if name not in _FREE and name != "plan" and held.get(name) != values[name]
        ]
        if differ and {*differ} <= {"max_steps", "epochs"}:
            same = prepare(TrainConfig(**{name: held[name] for name in defaults})).total_steps
            differ = differ if same != setup.total_steps else []
        if differ:
            changes = ", ".join(f"{name} {held.get(name)!r} -> {values[name]!r}" for name in differ)
            raise ConfigError(
                f"{output} holds another run ({changes}); name another output, or remove it"
            )
    elif output.exists() and any(path.name != checkpoints.LOCK for path in output.iterdir()):
        raise ConfigError(
            f"{output} is not empty and holds no config.yaml of a run; name another output"
        )


def _run(config: TrainConfig, phase: Phase, checkpoint: Path | None, progress: bool) -> None:
    """Train ``phase`` from ``checkpoint``, or from its model, to the end of its last stage."""
    set_seed(config.seed)
    output, scheme, total, aligning = (
        phase.output,
        phase.scheme,
        phase.total_steps,
        phase.name == "align",
    )
    if aligning and config.vision_tower is not None:
        model, processor = join(model_path(config.vision_tower), model_path(config.language_model))
    elif aligning or not config.lora_rank:
        model, processor = load_model(phase.model)
    else:
        model, processor = load_to_adapt(phase.model, config)
    if aligning:
        model, processor = replace_projector(model, processor, config.projector)
    num_layers = len(find_parts(model).layers)
    if aligning or not config.lora_rank:
        set_trainable(model, phase.name, config.train_tower)
    slow, isolates = (
        any(getattr(s, of) for s in scheme.stages) for of in ("slow_every", "isolates")
    )
    if isolates:
        add_isolator(model)
        if not aligning and holds_isolator(phase.model):
            load_isolator(model, Path(phase.model))
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
        bf16=autocasts(config),
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
        ddp_find_unused_parameters=True
        if slow
        else None,  # the mode isolator has no part in slow steps
        deepspeed=_engine_file(config.deepspeed),
        fsdp=True if config.fsdp else None,
        fsdp_config=_fsdp_config(config.fsdp, model) if config.fsdp else None,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    check_processes(arguments)
    if config.fsdp and arguments.device.type == "cpu":
        # accelerate would leave FSDP out on a CPU, and say nothing; over gloo it works like on GPUs
        PartialState().distributed_type = DistributedType.MULTI_GPU
    collate = Collator(processor, config.max_length, always_picture=True)
    dataset = open_data(config, phase.data, phase.images, collate, progress)
    if phase.then and config.bad_entries == "fail":
        open_data(
            config, *phase.then, collate, progress
        )  # an error is told before hours of alignment
    if config.bad_entries == "skip":
        record_skipped(output, dataset, progress)
    check_words(dataset.texts(), processor.tokenizer, dataset.file.name)
    num_tokens = visual_tokens(model.config) or round(
        token_statistics(dataset, collate).visual_tokens
    )
    if aligning and config.align_words and checkpoint is None:
        named = fit_to_words(model, processor, dataset, config.align_words, config.seed, progress)
        say(
            f"projector fitted to words: {named:.0%} of unseen pictures' patches named right",
            progress,
        )
    asked: list[int] = []  # signals
    stages = StageCallback(
        scheme, phase.last, lambda: _on_any_process(trainer, bool(asked)), later=phase.later
    )
    tuned = {"projector": config.projector_learning_rate, "tower": config.tower_learning_rate}
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=processor,
        callbacks=[
            stages,
            MetricsCallback(output / "metrics.jsonl", scheme, num_layers, num_tokens),
        ],
        scheme=scheme,
        rates={} if aligning else tuned,
        keep=config.keep_checkpoints,
    )
    for engine, wanted, on in (
        ("deepspeed", config.deepspeed, trainer.is_deepspeed_enabled),
        ("fsdp", config.fsdp, trainer.is_fsdp_enabled),
    ):
        if wanted and not on:
            raise ConfigError(
                f"{engine} {wanted!r} was asked for, but accelerate left it out; see its warnings above"
            )
    for printing in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # metrics.jsonl holds it all
        trainer.remove_callback(printing)
    if progress:
        trainer.add_callback(StepBar)
    if checkpoint:
        _check_checkpoint(checkpoint, trainer, config)
        if isolates:
            load_isolator(model, checkpoint)
    with on_signals(asked.append):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < phase.end:
        name = signal.Signals(asked[0]).name if asked else "a signal to another process"
        raise Stopped(
            f"{name} stopped training after step {step}, saved as checkpoint-{step}; run again to go on",
            *asked[:1],
        )


@contextmanager
def on_signals(act: Callable[[int], None]):
    """Call ``act`` with the first Ctrl-C, SIGTERM or SIGHUP, in place of ending the process.

    Ctrl-C again raises KeyboardInterrupt at once. Within a second it is the same one: a terminal, a
    notebook and a launcher may each send it. Only the main thread can receive signals; elsewhere, as in
    a thread of a notebook, nothing changes. What is ignored, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, first = os.getpid(), []

    def receive(signum: int, frame) -> None:
        if os.getpid() != process:  # a data-loading process, which ends with this one
            return
        if not first:
            first.append(time.monotonic())
            act(signum)
        elif signum == signal.SIGINT and time.monotonic() > first[0] + 1:
            raise KeyboardInterrupt

    found = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {
        one: handler for one, handler in found.items() if handler not in (signal.SIG_IGN, None)
    }
    try:
        for one in before:
            signal.signal(one, receive)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _on_any_process(trainer: Trainer, here: bool) -> bool:
    """Whether ``here`` is true on any process; to be asked by all of them."""
    if trainer.args.world_size == 1:
        return here
    if here:
        trainer.accelerator.set_trigger()
    return trainer.accelerator.check_trigger()


def _engine_file(name: str | None) -> str | None:
    """The configuration file of a DeepSpeed or FSDP engine: a name of ENGINES, or a file's own."""
    return str(ENGINES.get(name, name)) if name else None


def _fsdp_config(name: str, model) -> dict:
    """Trainer's fsdp_config: the file's, sharding layer by layer unless it says what to wrap.

    transformers' own list of LLaVA's layers names some that the model does not have, which accelerate refuses.
    """
    stacks = [
        part
        for part in unwrap(model).modules()
        if isinstance(part, torch.nn.ModuleList) and len(part)
    ]
    layers = sorted({type(stack[0]).__name__ for stack in stacks})
    return {"transformer_layer_cls_to_wrap": layers} | json.loads(
        Path(_engine_file(name)).read_text(encoding="utf-8")
    )


@quiet()
def _finish(output: Path, source: Path, dtype: torch.dtype) -> None:
    """Make the plain Hugging Face folder ``output`` of a checkpoint or run, as ``save_pretrained`` writes it.

    Training computes and saves float32; adapters are merged in it, and then all weights become ``dtype``.
    """
    merges = (source / ADAPTERS).exists()
    model, processor = load_model(str(source), dtype=torch.float32 if merges else dtype)
    with checkpoints.saving(output, "the model"):
        staging = output / checkpoints.STAGING
        shutil.rmtree(staging, ignore_errors=True)
        save_plain(model.to(dtype), staging)
        processor.save_pretrained(staging)
        (staging / CARD).unlink(missing_ok=True)  # the run has its own
        checkpoints.install(staging, source / checkpoints.RECORD, output)


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


def summarise(config: TrainConfig, setup: Setup, table, times) -> str:
    """A paragraph of Markdown: the stage's accuracy and the time that its compression saves.

    table: from studies.statistics.accuracy_table. times: from bench.step_times, with the scheme's stages.
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
    lines.append(
        f"the whole scheme takes **{1 - whole:.0%}** less training time than no compression"
    )
    return "\n".join(f"- {line}" for line in lines) + "\n"
