"""Training by stages with transformers' Trainer: projector alignment, then instruction tuning.

``python -m llavolta.train CONFIG.yaml`` and notebook 03 both call ``train``. A run folder holds one
run:

    config.yaml      the resolved configuration; a different one is an error
    metrics.jsonl    one JSON object every few steps
    skipped.json     the entries that are left out, with bad_entries: skip
    align/           projector alignment (stage 0), a run folder of its own
    checkpoint-*/    where training can resume; one at the end of every stage (see
    train.checkpoints)
    model.safetensors, config.json, ...   the model of the newest finished stage, in plain form
    scheme.json      which stage that is

Stage i of a scheme is trained from the checkpoint at the end of stage i - 1 to the one at its own
end. So stages that are trained one by one give the same weights as the whole scheme at once.
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
from llavolta.errors import ConfigError, Stopped
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
from llavolta.train.config import ENGINES, TrainConfig, parse_yaml
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

# Parameters that may differ between two calls on one run folder. They do not change the weights.
_FREE = ("output", "stage", "num_workers", "log_steps", "save_steps", "keep_checkpoints")
WANTED_PROCESSES = "LLAVOLTA_PROCESSES"  # environment variable: how many processes must start


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Train up to the configuration's stage. What the run folder has already is not trained again.

    Earlier stages that are missing, and projector alignment, are trained first. What was finished
    before an error or a signal stays.

    Args:
        config: The configuration of the run.
        progress: Whether to print messages and show progress bars, on the main process.

    Returns:
        The run folder.

    Raises:
        ConfigError: The configuration, the model, the launch or the run folder is wrong.
        PlanError: A plan does not fit the model.
        ConfigError: The scheme does not fit, or the model cannot run a stage's plan.
        DataError: The data cannot be used.
        SaveError: A checkpoint or the model cannot be written.
        FloatingPointError: The loss is not finite.
        Stopped: SIGTERM, SIGHUP or Ctrl-C stopped the training after a step, which was saved.
    """
    output = Path(config.output)
    if (config.deepspeed or config.fsdp) and "RANK" not in os.environ:
        raise ConfigError(
            f"{config.deepspeed or config.fsdp} needs a launcher, also for one process: "
            "--num-processes 1, or launch()"
        )
    if not torch.cuda.is_available():
        _keep_freed_memory()
        # DeepSpeed warns on import if it has to find out itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.deepspeed:  # it starts ninja, which pip installs beside this Python
        os.environ["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        )
    state = PartialState(cpu=not torch.cuda.is_available())
    wanted = int(os.environ.get(WANTED_PROCESSES, state.num_processes))
    if wanted != state.num_processes:
        raise ConfigError(
            f"{wanted} processes were asked for, but {state.num_processes} came up; launch with "
            "torchrun"
        )
    progress = progress and state.is_main_process
    with state.main_process_first():
        setup = prepare(config)
        if state.is_main_process:
            # Before the lock, whose file would be left in a folder of something else.
            _check_folder(output, config, setup)
    with checkpoints.lock(output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _claim(output, config, setup)
        return _train(config, setup, progress)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, in place of giving it back to the system.

    On a CPU each step frees gigabytes and asks for them again. Without this it took half of the
    time of a step of ``nano``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap as well


@dataclass(frozen=True)
class Phase:
    """Projector alignment or instruction tuning: what is trained on what, where, and how far.

    Attributes:
        name: "align" or "instruct".
        output: The phase's run folder.
        model: Folder or name of the model that it starts from.
        data: The data file.
        images: Its image folder.
        scheme: The scheme, for the model's depth.
        total_steps: Optimizer steps of the whole scheme.
        last: The stage, from 1, at whose end the phase ends.
        then: Data file and image folder of the phase after this one, which are checked before this
            one trains.
        later: The scheme of the phase after this one, whose stages are tried before this one
            trains.
    """

    name: str
    output: Path
    model: str
    data: Path
    images: Path | None
    scheme: Scheme
    total_steps: int
    last: int
    then: tuple[Path, Path | None] | None = None
    later: Scheme | None = None

    @property
    def end(self) -> int:
        """The optimizer step at which stage ``last`` ends."""
        return self.scheme.boundaries(self.total_steps)[self.last - 1]


def _train(config: TrainConfig, setup: Setup, progress: bool) -> Path:
    """Train the phases that the configuration's stage needs, alignment first."""
    output, model, state = Path(config.output), config.model, PartialState()
    if config.aligns:
        align = output / ALIGN
        with state.main_process_first():
            data, images = align_data(config)
        stage = config.align_stage(setup.scheme)
        steps = max(1, round(stage.share * count_steps(config, "align", data, images)))
        scheme = Scheme(ALIGN, (replace(stage, share=1),))  # its share is in ``steps``
        then = (setup.data, setup.images) if config.stage != 0 else None
        later = setup.scheme if then else None
        _bring(
            config,
            Phase("align", align, model, data, images, scheme, steps, 1, then, later),
            progress,
        )
        if config.stage == 0:  # the run folder has the aligned model as well
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
    """Train a phase from what its folder has to the end of its last stage, and make the model."""
    state, output, scheme = PartialState(), phase.output, phase.scheme
    # The main process looks at the folder, so that all processes go on from the same step.
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
        # With it, transformers would load the next models in shards, one per process.
        unset_hf_deepspeed_config()
    if state.is_main_process:
        checkpoint = output / f"{PREFIX_CHECKPOINT_DIR}-{phase.end}"
        # Before the model: once that is there, a run that was killed would not write these again.
        if phase.name == ALIGN:  # tuning starts from alignment's isolator
            keep_isolator(checkpoint, output)
        else:
            write_card(output, config, scheme, phase.total_steps, phase.end)
        # Tuning goes on from the aligned model, which stays in the precision that was trained.
        _finish(output, checkpoint, torch.float32 if phase.name == ALIGN else source_dtype(config))
    state.wait_for_everyone()  # the next phase loads what the main process has just written


def _claim(output: Path, config: TrainConfig, setup: Setup) -> None:
    """Write config.yaml into the locked run folder. Raise ConfigError if another run is in it."""
    _check_folder(output, config, setup)  # again, as another training may have begun meanwhile
    if not _has_trained(output):  # written by another configuration, which failed
        (output / "skipped.json").unlink(missing_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(_written(config, setup), sort_keys=False))


def _written(config: TrainConfig, setup: Setup) -> dict:
    """Return what config.yaml has: the configuration, and the scheme for the model's depth."""
    return {**config.model_dump(), "resolved_stages": setup.scheme.written}


def _has_trained(output: Path) -> bool:
    """Return whether a run folder has a checkpoint or a model."""
    folders = (output, output / ALIGN)
    return any(
        (run / checkpoints.RECORD).exists() or any(run.glob("*checkpoint-*")) for run in folders
    )


def _check_folder(output: Path, config: TrainConfig, setup: Setup) -> None:
    """Raise ConfigError if a folder has another run, unless that one has saved nothing yet.

    max_steps and epochs may differ if they come to the same number of steps.
    """
    values, file = _written(config, setup), output / "config.yaml"
    if file.exists():
        fields = TrainConfig.model_fields
        # For parameters that did not exist when the run began.
        defaults = {name: fields[name].get_default() for name in fields}
        written = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), str(file))
        if not isinstance(written, dict) or not written:
            raise ConfigError(
                f"{file} holds no run's parameters; it is damaged: restore it, or name another "
                "output"
            )
        if "resolved_stages" in written and not _has_trained(output):
            return
        held = defaults | written
        differ = [
            name
            for name in values
            if name not in _FREE and name != "plan" and held.get(name) != values[name]
        ]
        # Two ways to set the number of steps, which is all that must be the same.
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
    """Train a phase from ``checkpoint``, or from its model, to the end of its last stage."""
    # The model, and what of it trains.
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
    num_layers = len(find_parts(model).layers)  # with adapters, PEFT has chosen what trains
    if aligning or not config.lora_rank:
        set_trainable(model, phase.name, config.train_tower)
    slow, isolates = (
        any(getattr(s, of) for s in scheme.stages) for of in ("slow_every", "isolates")
    )
    if isolates:
        add_isolator(model)
        if not aligning and holds_isolator(phase.model):
            load_isolator(model, Path(phase.model))
    # Trainer's arguments.
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
        logging_nan_inf_filter=False,  # show a loss that is not finite
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,  # a LlavaData has examples, and no columns
        report_to="none",
        disable_tqdm=not progress,
        # Slow steps do not use the mode isolator.
        ddp_find_unused_parameters=True if slow else None,
        deepspeed=_engine_file(config.deepspeed),
        fsdp=True if config.fsdp else None,
        fsdp_config=_fsdp_config(config.fsdp, model) if config.fsdp else None,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    check_processes(arguments)
    if config.fsdp and arguments.device.type == "cpu":
        # On a CPU accelerate would leave FSDP out without a message. Over gloo it works as on GPUs.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    # The data.
    collate = Collator(processor, config.max_length, always_picture=True)
    dataset = open_data(config, phase.data, phase.images, collate, progress)
    if phase.then and config.bad_entries == "fail":
        # An error in these data is found now, and not after hours of alignment.
        open_data(config, *phase.then, collate, progress)
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
    # The trainer.
    asked: list[int] = []  # signals that were received
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
                f"{engine} {wanted!r} was asked for, but accelerate left it out; see its warnings "
                "above"
            )
    for printing in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # metrics.jsonl has the logs
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
            f"{name} stopped training after step {step}, saved as checkpoint-{step}; run again to "
            "go on",
            *asked[:1],
        )


@contextmanager
def on_signals(act: Callable[[int], None]):
    """Call ``act`` with the first Ctrl-C, SIGTERM or SIGHUP, in place of ending the process.

    A second Ctrl-C raises KeyboardInterrupt. Within a second it counts as the first one, because a
    terminal, a notebook and a launcher may each send it. Only the main thread can receive signals:
    in another one, such as a notebook's thread, nothing changes. Signals that are ignored, as under
    nohup, stay ignored.

    Args:
        act: Called with the number of the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, first = os.getpid(), []

    def receive(signum: int, frame) -> None:
        if os.getpid() != process:  # a data-loading process; it ends with this one
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
    """Return whether ``here`` is true on any process. All processes must call this."""
    if trainer.args.world_size == 1:
        return here
    if here:
        trainer.accelerator.set_trigger()
    return trainer.accelerator.check_trigger()


def _engine_file(name: str | None) -> str | None:
    """Return the file of a DeepSpeed or FSDP configuration: a path, or a name of ENGINES."""
    return str(ENGINES.get(name, name)) if name else None


def _fsdp_config(name: str, model) -> dict:
    """Return Trainer's fsdp_config: the file's, which shards layer by layer unless it says else."""
    # transformers' own list has layers that a LLaVA lacks, and accelerate raises for these.
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
    """Make a plain Hugging Face folder of the model in a checkpoint or run.

    Training computes and saves float32. Adapters are merged in float32, and then all weights become
    ``dtype``.
    """
    merges = (source / ADAPTERS).exists()
    model, processor = load_model(str(source), dtype=torch.float32 if merges else dtype)
    with checkpoints.saving(output, "the model"):
        staging = output / checkpoints.STAGING
        shutil.rmtree(staging, ignore_errors=True)
        save_plain(model.to(dtype), staging)
        processor.save_pretrained(staging)
        (staging / CARD).unlink(missing_ok=True)  # the run has its own model card
        checkpoints.install(staging, source / checkpoints.RECORD, output)


def _check_checkpoint(checkpoint: Path, trainer: StageTrainer, config: TrainConfig) -> None:
    """Raise ConfigError for a checkpoint of another scheme, batch or number of shards."""
    held = json.loads((checkpoint / checkpoints.RECORD).read_text())
    scheme, total = trainer.scheme, trainer.args.max_steps
    if held["total_steps"] != total or held["stages"] != scheme.written:
        raise ConfigError(
            f"{checkpoint} belongs to scheme {held['scheme']!r} over {held['total_steps']} steps, "
            f"this run is {scheme.name!r} over {total}; name another output"
        )
    processes, now = held["processes"], trainer.args.world_size
    if held["examples_per_step"] != trainer.examples_per_step:
        raise ConfigError(
            f"{checkpoint} was trained on {held['examples_per_step']} examples a step in "
            f"{processes} processes, this run has {trainer.examples_per_step} in {now}; set "
            "global_batch or batch_size"
        )
    if (config.deepspeed or config.fsdp) and processes != now:
        raise ConfigError(
            f"{checkpoint} is in parts for {processes} processes, not {now}; use as many, or begin "
            "the next stages in another output, with this one's folder as the model"
        )


def summarise(config: TrainConfig, setup: Setup, table, times) -> str:
    """Describe in Markdown a stage's accuracy and the time that its compression saves.

    Args:
        config: The configuration of the run.
        setup: Its resolved values.
        table: The table of ``studies.statistics.accuracy_table``.
        times: The table of ``cost.bench.step_times``, with the scheme's stages.

    Returns:
        A list of two or three items.
    """
    overall = table.loc["overall"]
    ratio = dict(zip(times.plan, times.ratio, strict=True))
    stages = setup.scheme.stages
    last = len(stages) if config.stage is None else config.stage
    accuracy = (
        f"held-out accuracy after stage {last} of `{setup.scheme.name}`: "
        f"**{overall.accuracy:.1%}** (95% interval {overall.low:.1%} to {overall.high:.1%}, best "
        f"constant answers {overall.constant:.1%})"
    )
    # Step time of the scheme, as a share of a scheme without compression.
    whole = sum(stage.share * ratio[str(stage)] for stage in stages)
    lines = [accuracy]
    if last:
        plan = str(stages[last - 1])
        lines.append(
            f"a step under this stage's plan `{plan}` takes **{1 - ratio[plan]:.0%}** less time "
            "than without it"
        )
    lines.append(
        f"the whole scheme takes **{1 - whole:.0%}** less training time than no compression"
    )
    return "\n".join(f"- {line}" for line in lines) + "\n"
