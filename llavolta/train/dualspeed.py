"""DualSpeed's fast and slow training steps (arXiv 2602.03815), for stages with ``slow_every``.

A fast step trains under the stage's plan. The mode isolator, a few learnable embeddings, stands
before the remaining tokens of each image and tells the model that it is in fast mode. A slow step
trains on all tokens without the isolator. Its loss is the cross-entropy plus the divergence from
the model's own predictions in fast mode. The trained model is used as in slow steps, so it is a
plain one.
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
    """Learnable embeddings that mark the fast mode.

    They are in no state dict, so the model's checkpoints stay those of a plain model.

    Args:
        width: Channels C of the decoder.
        tokens: Number of embeddings P.
    """

    def __init__(self, width: int, tokens: int = ISOLATOR_TOKENS):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, pictures: int) -> Tensor:
        """Return the embeddings (I, P, C) that stand before I images."""
        return self.weight.repeat(pictures, 1, 1)

    # State dicts leave the weight out; save_isolator and load_isolator have a file for it.
    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass


def add_isolator(model: nn.Module) -> ModeIsolator:
    """Give a model, wrapped or not, a new mode isolator, which trains with it."""
    weight = find_parts(model).decoder.get_input_embeddings().weight
    # ZeRO-3 leaves an empty weight on each process, and its full shape in ds_shape.
    width = getattr(weight, "ds_shape", weight.shape)[1]
    isolator = ModeIsolator(width).to(weight.device)
    setattr(unwrap(model), ISOLATOR, isolator)
    return isolator


@contextmanager
def isolator_for(model: nn.Module, stage: Stage) -> Iterator[None]:
    """Give a model an isolator inside of the block, if the stage needs one and there is none."""
    lends = stage.isolates and not hasattr(unwrap(model), ISOLATOR)
    if lends:
        add_isolator(model)
    try:
        yield
    finally:
        if lends:
            delattr(unwrap(model), ISOLATOR)


def save_isolator(model: nn.Module, folder: Path, weight: Tensor | None = None) -> None:
    """Write the isolator of a model to the checkpoint ``folder``.

    If the model's own weight is sharded, ``weight`` (P, C) is the gathered one.
    """
    weight = getattr(unwrap(model), ISOLATOR).weight if weight is None else weight
    save_file({"weight": weight.detach().cpu().contiguous()}, folder / f"{ISOLATOR}.safetensors")


def load_isolator(model: nn.Module, folder: Path) -> None:
    """Set the isolator of a model to the one in the checkpoint ``folder``."""
    held = load_file(folder / f"{ISOLATOR}.safetensors")["weight"]
    with torch.no_grad():
        getattr(unwrap(model), ISOLATOR).weight.copy_(held)


def holds_isolator(folder: str | Path) -> bool:
    """Return whether a folder has an isolator."""
    return (Path(folder) / f"{ISOLATOR}.safetensors").exists()


def keep_isolator(checkpoint: Path, folder: Path) -> None:
    """Copy the isolator of a checkpoint, if it has one, to the folder of the model made from it."""
    if holds_isolator(checkpoint):
        shutil.copyfile(checkpoint / f"{ISOLATOR}.safetensors", folder / f"{ISOLATOR}.safetensors")


def fast_mode(model: nn.Module, stage: Stage, labelled_only: bool = True) -> Compression:
    """Compress a model by a stage's plan, with the mode isolator if the stage trains it.

    Args:
        model: The model, wrapped or not.
        stage: The stage, with one plan.
        labelled_only: As in ``compress``.
    """
    prefix = getattr(unwrap(model), ISOLATOR) if stage.isolates else None
    return compress(model, stage.choices[0], labelled_only=labelled_only, prefix=prefix)


@contextmanager
def slow_mode(model: nn.Module, stage: Stage, batch: dict) -> Iterator[None]:
    """Train on all tokens inside of the block, with the divergence from the fast mode in the loss.

    ``model(**batch).loss`` is then the cross-entropy plus the mean over labelled tokens of KL(fast
    mode || this mode), at temperature and weight 1. The fast mode runs first, without gradients.
    The mean is over ``num_items_in_batch`` if the model is given that, as for the cross-entropy.
    """
    with torch.no_grad(), fast_mode(model, stage):
        # (1, M + 1, vocabulary) of M labelled tokens -> (M, vocabulary); see compress
        fast = model(**batch).logits[0, :-1].float().log_softmax(-1)
    top = unwrap(model)
    cross_entropy, own = top.loss_function, vars(top).get("_loss_function")

    def loss(
        logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **options
    ) -> Tensor:
        slow = logits[0, :-1].float().log_softmax(-1)  # (M, vocabulary)
        divergence = F.kl_div(slow, fast, reduction="sum", log_target=True)
        divergence = divergence / (len(fast) if num_items_in_batch is None else num_items_in_batch)
        return (
            cross_entropy(logits, labels, num_items_in_batch=num_items_in_batch, **options)
            + divergence
        )

    # A property whose setter writes _loss_function; the original is restored below.
    top.loss_function = loss
    try:
        # "none" removes no token, but gives the same M + 1 rows of logits.
        with compress(model, "none", labelled_only=True):
            yield
    finally:
        del top._loss_function
        if own is not None:
            top.loss_function = own
