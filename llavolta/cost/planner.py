"""Predict hours, price and memory of a training run, from the cost model and a speed.

A speed is a share of a GPU's peak that the user assumes, or it is fitted to measured steps
(``fit_speed``). A fitted speed has separate rates for linear layers and for attention, and a fixed
time per example that does not depend on the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy.optimize import nnls

from llavolta.cost.flops import CostModel, StepCost, of_tower
from llavolta.cost.references import REFERENCES, pictures_of, reference_config
from llavolta.data import Collator, LlavaData, TokenStatistics, token_statistics
from llavolta.errors import ConfigError
from llavolta.paths import PUBLISHED
from llavolta.train.build import visual_tokens
from llavolta.train.models import load_processor, read_config, whole_path
from llavolta.train.schemes import Scheme, Stage

CAPTIONS, INSTRUCTIONS = 558_128, 665_298  # examples of LLaVA-1.5's alignment and tuning
CAPTION_TOKENS = 20  # text tokens of an example of alignment


@dataclass(frozen=True)
class Gpu:
    """A GPU, by its vendor's data sheet.

    Attributes:
        peak: Dense bfloat16 throughput in TFLOP/s.
        memory: Memory in GB.
    """

    peak: float
    memory: float


GPUS = {
    "A100-80GB": Gpu(312, 80),
    "H100-SXM": Gpu(989, 80),
    "H200": Gpu(989, 141),
    "L40S": Gpu(362, 48),
    "RTX-4090": Gpu(165, 24),
    "RTX-6000-Ada": Gpu(364, 48),
}


@dataclass(frozen=True)
class Speed:
    """The time of one example's training step.

    It is fixed + attention FLOPs * per_attention + all other FLOPs * per_linear.

    Attributes:
        per_linear: Seconds per FLOP outside attention.
        per_attention: Seconds per FLOP of attention.
        fixed: Seconds that do not depend on the tokens.
    """

    per_linear: float
    per_attention: float
    fixed: float = 0.0

    @classmethod
    def of_gpu(cls, gpu: str, utilisation: float, count: int = 1) -> Speed:
        """Return the speed of GPUs at a share of their peak.

        Args:
            gpu: A key of GPUS.
            utilisation: The share of the peak, above 0 and at most 1.
            count: Number of GPUs.

        Raises:
            ConfigError: Unknown GPU, or a number out of range.
        """
        if gpu not in GPUS:
            raise ConfigError(
                f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}; or measure the speed of your own"
            )
        if not 0 < utilisation <= 1 or count < 1:
            raise ConfigError(
                "utilisation must be above 0 and at most 1, GPUs at least 1, "
                f"not {utilisation}, {count}"
            )
        rate = 1 / (GPUS[gpu].peak * 1e12 * utilisation * count)
        return cls(rate, rate)

    def seconds(self, cost: StepCost) -> float:
        """Return the seconds of one example's training step."""
        attention = cost.attention.total
        return (
            self.fixed + (cost.total - attention) * self.per_linear + attention * self.per_attention
        )


def fit_speed(costs: Sequence[StepCost], seconds: Sequence[float]) -> Speed:
    """Fit the speed at which ``costs`` take ``seconds`` per example.

    It is a least-squares fit of relative errors, with no negative rate. One measurement gives a
    single rate, two give separate rates for attention and the rest, three or more give a fixed time
    too.

    Args:
        costs: The counted steps.
        seconds: The measured time of each, above 0.

    Raises:
        ConfigError: No measurements, unequal numbers, or times that are not above 0.
    """
    if not len(costs) or len(costs) != len(seconds) or min(seconds) <= 0:
        raise ConfigError(
            f"{len(costs)} steps need as many measured times above 0, not {list(seconds)}"
        )
    attention = np.array([cost.attention.total for cost in costs])
    rest = np.array([cost.total for cost in costs]) - attention
    columns = (
        [rest + attention]
        if len(costs) == 1
        else [rest, attention, np.ones(len(costs))][: len(costs)]
    )
    # Columns of very different size, FLOPs and 1, are scaled for the solver.
    scale = [column.max() for column in columns]
    weight = 1 / np.asarray(seconds)  # errors relative to the time
    found, _ = nnls(np.stack(columns, 1) / scale * weight[:, None], np.ones(len(costs)))
    found = found / scale
    if len(costs) == 1:
        return Speed(found[0], found[0])
    return Speed(*found)


def scheme_table(
    model: CostModel,
    schemes: Mapping[str, Scheme],
    examples: int,
    speed: Speed,
    price: float | None = None,
    gpus: int = 1,
    captions: int = 0,
    **step,
) -> pd.DataFrame:
    """Compare schemes by their predicted cost.

    Args:
        model: The model's costs.
        schemes: Schemes by name, for the model's depth.
        examples: Training examples.
        speed: Speed of all GPUs together.
        price: Price of one GPU for an hour. None: no column.
        gpus: Number of GPUs, for the price.
        captions: Examples of projector alignment before training; 0: no columns.
        **step: Options of ``CostModel.step``: text_tokens, images, checkpointing and so on.

    Returns:
        One row per scheme: ratio (compression ratio over its stages), pflops (10^15 operations of
        the training), hours, flops_ratio and time_ratio (to training without compression). With
        ``captions``: align_hours, and recipe_ratio (the time of both phases to that without
        compression). With ``price``: price, of the training without alignment.
    """
    plain = model.step("none", **step)
    # An example of alignment is one image with a short caption.
    align = {
        **step,
        "text_tokens": CAPTION_TOKENS,
        "images": 1,
        "lora_rank": 0,
        "labelled": None,
        "phase": "align",
    }
    rows = []
    for name, scheme in schemes.items():
        costs = [
            (stage.share * often, cost)
            for stage in scheme.stages
            for often, cost in model.stage(stage, **step)
        ]
        flops = sum(share * cost.total for share, cost in costs)
        seconds = sum(share * speed.seconds(cost) for share, cost in costs)
        # Token-layers: visual tokens summed over the layers, the mean over the stages.
        layers, visual = len(model.layers), model.tokens_of(step.get("pictures"))
        tokens = sum(
            stage.share * sum(stage.tokens_per_layer(layers, visual)) for stage in scheme.stages
        )
        hours = seconds * examples / 3600
        row = dict(
            scheme=name, ratio=layers * visual / tokens, pflops=flops * examples / 1e15, hours=hours
        )
        row |= dict(flops_ratio=flops / plain.total, time_ratio=seconds / speed.seconds(plain))
        if captions:
            first = scheme.align or Stage("none", 1)  # its share is that of the captions in use
            aligned = sum(
                often * speed.seconds(cost) for often, cost in model.stage(first, **align)
            )
            before, once = (
                captions * first.share * aligned,
                captions * speed.seconds(model.step("none", **align)),
            )
            ratio = (before + examples * seconds) / (once + examples * speed.seconds(plain))
            row |= dict(align_hours=before / 3600, recipe_ratio=ratio)
        rows.append(row if price is None else {**row, "price": hours * gpus * price})
    return pd.DataFrame(rows).set_index("scheme")


def within(table: pd.DataFrame, hours: float) -> pd.DataFrame:
    """Return the schemes of ``scheme_table`` that take at most ``hours``, the lowest ratio first.

    Raises:
        ConfigError: No scheme does.
    """
    fitting = table[table.hours <= hours].sort_values(["ratio", "hours"])
    if fitting.empty:
        fastest = table.hours.idxmin()
        raise ConfigError(
            f"no scheme takes at most {hours:g} hours; the fastest, {fastest!r}, "
            f"takes {table.hours[fastest]:.1f}"
        )
    return fitting


def memory_table(
    model: CostModel,
    plans: Sequence[str],
    batch: int = 1,
    gpus: int = 1,
    checkpointing: bool = False,
    text_tokens: float = 64,
    images: float = 1,
    lora_rank: int = 0,
    pictures: dict | None = None,
    train_tower: bool = False,
) -> pd.DataFrame:
    """Predict the memory of one GPU under each plan.

    Weights, gradients and optimizer state are sharded over the GPUs (ZeRO-3). Weights are in
    bfloat16, with a float32 copy of the trained ones.

    Args:
        model: The model's costs.
        plans: Plan texts.
        batch: Examples on one GPU.
        gpus: Number of GPUs.
        checkpointing: See ``CostModel.step``.
        text_tokens: See ``CostModel.step``.
        images: See ``CostModel.step``.
        lora_rank: See ``CostModel.step``.
        pictures: See ``CostModel.step``.
        train_tower: See ``CostModel.step``.

    Returns:
        One row per plan, in GB: weights, gradients, optimizer, activations (of the decoder), total,
        and cache_per_example (the key-value cache of one example at inference, no part of the
        total).
    """
    # The tuning phase needs the most: it trains the decoder or its adapters.
    trained = model.state_bytes("instruct", train_tower, lora_rank)
    states, visual = (
        {part: size / gpus / 1e9 for part, size in trained.items()},
        [model.tokens_of(pictures)],
    )
    rows = []
    for plan in plans:
        lengths = model.lengths(plan, text_tokens, images, visual)
        activations = batch * model.activation_bytes(lengths, checkpointing=checkpointing) / 1e9
        total = sum(states.values()) + activations
        cache = model.cache_bytes(lengths) / 1e9
        rows.append(
            dict(plan=plan, **states, activations=activations, total=total, cache_per_example=cache)
        )
    return pd.DataFrame(rows).set_index("plan")


def published_hours() -> dict[str, float]:
    """Return the training hours of LLaVA-1.5-7B that LLaVolta reports, by scheme."""
    table = (
        pd.read_csv(PUBLISHED)
        .query("claim == 'training time' and unit == 'hours'")
        .set_index("quantity")
        .value
    )
    baseline, staged = table["LLaVA-1.5-7B without compression"], table["four-stage scheme"]
    return {"single-stage": float(baseline), "four-stage-wider": float(staged)}


@dataclass(frozen=True)
class Subject:
    """The model and data that are planned for.

    Attributes:
        config: The Hugging Face config.
        pictures: The processor's output for one image of ``size``. None if each image is a square
            of the tower's size.
        size: Width and height of an image in pixels.
        statistics: Statistics of the data set; None without one.
    """

    config: object
    pictures: dict | None
    size: tuple[int, int]
    statistics: TokenStatistics | None


def subject(
    model: str,
    data: str | None = None,
    images: str | None = None,
    size: tuple[int, int] = (640, 480),
) -> Subject:
    """Read the model and data to plan for.

    Args:
        model: A key of REFERENCES, a Hugging Face folder or a hub name.
        data: A LLaVA JSON file whose tokens the model's processor counts. None: no statistics.
        images: The folder of its images.
        size: Width and height of an image in pixels, for families whose number of tokens depends on
            it. The size of the images in ``data`` replaces it.

    Raises:
        ConfigError: ``size`` is no pair of positive whole numbers.
    """
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ConfigError(f"a picture has a width and a height in pixels, not {list(size)}")
    # A reference needs no file: its config and its processor's settings are in the package.
    if model in REFERENCES and data is None:
        return Subject(reference_config(model), pictures_of(model, size), size, None)
    name = REFERENCES[model].hub if model in REFERENCES else model
    config = read_config(name)
    fixed = bool(visual_tokens(config))
    if fixed and data is None:
        return Subject(config, None, size, None)
    processor = load_processor(config, whole_path(name))
    counted = token_statistics(LlavaData(data, images), Collator(processor)) if data else None
    size = (counted and counted.picture_size) or size
    if fixed:
        return Subject(config, None, size, counted)
    # The number of tokens depends on the size, so an image of it is processed.
    made = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    return Subject(config, of_tower(made), size, counted)
