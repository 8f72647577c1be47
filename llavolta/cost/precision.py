"""A training step in float32, under autocast to bfloat16, and on bfloat16 weights with a float32 master copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from llavolta.compression.patch import compress
from llavolta.cost.bench import interleaved
from llavolta.train.models import set_trainable

FULL, AUTOCAST, MASTER = "float32", "autocast", "bfloat16 weights, float32 master"


def _step(model, batch: dict, autocast: bool) -> torch.Tensor:
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=autocast),
        compress(model, "none", labelled_only=True),
    ):
        loss = model(**batch).loss
    loss.backward()
    return loss


def _whole_step(model, batch: dict, autocast: bool) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> float:
        loss = _step(model, batch, autocast)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _master_step(model, batch: dict) -> Callable[[], float]:
    """The optimizer works on a float32 copy, which the weights are rounded from after every step."""
    held = [p for p in model.parameters() if p.requires_grad]
    masters = [torch.nn.Parameter(p.detach().float()) for p in held]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=0.0)
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}

    def step() -> float:
        loss = _step(model, batch, autocast=False)
        for weight, master in zip(held, masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(held, masters, strict=True):
                weight.copy_(master)
        return loss.item()

    return step


def precision_times(model, batch: dict, rounds: int = 3, progress: bool = True) -> pd.DataFrame:
    """Seconds of a training step (forward, backward, AdamW; all but the tower trains) of each kind, interleaved.

    Returns a row per kind: seconds (median), ratio (median over rounds of its time over that of float32 in the same
    round), loss. The learning rate is 0, so that all kinds compute the same.
    """
    set_trainable(model.train(), "instruct")
    steps = {
        FULL: _whole_step(model, batch, autocast=False),
        AUTOCAST: _whole_step(model, batch, autocast=True),
        MASTER: _master_step(copy.deepcopy(model), batch),
    }
    losses: dict[str, float] = {}
    tasks = {name: lambda name=name, step=step: losses.__setitem__(name, step()) for name, step in steps.items()}
    seconds = interleaved(tasks, rounds, model.device, progress)
    rows = [
        dict(kind=name, seconds=np.median(column), ratio=np.median(column / seconds[:, 0]), loss=losses[name])
        for name, column in zip(steps, seconds.T, strict=True)
    ]
    return pd.DataFrame(rows)
