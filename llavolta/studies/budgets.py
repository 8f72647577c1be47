"""Compare compressors at equal budgets: the same mean number of visual tokens per decoder layer.

The budget of a plan is ``(K L + (N - K) L_out) / (N L)``, for compression from L to L_out tokens
at layer K of N. FLOPs and cache size follow this share of the token-layers. A method that works
before the decoder keeps that share of the tokens. A method that works at layer K has processed all
tokens in K layers, so it keeps fewer from there on.

The comparison without training is ``plan_at``, ``training_free``, ``accuracy`` and ``prefill``.
The comparison with training is ``trained_methods`` and ``tokens_left``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from tqdm.auto import tqdm

from llavolta.compression.families import find_parts
from llavolta.compression.plan import VISION, tokens_per_layer
from llavolta.cost.bench import prefill_times
from llavolta.data import LlavaData
from llavolta.errors import ConfigError, PlanError, UnsupportedModel
from llavolta.studies import inspect
from llavolta.studies.compare import BASELINE
from llavolta.studies.evaluation import evaluate, pictured, prompts
from llavolta.studies.opening import open_model
from llavolta.studies.statistics import accuracy_table
from llavolta.train import build
from llavolta.train.config import TrainConfig
from llavolta.train.schemes import SCHEMES, Scheme, scale_layer, scale_plan

FULL, DOWNSAMPLE = "no compression", "downsampling"
METHODS = {
    "random drop": "vision:random:{keep}",
    DOWNSAMPLE: "vision:downsample:{keep}",
    "average pooling": "0:avgpool:{stride}",
    "k-means": "vision:kmeans:{keep}",
    "PruMerge": "vision:prumerge:{keep}",
    "PruMerge+": "vision:prumerge+:{keep}",
    "class attention": "vision:cls:{keep}",
    "VisionZip": "vision:visionzip:{keep}",
    "VisPruner": "vision:vispruner:{keep}",
    "ToMe": "vision:tome:{keep}",
    "DivPrune": "0:divprune:{keep}",
    "CDPruner": "0:cdpruner:{keep}",
    "HoloV": "0:holov:{keep}",
    "HoloV + RESTORE": "0:restore:holov:{keep}",
    "VScan": "0:vscan:{keep};16:pyramiddrop:0.334",
    "average pooling, layer 2": "2:avgpool:{stride}",
    "FastV": "2:fastv:{keep}",
    "DART": "2:dart:{keep}",
    "SparseVLM": "3:sparsevlm:{keep};7:sparsevlm:{keep};16:sparsevlm:{keep}",
    "PACT": "4:pact:{keep}",
    "PyramidDrop": "8:pyramiddrop:{keep};16:pyramiddrop:{keep};24:pyramiddrop:{keep}",
}
"""By method: its plan in a model of 32 decoder layers. The budget sets {keep} or {stride}."""
# The published setting of PyramidDrop, for 32 decoder layers.
PYRAMIDDROP = "8:pyramiddrop:0.5;16:pyramiddrop:0.5;24:pyramiddrop:0.5"


def plan_at(method: str, budget: float, num_layers: int, num_tokens: int) -> str | None:
    """Find the plan under which ``method`` meets ``budget``.

    Args:
        method: A key of METHODS.
        budget: The share of all token-layers to leave, above 0 and at most 1.
        num_layers: Decoder layers of the model.
        num_tokens: Visual tokens of an image.

    Returns:
        The plan's text, or None if the method cannot meet the budget: its layers K lie so deep
        that even one token from there on is too much, or its fixed settings leave less. A keep
        ratio is rounded to four digits and a stride to a whole number.

    Raises:
        ConfigError: Unknown method, or a budget out of range.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if not 0 < budget <= 1:
        raise ConfigError(
            f"a budget is a share of the tokens, above 0 and at most 1, not {budget!r}"
        )
    entries = _entries(METHODS[method], num_layers)
    # From one token to all tokens. The share left grows with ``keep``, so the root is unique.
    least, most = (_left(entries, keep, num_layers) for keep in (1 / num_tokens, 1))
    if not least <= budget <= most:
        return None
    keep = brentq(lambda keep: _left(entries, keep, num_layers) - budget, 0, 1)
    given = dict(keep=round(keep, 4), stride=round(1 / keep))
    return ";".join(f"{layer}:{text.format(**given)}" for layer, text in entries.items())


def _entries(plan: str, num_layers: int) -> dict[int | str, str]:
    """The entries of a plan for 32 layers, scaled to ``num_layers``.

    Where two entries fall on one layer, the first one stays.
    """
    found: dict[int | str, str] = {}
    for entry in plan.split(";"):
        place, text = entry.split(":", 1)
        found.setdefault(place if place == VISION else scale_layer(int(place), num_layers), text)
    return found


def _left(entries: dict[int | str, str], keep: float, num_layers: int) -> float:
    """The share of token-layers left, if entries with an open number keep the share ``keep``."""
    counts, left = [], 1.0
    # An entry with a fixed number keeps the share that its first option names.
    shares = {
        layer: keep if "{" in text else float(text.split(":")[1]) for layer, text in entries.items()
    }
    for layer in (VISION, *range(num_layers)):
        left *= shares.get(layer, 1)  # each entry takes a share of what the one before left
        counts.append(left)
    return sum(counts[1:]) / num_layers  # counts[0] is before the decoder


def plans_at(
    budgets: Sequence[float],
    num_layers: int,
    num_tokens: int,
    methods: Sequence[str] = tuple(METHODS),
) -> pd.DataFrame:
    """Find the plans of several methods at several budgets.

    Args:
        budgets: Shares of token-layers, above 0 and at most 1.
        num_layers: Decoder layers of the model.
        num_tokens: Visual tokens of an image.
        methods: Keys of METHODS.

    Returns:
        One row per budget and method that can meet it: budget, method, plan, and share, the share
        of token-layers that the plan leaves after rounding.

    Raises:
        ConfigError: Unknown method, or a budget out of range.
    """
    rows = []
    for budget in budgets:
        for method in methods:
            plan = plan_at(method, budget, num_layers, num_tokens)
            if plan is not None:
                share = sum(tokens_per_layer(plan, num_layers, num_tokens)) / (
                    num_layers * num_tokens
                )
                rows.append(dict(budget=budget, method=method, plan=plan, share=share))
    return pd.DataFrame(rows)


def training_free(
    model,
    processor,
    data: LlavaData,
    plans: pd.DataFrame,
    questions: int | None = None,
    progress: bool = True,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Answer questions under every plan, without training for it.

    Methods that the model does not support are left out, and a printed line says why.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: The questions.
        plans: Rows of ``plans_at``.
        questions: Number of questions to ask, from the first; None: all.
        progress: Show a progress bar.
        max_new_tokens: See ``evaluation.evaluate``.

    Returns:
        One row per budget, method and question. Columns are those of ``evaluation.evaluate``, and
        budget, method, number (of the question, from 0) and difficult. A question is difficult if
        downsampling to the same budget gets it wrong (VTC-Bench, arXiv 2510.07143). Every budget
        has the model without compression, as the method FULL.

    Raises:
        DataError: The tokenizer does not know the words of the questions or answers.
        ValueError: ``max_new_tokens`` is below 1.
    """
    asked = dict(limit=questions, progress=False, max_new_tokens=max_new_tokens)
    full = evaluate(model, processor, data, **asked)
    frames = []
    bar = tqdm(
        plans.itertuples(), total=len(plans), desc="methods", disable=not progress, leave=False
    )
    for row in bar:
        bar.set_postfix_str(row.plan)
        try:
            answers = evaluate(model, processor, data, row.plan, **asked)
        except (UnsupportedModel, PlanError) as error:
            print(f"left out: {row.method}: {error}")
            continue
        frames.append(answers.assign(budget=row.budget, method=row.method))
    # No compression does not depend on the budget, so its answers are copied.
    for budget in dict.fromkeys(plans.budget):
        frames.append(full.assign(budget=budget, method=FULL))
    answers = pd.concat(frames, ignore_index=True)
    answers["number"] = answers.groupby(["budget", "method"]).cumcount()
    down = answers[answers.method == DOWNSAMPLE].set_index(["budget", "number"]).correct
    # Without downsampling among the methods, no question counts as difficult.
    answers["difficult"] = [
        not down.get(key, True) for key in zip(answers.budget, answers.number, strict=True)
    ]
    return answers


def accuracy(answers: pd.DataFrame) -> pd.DataFrame:
    """Measure the accuracy per budget, method and question type.

    Args:
        answers: From ``training_free``.

    Returns:
        One row per budget, method and type, as of ``statistics.accuracy_table``. The types
        "overall" and "difficult" are among them.
    """
    difficult = answers[answers.difficult].assign(type="difficult")
    # Without reference answers the tables have no accuracy of the best constant answer.
    tables = [
        accuracy_table(part.drop(columns="answer"), by=("budget", "method"))
        for part in (answers, difficult)
    ]
    return pd.concat([tables[0], tables[1].query("type == 'difficult'")], ignore_index=True)


@torch.no_grad()
def prefill(
    model,
    processor,
    data: LlavaData,
    plans: pd.DataFrame,
    batch: int = 32,
    rounds: int = 5,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the prefill under each plan, relative to no compression.

    Args:
        model: A supported model whose images all have the same number of visual tokens.
        processor: The model's processor.
        data: The questions.
        plans: Rows of ``plans_at``.
        batch: Number of questions, from the first, that form the timed batch.
        rounds: Measurements of each plan.
        progress: Show a progress bar.

    Returns:
        ``plans`` with three more columns. time: of the prefill, with the encoding of the images.
        cache: bytes of the key-value cache. measured: the share of token-layers that was left in
        this batch. It differs from ``share`` for methods that choose the number of tokens by
        content.

    Raises:
        ConfigError: The number of visual tokens varies between images.
    """
    asked = pictured(
        data, [question for _, question in zip(range(batch), data.questions(), strict=False)]
    )
    inputs = prompts(model, processor, asked)
    # All plans are timed in one process on one batch, so that their ratios are comparable.
    times = prefill_times(model, inputs, list(plans.plan), rounds, progress).set_index("plan")
    # Layers times tokens: the token-layers of one image without compression.
    full = sum(depth_and_tokens(model)[1:]) * depth_and_tokens(model)[0]
    measured = {plan: _layer_tokens(model, inputs, plan).sum() / full for plan in plans.plan}
    return plans.assign(
        time=[times.ratio[plan] for plan in plans.plan],
        cache=[times.cache_ratio[plan] for plan in plans.plan],
        measured=[measured[plan] for plan in plans.plan],
    )


def headline(table: pd.DataFrame) -> str:
    """Summarise the comparison without training in Markdown.

    Args:
        table: From ``accuracy``.

    Returns:
        The accuracy without compression, and per budget the best method with random drop beside
        it.
    """
    overall = table[table.type == "overall"]
    lines = []
    for budget, part in overall.groupby("budget"):
        by_method = part.set_index("method")
        rest = by_method.drop(index=FULL)
        best = rest.accuracy.idxmax()  # the first one where several are equal
        lines.append(
            f"- {budget:.0%} of the tokens: best without training is {best} "
            f"with {_share_text(rest.loc[best])}"
        )
        if "random drop" in rest.index and best != "random drop":
            lines[-1] += f"; random drop has {_share_text(rest.loc['random drop'])}"
    full = overall[overall.method == FULL].iloc[0]
    return "\n".join([f"Without compression: {_share_text(full)}.", "", *lines])


def _share_text(row: pd.Series) -> str:
    return f"{row.accuracy:.1%} ({row.low:.1%} to {row.high:.1%})"


@dataclass(frozen=True)
class Trained:
    """A method to train with.

    Attributes:
        scheme: The stages of training.
        plan: The plan in force while answering.
        changes: Parameters of the configuration that differ, such as ``projector``.
    """

    scheme: Scheme
    plan: str = "none"
    changes: dict = field(default_factory=dict)


def trained_methods(num_layers: int, num_tokens: int, budget: float = 0.25) -> dict[str, Trained]:
    """List the methods of the comparison with training.

    Args:
        num_layers: Decoder layers of the model.
        num_tokens: Visual tokens of an image.
        budget: The share of token-layers to leave.

    Returns:
        By name: the baseline; the schemes "three-stage" and DualSpeed; every method of METHODS
        that can meet ``budget``, trained and tested under its plan; PruMerge and PyramidDrop in
        their published settings; and the projectors STF and MBTF + STF.

    Raises:
        ConfigError: A budget out of range.
    """
    plans = {
        method: plan_at(method, budget, num_layers, num_tokens)
        for method in METHODS
        if method != "PruMerge"
    }
    # As published, PruMerge chooses the number of tokens for each image.
    plans["PruMerge (adaptive)"] = "vision:prumerge"
    plans["PyramidDrop (published)"] = scale_plan(PYRAMIDDROP, num_layers)
    chosen = {
        BASELINE: Trained(SCHEMES[BASELINE]),
        "three-stage": Trained(SCHEMES["three-stage"].scaled(num_layers)),
    }
    chosen["DualSpeed"] = Trained(SCHEMES["dualspeed"].scaled(num_layers))
    chosen |= {
        name: Trained(Scheme.equal(name, plan), plan)
        for name, plan in plans.items()
        if plan is not None
    }
    # These projectors reduce the tokens themselves, so no plan is in force.
    for name, projector in (("STF", "stf:2"), ("MBTF + STF", "mbtf+stf:2")):
        chosen[name] = Trained(Scheme.equal(name, "none"), changes={"projector": projector})
    return chosen


@torch.no_grad()
def tokens_left(
    folder: str | Path, data: LlavaData, plan: str, full: int, pictures: int = 64
) -> float:
    """Measure the mean number of visual tokens per decoder layer of a trained model.

    Args:
        folder: The model's folder, or a name that ``opening.open_model`` knows.
        data: Questions about images.
        plan: The plan in force.
        full: Visual tokens of an image without compression.
        pictures: Number of questions, from the first one with a text, whose images are counted.

    Returns:
        The mean over layers and images, as a share of ``full``.

    Raises:
        ConfigError: The number of visual tokens varies between images.
    """
    model, processor, _ = open_model(folder)
    questions = list(islice((q for q in data.questions() if q["question"]), pictures))
    batch = prompts(model, processor, pictured(data, questions))
    return float(_layer_tokens(model, batch, plan).mean() / full)


def _layer_tokens(model, batch: dict, plan: str) -> np.ndarray:
    """(N,) visual tokens that each decoder layer processes, the mean over the batch's images."""
    depth, tokens = depth_and_tokens(model)
    counts = np.full(depth, float(tokens))
    for layer, groups in inspect.token_map(model, batch, plan).items():
        # Merged tokens share a number, and -1 marks dropped ones.
        mean = np.mean([len(np.unique(row[row >= 0])) for row in groups])
        counts[0 if layer == VISION else layer :] = mean
    return counts


def sizes(config: TrainConfig) -> tuple[int, int]:
    """Return decoder layers and visual tokens of an image, of the model that ``config`` trains."""
    setup = build.prepare(config)
    return setup.num_layers, setup.num_tokens


def depth_and_tokens(model) -> tuple[int, int]:
    """Return decoder layers and visual tokens of an image, of a loaded model.

    Raises:
        ConfigError: The number of visual tokens varies between images.
    """
    tokens = getattr(find_parts(model).base.config, "image_seq_length", None)
    if not tokens:
        raise ConfigError(
            "budgets need a model whose images all have the same number of visual tokens"
        )
    return len(find_parts(model).layers), tokens
