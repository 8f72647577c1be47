"""Timing, side by side in one process: each plan in turn on the same batches, medians, ratios to no compression."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from llavolta.cost import step_cost
from llavolta.patch import IGNORED, compress
from llavolta.train import set_trainable


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_times(
    model,
    batches: Sequence[dict],
    plans: Sequence[str],
    rounds: int = 5,
    phase: str = "instruct",
    progress: bool = True,
) -> pd.DataFrame:
    """Seconds of a training step (forward, backward, AdamW) under each plan, interleaved on the same ``batches``.

    The model is copied, so its weights stay. Returns one row per plan: seconds (median), ratio (the median over
    rounds of this plan's time over that of "none" in the same round), flops_ratio (what the FLOPs promise).
    """
    plans = list(dict.fromkeys(["none", *plans]))
    model = copy.deepcopy(model).train()
    set_trainable(model, phase)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    device = next(model.parameters()).device
    seconds = np.zeros((rounds + 1, len(plans)))
    for turn in tqdm(range(rounds + 1), desc="timing steps", disable=not progress, leave=False):
        for column in np.random.default_rng(turn).permutation(len(plans)):
            with compress(model, plans[column], labelled_only=True):
                start = _now(device)
                for batch in batches:
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                seconds[turn, column] = (_now(device) - start) / len(batches)
    seconds = seconds[1:]  # the first round warms up
    text, images, labelled = _sizes(model, batches)
    flops = [step_cost(model.config, plan, text, images, labelled, phase).total for plan in plans]
    base = plans.index("none")
    return pd.DataFrame(
        {
            "plan": plans,
            "seconds": np.median(seconds, axis=0),
            "ratio": np.median(seconds / seconds[:, [base]], axis=0),
            "flops_ratio": np.array(flops) / flops[base],
        }
    )


def _sizes(model, batches) -> tuple[float, float, float]:
    """Text tokens, images and labelled rows per example, means over the batches."""
    examples = sum(len(batch["input_ids"]) for batch in batches)
    images = sum(len(batch.get("pixel_values", ())) for batch in batches)
    rows = sum(batch["input_ids"].numel() for batch in batches)
    visual = sum((batch["input_ids"] == model.config.image_token_id).sum().item() for batch in batches)
    labelled = sum((batch["labels"] != IGNORED).sum().item() for batch in batches)
    return (rows - visual) / examples, images / examples, labelled / examples
