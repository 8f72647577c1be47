"""Time training steps and prefills under several plans, side by side in one process.

Each plan runs in turn on the same batches. Results are medians, and ratios to no compression.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from llavolta.compression.families import find_parts, unwrap
from llavolta.compression.labelled import IGNORED
from llavolta.compression.masks import cache_bytes
from llavolta.compression.patch import compress
from llavolta.cost.flops import cost_model, of_tower
from llavolta.cost.planner import fit_speed
from llavolta.data import Collator, LlavaData
from llavolta.train.build import visual_tokens
from llavolta.train.config import TrainConfig
from llavolta.train.dualspeed import add_isolator, fast_mode, slow_mode
from llavolta.train.models import autocasts, load_model, set_trainable, with_adapters
from llavolta.train.schemes import ISOLATOR, SCHEMES, Stage
from llavolta.worlds import HOMES, WORLDS


def now(device: torch.device) -> float:
    """Return the seconds of a clock, after all work queued on ``device`` is done.

    On a CPU with one thread it is the CPU time of this process, which other processes do not
    advance.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def step_times(
    model,
    batches: Sequence[dict],
    plans: Sequence[str | Stage],
    rounds: int = 5,
    phase: str = "instruct",
    progress: bool = True,
    config: TrainConfig | None = None,
) -> pd.DataFrame:
    """Time a training step (forward, backward, AdamW) under each plan.

    The learning rate is 0, so the model's weights stay as they are.

    Args:
        model: A supported vision-language model.
        batches: Batches with labels, which all plans run on.
        plans: Plan texts, or stages of a scheme. A stage with slow steps counts as the mean over
            its fast and slow steps, a stage with a drawn plan as the mean over its plans.
        rounds: Rounds to time, after one of warm-up.
        phase: "instruct" or "align": which parts are trained.
        progress: Show a progress bar.
        config: A run's configuration, for its adapters, its precision and whether the tower trains.
            Default: float32, without adapters, the tower frozen.

    Returns:
        One row per plan, "none" first: plan; seconds, the median time per batch; ratio, the median
        over rounds of the time relative to "none" in the same round; and flops_ratio, the counted
        FLOPs relative to "none".
    """
    stages = {
        str(plan): plan if isinstance(plan, Stage) else Stage(plan, 1) for plan in ["none", *plans]
    }
    training, trained = model.training, [(p, p.requires_grad) for p in model.parameters()]
    # DualSpeed's mode isolator, if the model has one, gives way to a new one meanwhile.
    own, name = getattr(unwrap(model), ISOLATOR, None), model.name_or_path
    options = dict(train_tower=config.train_tower, lora_rank=config.lora_rank) if config else {}
    set_trainable(model.train(), phase, options.get("train_tower", False))
    adapted = model
    if config and config.lora_rank and phase == "instruct":
        adapted = with_adapters(model, config.changed(quantize=None), name)
    precision = torch.autocast(
        model.device.type, torch.bfloat16, enabled=bool(config) and autocasts(config)
    )
    try:
        with precision:
            return _step_times(
                adapted, batches, stages, rounds, dict(phase=phase, **options), progress
            )
    finally:
        if hasattr(unwrap(model), ISOLATOR):  # not if the steps failed before
            delattr(unwrap(model), ISOLATOR)
        if own is not None:
            setattr(unwrap(model), ISOLATOR, own)
        if adapted is not model:  # take the adapters out, and undo what they changed
            adapted.unload()
            model.name_or_path = model.config.name_or_path = name
        model.train(training)
        model.zero_grad()
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


def _step_times(
    model, batches, stages: dict[str, Stage], rounds: int, trains: dict, progress: bool
) -> pd.DataFrame:
    """Time the steps of a model that is ready to train: see ``step_times``."""
    add_isolator(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    device = next(model.parameters()).device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]

    # A drawn plan is timed as one task for each plan it is drawn from.
    drawn = {name: stage.fixed() for name, stage in stages.items() if len(stage.choices) > 1}

    def step(stage: Stage, slow: bool) -> None:
        """Take a fast or a slow step on each batch."""
        for batch in batches:
            # fast_mode is the stage's plan, with the isolator only if the stage has one.
            with slow_mode(model, stage, batch) if slow else fast_mode(model, stage):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tasks = {
        name: partial(step, stage, False) for name, stage in stages.items() if name not in drawn
    }
    tasks |= {
        choice.plan: partial(step, choice, False)
        for choices in drawn.values()
        for choice in choices
    }
    slow = {name: f"slow step of {name}" for name, stage in stages.items() if stage.slow_every}
    tasks |= {slow[name]: partial(step, stages[name], True) for name in slow}
    taken = pd.DataFrame(
        interleaved(tasks, rounds, device, progress) / len(batches), columns=list(tasks)
    )
    # One step in slow_every is slow; a drawn plan is the mean over its plans.
    for name in slow:
        taken[name] += (taken[slow[name]] - taken[name]) / stages[name].slow_every
    for name, choices in drawn.items():
        taken[name] = taken[[choice.plan for choice in choices]].mean(axis=1)
    seconds = taken[list(stages)]
    text, images, labelled = example_sizes(model, batches)
    # Where the number of tokens depends on the image, all images of the first batch with pixels
    # count as one.
    if not visual_tokens(unwrap(model).config):
        images = len(batches) / sum(len(batch["input_ids"]) for batch in batches)
        trains = {
            **trains,
            "pictures": of_tower(next((b for b in batches if "pixel_values" in b), {})) or None,
        }
    costs = [
        cost_model(model.config).stage(stage, text, images, labelled, **trains)
        for stage in stages.values()
    ]
    flops = np.array([sum(often * cost.total for often, cost in parts) for parts in costs])
    return pd.DataFrame(
        {
            "plan": list(stages),
            "seconds": seconds.median().to_numpy(),
            "ratio": seconds.div(seconds["none"], axis=0).median().to_numpy(),
            "flops_ratio": flops / flops[0],
        }
    )


def example_sizes(model, batches) -> tuple[float, float, float]:
    """Return text tokens, images and labelled tokens per example, as means over the batches.

    A clip counts as its frames.
    """
    examples = sum(len(batch["input_ids"]) for batch in batches)
    images = sum(len(batch.get("pixel_values", ())) for batch in batches)
    images += sum(
        batch["pixel_values_videos"].shape[:2].numel()
        for batch in batches
        if "pixel_values_videos" in batch
    )
    rows = sum(batch["input_ids"].numel() for batch in batches)
    # Visual tokens are counted by their placeholders; the rest of a row, padding included, is text.
    placeholders = torch.tensor(list(find_parts(model).visual_ids.values()))
    visual = sum(
        torch.isin(batch["input_ids"], placeholders.to(batch["input_ids"].device)).sum().item()
        for batch in batches
    )
    labelled = sum((batch["labels"] != IGNORED).sum().item() for batch in batches)
    return (rows - visual) / examples, images / examples, labelled / examples


@dataclass(frozen=True)
class Sizes:
    """Sizes of a random LLaVA and of a batch to time.

    The tower is tiny, so the decoder dominates the time. A third of the text tokens is labelled.

    Attributes:
        width: Hidden size of the decoder.
        layers: Number of decoder layers.
        visual: Visual tokens of an image, a square number.
        text: Text tokens of an example.
        batch: Examples of the batch.
        vocabulary: Number of words.
        device: Device of model and batch.
        dtype: Data type of weights and pixels, as a name in torch.
    """

    width: int = 256
    layers: int = 8
    visual: int = 576
    text: int = 60
    batch: int = 8
    vocabulary: int = 2000
    device: str = "cpu"
    dtype: str = "float32"

    def model(self):
        """Return a LlavaForConditionalGeneration with random weights.

        Raises:
            ValueError: ``visual`` is no square number.
        """
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
        )

        grid = math.isqrt(self.visual)
        if grid**2 != self.visual:
            raise ValueError(f"visual must be a square number of tokens, not {self.visual}")
        tower = dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
        heads = max(1, self.width // 64)
        decoder = dict(
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_attention_heads=heads,
        )
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=4 * grid, patch_size=4),
            text_config=LlamaConfig(
                **decoder, num_hidden_layers=self.layers, vocab_size=self.vocabulary
            ),
            image_token_index=5,
            image_seq_length=self.visual,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)  # the same weights each time
        with torch.device(self.device):
            return LlavaForConditionalGeneration(config).to(getattr(torch, self.dtype))

    def inputs(self) -> dict:
        """Return one batch: the first token, an image's placeholders, and text.

        The last third of the text is labelled.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            10, self.vocabulary, (self.batch, self.visual + self.text), generator=generator
        )
        ids[:, 1 : 1 + self.visual] = 5  # image_token_index; other tokens are 10 and above
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.text // 3 :] = ids[:, -self.text // 3 :]
        side = 4 * math.isqrt(self.visual)
        pixels = torch.randn(self.batch, 3, side, side, generator=generator).to(
            getattr(torch, self.dtype)
        )
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": pixels,
        }
        return {name: value.to(self.device) for name, value in batch.items()}


def interleaved(
    tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, progress: bool = True
):
    """Time several tasks in turn, in a new random order each round, after one round of warm-up.

    Args:
        tasks: Functions by name.
        rounds: Rounds to time.
        device: The device that the tasks run on.
        progress: Show a progress bar.

    Returns:
        Seconds (rounds, tasks).
    """
    names = list(tasks)
    seconds = np.zeros((rounds + 1, len(names)))
    for turn in tqdm(range(rounds + 1), desc="timing", disable=not progress, leave=False):
        for column in np.random.default_rng(turn).permutation(len(names)):
            start = now(device)
            tasks[names[column]]()
            seconds[turn, column] = now(device) - start
    return seconds[1:]


def step_report(sizes: Sizes, rounds: int = 5, progress: bool = True) -> dict[str, pd.DataFrame]:
    """Return the tables that ``python -m llavolta.bench step`` prints.

    Returns:
        "step", the table of ``step_times`` with the columns speedup, promised (by FLOPs) and
        kept_promise (their ratio), and "prefill", the table of ``prefill_times``.
    """
    half = sizes.layers // 2
    plans = [
        f"{layer}:avgpool:{stride}" for layer, stride in ((2, 8), (half, 8), (2, 2), (half, 2))
    ]
    plans = list(dict.fromkeys(plans))  # in a model of four layers half is 2, so plans repeat
    model, batch = sizes.model(), sizes.inputs()
    step = step_times(model, [batch], plans, rounds, progress=progress)
    step["speedup"] = 1 / step.ratio
    step["promised"] = 1 / step.flops_ratio
    step["kept_promise"] = step.speedup / step.promised
    return {"step": step, "prefill": prefill_times(model.eval(), batch, plans, rounds, progress)}


@torch.no_grad()
def prefill_times(
    model, batch: dict, plans: Sequence[str], rounds: int = 5, progress: bool = True
) -> pd.DataFrame:
    """Time the prefill of a prompt into a cache under each plan.

    Args:
        model: A supported vision-language model, in evaluation mode.
        batch: The prompt; labels are ignored.
        plans: Plan texts.
        rounds: Rounds to time, after one of warm-up.
        progress: Show a progress bar.

    Returns:
        One row per plan, "none" first: plan, seconds (median), ratio (to "none" in the same round),
        cache_MB (size of the cache in 10^6 bytes) and cache_ratio (to "none").
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    size: dict[str, int] = {}

    def prefill(plan: str) -> None:
        cache = DynamicCache(config=model.config.get_text_config())
        with compress(model, plan):
            model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        size[plan] = cache_bytes(cache)

    plans = list(dict.fromkeys(["none", *plans]))
    seconds = interleaved(
        {plan: partial(prefill, plan) for plan in plans}, rounds, model.device, progress
    )
    bytes_ = np.array([size[plan] for plan in plans])
    return pd.DataFrame(
        {
            "plan": plans,
            "seconds": np.median(seconds, axis=0),
            "ratio": np.median(seconds / seconds[:, [0]], axis=0),
            "cache_MB": bytes_ / 1e6,
            "cache_ratio": bytes_ / bytes_[0],
        }
    )


PREDICTED = ("single-stage", "three-stage", "four-stage-wider", "four-stage-deeper")


def scheme_times(
    model, batches: Sequence[dict], rounds: int = 5, progress: bool = True
) -> pd.DataFrame:
    """Compare measured and predicted times of four schemes, relative to no compression.

    The speed is fitted to two of the measured steps: without compression, and under the heaviest
    plan.

    Args:
        model: The model.
        batches: Batches of training.
        rounds: Measurements of each step.
        progress: Show a progress bar.

    Returns:
        One row per scheme: measured, predicted, error (of the prediction, as a share).
    """
    depth = len(find_parts(model).layers)
    schemes = {name: SCHEMES[name].scaled(depth) for name in PREDICTED}
    heaviest = schemes["three-stage"].stages[0].plan
    plans = [stage.plan for scheme in schemes.values() for stage in scheme.stages]
    steps = step_times(model, batches, plans, rounds, progress=progress).set_index("plan")
    text, images, labelled = example_sizes(model, batches)
    told = cost_model(model.config)
    costs = {plan: told.step(plan, text, images, labelled) for plan in steps.index}
    known = ["none", heaviest]
    speed = fit_speed([costs[plan] for plan in known], [steps.ratio[plan] for plan in known])
    rows = []
    for name, scheme in schemes.items():
        measured = sum(stage.share * steps.ratio[stage.plan] for stage in scheme.stages)
        predicted = sum(stage.share * speed.seconds(costs[stage.plan]) for stage in scheme.stages)
        rows.append(
            dict(
                scheme=name, measured=measured, predicted=predicted, error=predicted / measured - 1
            )
        )
    return pd.DataFrame(rows).set_index("scheme")


def embedded_batches(batch: int = 32, count: int = 2, name: str = "embedded") -> tuple:
    """Load a model that comes with the package, and batches of its world's training data.

    Args:
        batch: Examples per batch.
        count: Number of batches, from the first example on.
        name: The model: see ``worlds.MODELS``.

    Returns:
        The model, and a list of batches.
    """
    model, processor = load_model(name)
    data, collate = LlavaData(WORLDS[HOMES.get(name, "digits")].train()), Collator(processor)
    return model, [
        collate([data[i] for i in range(k * batch, (k + 1) * batch)]) for k in range(count)
    ]
