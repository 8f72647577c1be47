"""DualSpeed's fast and slow training steps (arXiv 2602.03815), of a stage with ``slow_every``.

A fast step trains under the stage's plan, with the mode isolator before what is left of each picture: a few learnable
embeddings that tell the model which mode it is in. A slow step trains on all tokens, without the isolator, on the
cross-entropy plus the divergence from what the model itself answers in fast mode. Answering later is as in slow
steps, so the trained model is a plain one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llavolta.compression.families import find_parts, unwrap
from llavolta.compression.patch import Compression, compress
from llavolta.train.schemes import ISOLATOR, ISOLATOR_TOKENS, Stage


class ModeIsolator(nn.Module):
    """``tokens`` learnable embeddings of ``width``, which no state dict shows: the model's checkpoints stay plain."""

    def __init__(self, width: int, tokens: int = ISOLATOR_TOKENS):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, pictures: int) -> Tensor:
        """(I, P, C) for I ``pictures``."""
        return self.weight.repeat(pictures, 1, 1)

    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass


def add_isolator(model: nn.Module) -> ModeIsolator:
    """Give ``model`` a new mode isolator, which trains with it."""
    weight = find_parts(model).decoder.get_input_embeddings().weight
    width = getattr(weight, "ds_shape", weight.shape)[
        1
    ]  # ZeRO-3's shards have a shape of their own
    isolator = ModeIsolator(width).to(weight.device)
    setattr(unwrap(model), ISOLATOR, isolator)
    return isolator


@contextmanager
def isolator_for(model: nn.Module, stage: Stage) -> Iterator[None]:
    """``model`` with an isolator if ``stage`` needs one, be it a new one for the while."""
    lends = stage.isolates and not hasattr(unwrap(model), ISOLATOR)
    if lends:
        add_isolator(model)
    try:
        yield
    finally:
        if lends:
            delattr(unwrap(model), ISOLATOR)


def save_isolator(model: nn.Module, folder: Path, weight: Tensor | None = None) -> None:
    """Write the isolator of ``model`` to the checkpoint ``folder``; weight: its own, gathered, if it is sharded."""
    weight = getattr(unwrap(model), ISOLATOR).weight if weight is None else weight
    save_file({"weight": weight.detach().cpu().contiguous()}, folder / f"{ISOLATOR}.safetensors")


def load_isolator(model: nn.Module, folder: Path) -> None:
    """Set the isolator of ``model`` to the one in the checkpoint ``folder``."""
    held = load_file(folder / f"{ISOLATOR}.safetensors")["weight"]
    with torch.no_grad():
        getattr(unwrap(model), ISOLATOR).weight.copy_(held)


def holds_isolator(folder: str | Path) -> bool:
    return (Path(folder) / f"{ISOLATOR}.safetensors").exists()


def keep_isolator(checkpoint: Path, folder: Path) -> None:
    """Put the isolator of a ``checkpoint``, if it has one, beside the model that was made of it."""
    if holds_isolator(checkpoint):
        shutil.copyfile(checkpoint / f"{ISOLATOR}.safetensors", folder / f"{ISOLATOR}.safetensors")


def fast_mode(model: nn.Module, stage: Stage, labelled_only: bool = True) -> Compression:
    """``stage``'s plan in force, behind the mode isolator if it isolates; labelled_only: see compress."""
    prefix = getattr(unwrap(model), ISOLATOR) if stage.isolates else None
    return compress(model, stage.choices[0], labelled_only=labelled_only, prefix=prefix)


@contextmanager
def slow_mode(model: nn.Module, stage: Stage, batch: dict) -> Iterator[None]:
    """``model(**batch).loss`` on all tokens, plus the mean over labelled tokens of KL(fast mode || this mode).

    The fast mode answers first, without gradient. Temperature and weight are 1. The mean is over
    ``num_items_in_batch`` where the model is given that, as for the cross-entropy.
    """
    with torch.no_grad(), fast_mode(model, stage):
        fast = (
            model(**batch).logits[0, :-1].float().log_softmax(-1)
        )  # (M, vocabulary); see compress
    top = unwrap(model)
    cross_entropy, own = top.loss_function, vars(top).get("_loss_function")

    def loss(
        logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **options
    ) -> Tensor:
        slow = logits[0, :-1].float().log_softmax(-1)
        divergence = F.kl_div(slow, fast, reduction="sum", log_target=True)
        divergence = divergence / (len(fast) if num_items_in_batch is None else num_items_in_batch)
        return (
            cross_entropy(logits, labels, num_items_in_batch=num_items_in_batch, **options)
            + divergence
        )

    top.loss_function = loss
    try:
        with compress(model, "none", labelled_only=True):
            yield
    finally:
        del top._loss_function
        if own is not None:
            top.loss_function = own
