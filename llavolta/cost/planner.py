"""Hours, money and memory of a training run before it is started, from the cost model and a measured speed.

A speed is either a share of a GPU's peak, which the user assumes, or fitted to measured steps (``fit_speed``): then
linear layers and attention have rates of their own, and what does not depend on the tokens a time of its own.
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
from llavolta.errors import UserError
from llavolta.paths import PUBLISHED
from llavolta.train.build import visual_tokens
from llavolta.train.models import load_processor, read_config, whole_path
from llavolta.train.schemes import Scheme, Stage

CAPTIONS, INSTRUCTIONS = 558_128, 665_298  # that LLaVA-1.5 is aligned and tuned on
CAPTION_TOKENS = 20  # of a caption that LLaVA-1.5's projector is aligned on


class PlannerError(UserError, ValueError):
    """A question that the planner cannot answer with what it was given."""


@dataclass(frozen=True)
class Gpu:
    """peak: dense bfloat16 TFLOP/s; memory: GB; both from the vendor's data sheet."""

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
    """Seconds of one example's training step: fixed + linear operations * per_linear + attention's * per_attention."""

    per_linear: float
    per_attention: float
    fixed: float = 0.0

    @classmethod
    def of_gpu(cls, gpu: str, utilisation: float, count: int = 1) -> Speed:
        """``count`` GPUs that reach the share ``utilisation`` (0 to 1) of their peak."""
        if gpu not in GPUS:
            raise PlannerError(
                f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}; or measure the speed of your own"
            )
        if not 0 < utilisation <= 1 or count < 1:
            raise PlannerError(
                f"utilisation must be above 0 and at most 1, GPUs at least 1, not {utilisation}, {count}"
            )
        rate = 1 / (GPUS[gpu].peak * 1e12 * utilisation * count)
        return cls(rate, rate)

    def seconds(self, cost: StepCost) -> float:
        attention = cost.attention.total
        return (
            self.fixed + (cost.total - attention) * self.per_linear + attention * self.per_attention
        )


def fit_speed(costs: Sequence[StepCost], seconds: Sequence[float]) -> Speed:
    """The speed under which ``costs`` take ``seconds`` per example, by least squares with no negative part.

    From one measurement a single rate is fitted, from two rates for attention and for the rest, from three on a fixed
    time with them.
    """
    if not len(costs) or len(costs) != len(seconds) or min(seconds) <= 0:
        raise PlannerError(
            f"{len(costs)} steps need as many measured times above 0, not {list(seconds)}"
        )
    attention = np.array([cost.attention.total for cost in costs])
    rest = np.array([cost.total for cost in costs]) - attention
    columns = (
        [rest + attention]
        if len(costs) == 1
        else [rest, attention, np.ones(len(costs))][: len(costs)]
    )
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
    """Per scheme: compression ratio, FLOPs and hours of training on ``examples``, and both relative to no compression.

    price: of one GPU for an hour; adds the cost. captions: examples of projector alignment before; adds its hours, and
    recipe_ratio, the time of both together. step: text_tokens, images, checkpointing, ... of CostModel.step.
    """
    plain = model.step("none", **step)
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
            first = scheme.align or Stage("none", 1)
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
    """The schemes of ``scheme_table`` that take at most ``hours``, the least compressing first. Raises PlannerError."""
    fitting = table[table.hours <= hours].sort_values(["ratio", "hours"])
    if fitting.empty:
        fastest = table.hours.idxmin()
        raise PlannerError(
            f"no scheme takes at most {hours:g} hours; the fastest, {fastest!r}, takes {table.hours[fastest]:.1f}"
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
    """Per plan, GB of one GPU: weights, gradients and optimizer shared by ``gpus`` (ZeRO-3), activations of ``batch``
    examples, and the key-value cache that one example needs at inference. bfloat16, master weights in float32."""
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
    """Training hours of LLaVA-1.5-7B that LLaVolta reports, by scheme."""
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
    """What is planned: a config; what one picture of ``size`` becomes, None where every picture is one square; and the
    statistics of a data set, if one was given."""

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
    """Of a name in REFERENCES, or of a Hugging Face folder or hub name, whose processor then counts ``data``, too.

    size: of a picture, where the family makes tokens by size; that of ``data`` takes its place. Raises PlannerError.
    """
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise PlannerError(f"a picture has a width and a height in pixels, not {list(size)}")
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
    made = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    return Subject(config, of_tower(made), size, counted)
