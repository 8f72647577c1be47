"""StageCallback: puts a scheme's plans in force in a Trainer's training steps, and only there."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llavolta.compression.families import PIXELS, is_compiled, unwrap
from llavolta.compression.patch import Compression
from llavolta.errors import ConfigError, UserError
from llavolta.train.dualspeed import fast_mode, isolator_for, slow_mode
from llavolta.train.models import spare_frozen_towers
from llavolta.train.schemes import ISOLATOR, Scheme, Stage


class StageCallback(TrainerCallback):
    """Trains each optimizer step under the plan of its stage, in Trainer or TRL's SFTTrainer.

    The plan is in force only inside of the trainer's ``training_step``. Evaluation, prediction and
    saving use the model without it, and so does the code that catches an error or Ctrl-C.

    Before the first step on images, every stage's plans run once on its batch without gradients, so
    that a plan that the model cannot run fails at once and not at its stage.

    Checkpoints are saved under the names that the trainer looks for when it resumes. If a
    checkpoint has other names, as Trainer's own checkpoints of LLaVA have, its weights are restored
    here.

    Args:
        scheme: The scheme, for the model's depth (``Scheme.scaled``).
        stop_after: The stage, from 1, after which training stops; None: the last one.
        stopping: Called after every step; training saves and stops if it returns True.
        labelled_only: As in ``compress``; False for trainers that compute from the logits, as TRL's
            do.
        later: The scheme of a later run, whose stages are tried on the first batch too.

    Raises:
        ConfigError: The trainer uses several GPUs in one process, compiles the model, or compares
            two passes (DPO, GRPO).
        ConfigError: The scheme needs this package's trainer, or the model cannot run a stage's
            plan.
    """

    def __init__(
        self,
        scheme: Scheme,
        stop_after: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
        labelled_only: bool = True,
        later: Scheme | None = None,
    ):
        self.scheme, self.stop_after, self.stopping, self.labelled_only = (
            scheme,
            stop_after,
            stopping,
            labelled_only,
        )
        self.later = later
        self.trainer: Trainer | None = None
        self.stage: Stage | None = None  # of the current step, with one plan; None in a slow step
        self._untried: list[tuple[str, Stage]] = []  # stages that have not run on a batch yet

    def on_init_end(self, args, state, control, **kwargs):
        check_trainer(_caller()[0])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trainer, variables = _caller()
        check_trainer(trainer)
        if any(stage.isolates for stage in self.scheme.stages) and not hasattr(
            unwrap(model), ISOLATOR
        ):
            raise ConfigError(
                f"scheme {self.scheme.name!r} trains a mode isolator; train it by python -m "
                "llavolta.train"
            )
        self.release()  # an earlier training may have ended with an error
        self.trainer = trainer
        self._untried = [
            (f"stage {number} of scheme {scheme.name!r}", stage)
            for scheme in (self.scheme, self.later)
            for number, stage in enumerate(scheme.stages if scheme else (), start=1)
        ]
        # Set on the instance: the class and other trainers keep their methods.
        trainer.training_step = self._training_step(trainer.training_step)
        trainer._save = _saving_as_resumed(trainer, trainer._save)
        spare_frozen_towers(model)
        if variables.get("resume_from_checkpoint"):
            restore_weights(trainer, Path(variables["resume_from_checkpoint"]))

    def on_step_begin(self, args, state, control, **kwargs):
        # A slow step sets two plans in turn, in StageTrainer.compute_loss.
        slow = self.scheme.is_slow(state.global_step, state.max_steps)
        stage = self.scheme.stages[self.scheme.stage_at(state.global_step, state.max_steps)]
        self.stage = None if slow else stage.drawn(state.global_step, args.seed)

    def on_step_end(self, args, state, control, **kwargs):
        ends = self.scheme.boundaries(state.max_steps)
        if state.global_step in ends:
            control.should_save = control.should_log = True
            if self.stop_after is not None and state.global_step >= ends[self.stop_after - 1]:
                control.should_training_stop = True
        if self.stopping():  # called on all processes at every step, as it may communicate
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.release()

    def release(self) -> None:
        """Give the trainer its own methods back. The end of training calls this."""
        if self.trainer is not None:
            for name in ("training_step", "_save"):
                vars(self.trainer).pop(name, None)
            self.trainer = None

    def _training_step(self, stock: Callable) -> Callable:
        """Wrap ``training_step``: check the batch, try the stages once, and compress."""

        @wraps(stock)
        def training_step(model, inputs, *args, **kwargs):
            check_shards(self.trainer, inputs)
            self._try_stages(model, inputs)
            with self._in_force():
                return stock(model, inputs, *args, **kwargs)

        return training_step

    def _in_force(self) -> Compression | nullcontext:
        """Return the context of the current step's plan; in a slow step compute_loss sets it."""
        if self.stage is None:
            return nullcontext()
        return fast_mode(self.trainer.model, self.stage, self.labelled_only)

    def _try_stages(self, model, inputs: dict) -> None:
        """Run every stage's plans on the first batch with images. Restore torch's random state."""
        trainer = self.trainer
        # All processes try, or none: sharded ones would wait for one another for ever.
        if not self._untried or not _processes_with_images(trainer, inputs):
            return
        untried, self._untried = self._untried, []
        model.train()  # as the training step will do
        inputs, device = trainer._prepare_inputs(inputs), trainer.args.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):
            for where, stage in untried:
                with _naming(f"{where}, plan {stage.plan}"), isolator_for(trainer.model, stage):
                    for drawn in stage.fixed():
                        with fast_mode(trainer.model, drawn, self.labelled_only):
                            model(**inputs)
                    if stage.slow_every:
                        with slow_mode(model, stage, inputs):
                            model(**inputs)


def check_trainer(trainer: Trainer) -> None:
    """Raise ConfigError for a trainer in whose training steps no plan can be in force."""
    check_processes(trainer.args)
    if trainer.args.torch_compile or (trainer.model is not None and is_compiled(trainer.model)):
        raise ConfigError(
            "the model would be compiled anew in every step, as plans come and go; leave "
            "torch.compile out of training"
        )
    # The classes of TRL among the trainer's ancestors, the nearest first.
    of_trl = [
        kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"
    ]
    if of_trl and of_trl[0] != "SFTTrainer" or hasattr(trainer, "ref_model"):
        raise ConfigError(
            f"{(of_trl or [type(trainer).__name__])[0]} compares passes of a policy with other "
            "ones (a reference model's, or of generation), which see all visual tokens; "
            "StageCallback serves Trainer and SFTTrainer"
        )


def check_processes(args) -> None:
    """Raise ConfigError if transformers would spread a batch over several GPUs of one process."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process has {args.n_gpu} GPUs, over which DataParallel would copy the model "
            "without its plan and multiply the batch; start one process a GPU (python -m "
            f"llavolta.train ... --num-processes {args.n_gpu}, or torchrun), or give it one GPU by "
            "CUDA_VISIBLE_DEVICES=0"
        )


def check_shards(trainer: Trainer, inputs: dict) -> None:
    """Raise ConfigError if processes that share the tower's weights would wait for ever.

    Under ZeRO-3 and FSDP all processes must run the vision tower, or none of them.
    """
    processes = trainer.args.world_size
    if processes == 1 or not (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        return
    if 0 < (found := _processes_with_images(trainer, inputs)) < processes:
        raise ConfigError(
            f"{found} of {processes} processes have images in this batch, and the others none: "
            "they share the vision tower's weights (ZeRO-3 or FSDP), and would wait for one "
            "another for ever; put an image in every batch, use ZeRO-2, or train by python -m "
            "llavolta.train"
        )


def restore_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint whose weights have other names than the model's.

    Trainer saves LLaVA under the names of older versions. When it resumes, it loads none of these
    weights, and only warns.

    Raises:
        ConfigError: The checkpoint lacks weights of the model.
    """
    model, names = trainer.model, _weight_names(checkpoint)
    if (
        not names
        or not isinstance(model, PreTrainedModel)
        or trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
    ):
        return  # adapters, and the engines' own formats, are restored as they are
    state = model.state_dict(keep_vars=True)
    # By memory address, as a tied weight is restored with the one that is saved.
    restored = {tensor.data_ptr() for name, tensor in state.items() if name in names}
    if all(tensor.data_ptr() in restored for tensor in state.values() if tensor.requires_grad):
        return
    loaded, report = type(model).from_pretrained(
        checkpoint, dtype=model.dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ConfigError(
            f"{checkpoint} lacks weights of the model, such as "
            f"{sorted(report['missing_keys'])[0]}; train from the beginning, or resume another "
            "checkpoint"
        )
    model.load_state_dict(loaded.state_dict())


def _weight_names(checkpoint: Path) -> set[str]:
    """Return the weight names in a checkpoint's safetensors files; empty if it has none."""
    index, file = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not file.exists():
        return set()
    with safe_open(file, "pt") as weights:
        return set(weights.keys())


def _saving_as_resumed(trainer: Trainer, stock: Callable) -> Callable:
    """Wrap ``Trainer._save`` to save weights under their names in memory, which resuming needs."""

    @wraps(stock)
    def _save(*args, **kwargs):
        model = unwrap(trainer.model)
        save = model.save_pretrained
        try:
            model.save_pretrained = lambda *args, **kwargs: save(
                *args, **{**kwargs, "save_original_format": False}
            )
            return stock(*args, **kwargs)
        finally:
            del model.save_pretrained  # the class's own is in force again

    return _save


def _caller() -> tuple[Trainer, dict]:
    """Return the trainer of the current event, and the local variables of its method."""
    # Trainer hands callbacks the model, data loaders and more, but not itself.
    for frame, _ in traceback.walk_stack(None):
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer, frame.f_locals
    raise ConfigError(
        "StageCallback works in transformers' Trainer; elsewhere, use compress() around each step"
    )


def _processes_with_images(trainer: Trainer, inputs: dict) -> int:
    """Count the processes whose batch has images or videos."""
    here = torch.tensor(
        int(any(key in inputs for key in PIXELS.values())), device=trainer.args.device
    )
    return int(trainer.accelerator.reduce(here))


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn errors into one line that begins with ``where``. A lack of memory passes unchanged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{where} cannot run on this model ({type(error).__name__}: {error})"
        ) from error
