"""The Trainer of a run, and the callbacks that write its metrics and show its progress."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llavolta.compression.families import PIXELS, find_parts, unwrap
from llavolta.data import GroupedSampler
from llavolta.quiet import quiet
from llavolta.train import checkpoints
from llavolta.train.callback import StageCallback
from llavolta.train.dualspeed import save_isolator, slow_mode
from llavolta.train.models import parameter_groups
from llavolta.train.schemes import ISOLATOR, Scheme

__all__ = ["MetricsCallback", "StageCallback", "StageTrainer", "read_metrics"]


class MetricsCallback(TrainerCallback):
    """Appends a row to metrics.jsonl whenever the trainer logs a loss.

    A row has the step, stage, plan, loss, learning rate, gradient norm, visual tokens of an image
    and per layer, and the seconds per step since the last row.

    Args:
        file: The metrics.jsonl.
        scheme: The scheme, for the model's depth.
        num_layers: Decoder layers.
        num_tokens: Visual tokens of an image without compression.
    """

    def __init__(self, file: Path, scheme: Scheme, num_layers: int, num_tokens: int):
        self.file, self.scheme = file, scheme
        self.tokens = [stage.tokens_per_layer(num_layers, num_tokens) for stage in scheme.stages]
        self.visual_tokens = num_tokens
        self.seconds, self.steps, self.started = 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # A resumed run trains the steps after its checkpoint again.
        kept = [row for row in read_metrics(self.file) if row["step"] <= state.global_step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        # global_step counts the steps that are done, so the last one has this number less one.
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


class StepBar(ProgressCallback):
    """A progress bar of the steps, without the logs, which are in metrics.jsonl.

    Notebooks have it too, as transformers' own bar for them fails at the end of a stage of two
    steps.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class StageTrainer(Trainer):
    """Trainer of one phase of a run.

    It orders batches by modality and length, scales the learning rate by stage, and takes slow
    steps. Checkpoints are written in one step, and a loss that is not finite ends the training.

    Args:
        *args: As for Trainer.
        scheme: The scheme, for the model's depth.
        rates: Peak learning rates by role of a parameter ("projector", "tower"); None: the run's.
        keep: Checkpoints that are kept besides those at the ends of stages.
        **kwargs: As for Trainer.
    """

    def __init__(self, *args, scheme: Scheme, rates: dict[str, float | None], keep: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.scheme, self.rates, self.keep = scheme, rates, keep
        self.staging: Path | None = None  # where a checkpoint is being written
        # Modalities that the model reads: "image", "video".
        self.media = list(find_parts(unwrap(self.model)).visual_ids)

    def _get_output_dir(self, trial=None):
        return str(self.staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        # The folder is the staging folder during a save, by way of _get_output_dir. All processes
        # write to it, so they wait for one another before it is cleared, moved and used again.
        run, step = Path(self.args.output_dir), self.state.global_step
        name, barrier = f"{PREFIX_CHECKPOINT_DIR}-{step}", self.accelerator.wait_for_everyone
        self.staging = run / checkpoints.STAGING
        if self.args.should_save:
            shutil.rmtree(self.staging, ignore_errors=True)
        barrier()
        try:
            with checkpoints.saving(run, name):
                with quiet():
                    super()._save_checkpoint(model, trial)
                barrier()
                if self.args.should_save:
                    checkpoints.publish(self.staging / name, run / name)
                    ends = set(self.scheme.boundaries(self.state.max_steps))
                    checkpoints.prune(run, self.keep, ends)
        finally:
            self.staging = None
        barrier()

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        data = train_dataset if train_dataset is not None else self.train_dataset
        return GroupedSampler(data.lengths, data.medium, self.examples_per_step, self.args.seed)

    def create_optimizer(self, model=None):
        # Roles without a rate of their own have the run's; if all have, Trainer's groups do.
        model = self.model if model is None else model
        if self.optimizer is None and any(self.rates.values()):
            decayed = set(self.get_decay_parameter_names(unwrap(model)))
            groups = parameter_groups(model, self.args.weight_decay, decayed, self.rates)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if any(stage.warmup or stage.lr_scale != 1 for stage in self.scheme.stages):
            # Each parameter group's schedule, times the stage's multiplier. The scheduler asks for
            # one step beyond the last, which has no stage.
            total = num_training_steps
            rates = [
                lambda step, rate=rate: rate(step) * self.scheme.warmth(min(step, total - 1), total)
                for rate in scheduler.lr_lambdas
            ]
            self.lr_scheduler = scheduler = LambdaLR(scheduler.optimizer, rates)
        return scheduler

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.args.world_size == 1 or len(self.media) == 1:
            return inputs
        # The last batches of an epoch mix images, videos and text. If one process has images or
        # videos, all need some, so that all run the same parts of the model.
        # (modalities,) whether this batch has them
        held = torch.tensor(
            [int(PIXELS[name] in inputs) for name in self.media], device=self.args.device
        )
        anywhere = self.accelerator.reduce(held.clone())
        for name, here, there in zip(self.media, held.tolist(), anywhere.tolist(), strict=True):
            if there and not here:
                inputs = self.data_collator.with_black(inputs, name)
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        # StageCallback leaves slow steps to this method, as they run the model in two modes.
        step, total = self.state.global_step, self.state.max_steps
        stage = self.scheme.stages[self.scheme.stage_at(step, total)]
        with slow_mode(model, stage, inputs) if self.scheme.is_slow(step, total) else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            stage = self.scheme.stage_at(self.state.global_step, self.state.max_steps)
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} (stage "
                f"{stage + 1}, plan {self.scheme.stages[stage].plan}); nothing was saved over. "
                f"Lower learning_rate (now {self.args.learning_rate}) or check the data, and run "
                "again: training resumes at the last checkpoint"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict=None):
        model = unwrap(self.model)
        # ZeRO-3 gathers all weights into state_dict; the isolator's has a file of its own.
        sharded = [state_dict.pop(name) for name in list(state_dict or ()) if ISOLATOR in name]
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if hasattr(model, ISOLATOR) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            save_isolator(model, folder, *sharded)
        step, total = self.state.global_step, self.state.max_steps
        stages = self.scheme.written
        # The stage that trains the next step; at the end of the training, the last one.
        stage = self.scheme.stage_at(min(step, total - 1), total) + 1
        record = {
            "scheme": self.scheme.name,
            "stages": stages,
            "step": step,
            "total_steps": total,
            "next_stage": stage,
        }
        record |= {"examples_per_step": self.examples_per_step, "processes": self.args.world_size}
        (folder / checkpoints.RECORD).write_text(json.dumps(record, indent=1))

    @property
    def examples_per_step(self) -> int:
        """Examples of an optimizer step, over all processes."""
        return (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )


def read_metrics(file: str | Path) -> list[dict]:
    """Read a metrics.jsonl.

    Args:
        file: The file; it need not exist.

    Returns:
        Its rows. A line that was cut off by a crash is left out.
    """
    rows = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
