"""Compressors at equal budgets: every method leaves the same average number of visual tokens per layer.

The budget of a plan is ``(K L + (N - K) L_out) / (N L)``, the share of token-layers that is left: what FLOPs and cache
follow. A method that works before the decoder keeps that share of the tokens; one that works inside it has spent K of N
layers on all tokens and keeps fewer behind them.
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
from llavolta.compression.plan import VISION, PlanError, tokens_per_layer
from llavolta.cost.bench import prefill_times
from llavolta.data import LlavaData
from llavolta.errors import UnsupportedModel, UserError
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
"""By method: its plan in a model of 32 layers; the budget sets {keep} or {stride}."""
PYRAMIDDROP = "8:pyramiddrop:0.5;16:pyramiddrop:0.5;24:pyramiddrop:0.5"  # as published


class BudgetError(UserError, ValueError):
    """A budget or method that does not exist."""


def plan_at(method: str, budget: float, num_layers: int, num_tokens: int) -> str | None:
    """The plan under which ``method`` leaves the share ``budget`` (0 to 1) of all token-layers; None if it cannot."""
    if method not in METHODS:
        raise BudgetError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if not 0 < budget <= 1:
        raise BudgetError(
            f"a budget is a share of the tokens, above 0 and at most 1, not {budget!r}"
        )
    entries = _entries(METHODS[method], num_layers)
    least, most = (
        _left(entries, keep, num_layers) for keep in (1 / num_tokens, 1)
    )  # a single token, and all
    if not least <= budget <= most:
        return None
    keep = brentq(lambda keep: _left(entries, keep, num_layers) - budget, 0, 1)
    given = dict(keep=round(keep, 4), stride=round(1 / keep))
    return ";".join(f"{layer}:{text.format(**given)}" for layer, text in entries.items())


def _entries(plan: str, num_layers: int) -> dict[int | str, str]:
    """The entries of a plan for 32 layers in a model of ``num_layers``; where two become one layer, the first."""
    found: dict[int | str, str] = {}
    for entry in plan.split(";"):
        place, text = entry.split(":", 1)
        found.setdefault(place if place == VISION else scale_layer(int(place), num_layers), text)
    return found


def _left(entries: dict[int | str, str], keep: float, num_layers: int) -> float:
    """The share of token-layers that is left if the entries whose number is open keep ``keep`` of what they get."""
    counts, left = [], 1.0
    shares = {
        layer: keep if "{" in text else float(text.split(":")[1]) for layer, text in entries.items()
    }
    for layer in (VISION, *range(num_layers)):
        left *= shares.get(layer, 1)
        counts.append(left)
    return sum(counts[1:]) / num_layers


def plans_at(
    budgets: Sequence[float],
    num_layers: int,
    num_tokens: int,
    methods: Sequence[str] = tuple(METHODS),
) -> pd.DataFrame:
    """One row per budget and method that can meet it: budget, method, plan, share (what the plan really leaves)."""
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
    """Answers of one model under every plan of ``plans_at``, at test time only.

    One row per budget, method and question: see evaluation.evaluate; and ``difficult``, where the question is one that
    downsampling to the same budget gets wrong (VTC-Bench, arXiv 2510.07143). The model without compression is the
    method FULL in every budget. Methods that the model cannot do are left out, with a message.
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
    for budget in dict.fromkeys(plans.budget):
        frames.append(full.assign(budget=budget, method=FULL))
    answers = pd.concat(frames, ignore_index=True)
    answers["number"] = answers.groupby(["budget", "method"]).cumcount()
    down = answers[answers.method == DOWNSAMPLE].set_index(["budget", "number"]).correct
    answers["difficult"] = [
        not down.get(key, True) for key in zip(answers.budget, answers.number, strict=True)
    ]
    return answers


def accuracy(answers: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and its 95% bootstrap interval per budget, method and type ("overall" and "difficult" among them)."""
    difficult = answers[answers.difficult].assign(type="difficult")
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
    """``plans`` with the time of reading a prompt, pictures encoded along, and the cache's size, relative to FULL; and
    ``measured``, the share of token-layers that was left of these prompts' pictures: more or less than ``share`` where
    a method decides for itself how many stay."""
    asked = pictured(
        data, [question for _, question in zip(range(batch), data.questions(), strict=False)]
    )
    inputs = prompts(model, processor, asked)
    times = prefill_times(model, inputs, list(plans.plan), rounds, progress).set_index("plan")
    full = sum(depth_and_tokens(model)[1:]) * depth_and_tokens(model)[0]
    measured = {plan: _layer_tokens(model, inputs, plan).sum() / full for plan in plans.plan}
    return plans.assign(
        time=[times.ratio[plan] for plan in plans.plan],
        cache=[times.cache_ratio[plan] for plan in plans.plan],
        measured=[measured[plan] for plan in plans.plan],
    )


def headline(table: pd.DataFrame) -> str:
    """(a) in words: per budget the best method, and random drop beside it; table: from ``accuracy``."""
    overall = table[table.type == "overall"]
    lines = []
    for budget, part in overall.groupby("budget"):
        by_method = part.set_index("method")
        rest = by_method.drop(index=FULL)
        best = rest.accuracy.idxmax()
        lines.append(
            f"- {budget:.0%} of the tokens: best without training is {best} with {_share_text(rest.loc[best])}"
        )
        if "random drop" in rest.index and best != "random drop":
            lines[-1] += f"; random drop has {_share_text(rest.loc['random drop'])}"
    full = overall[overall.method == FULL].iloc[0]
    return "\n".join([f"Without compression: {_share_text(full)}.", "", *lines])


def _share_text(row: pd.Series) -> str:
    return f"{row.accuracy:.1%} ({row.low:.1%} to {row.high:.1%})"


@dataclass(frozen=True)
class Trained:
    """A method to train with. scheme: its stages; plan: in force while answering; changes: to the configuration."""

    scheme: Scheme
    plan: str = "none"
    changes: dict = field(default_factory=dict)


def trained_methods(num_layers: int, num_tokens: int, budget: float = 0.25) -> dict[str, Trained]:
    """What (b) trains: every method of METHODS that can meet ``budget``, published settings, projectors, staging."""
    plans = {
        method: plan_at(method, budget, num_layers, num_tokens)
        for method in METHODS
        if method != "PruMerge"
    }
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
    for name, projector in (("STF", "stf:2"), ("MBTF + STF", "mbtf+stf:2")):
        chosen[name] = Trained(Scheme.equal(name, "none"), changes={"projector": projector})
    return chosen


@torch.no_grad()
def tokens_left(
    folder: str | Path, data: LlavaData, plan: str, full: int, pictures: int = 64
) -> float:
    """Visual tokens per layer under ``plan`` as a share of ``full``, counted on the first pictures of ``data``."""
    model, processor, _ = open_model(folder)
    questions = list(islice((q for q in data.questions() if q["question"]), pictures))
    batch = prompts(model, processor, pictured(data, questions))
    return float(_layer_tokens(model, batch, plan).mean() / full)


def _layer_tokens(model, batch: dict, plan: str) -> np.ndarray:
    """(layers,) visual tokens that each decoder layer works on, the mean over the pictures of ``batch``."""
    depth, tokens = depth_and_tokens(model)
    counts = np.full(depth, float(tokens))
    for layer, groups in inspect.token_map(model, batch, plan).items():
        mean = np.mean([len(np.unique(row[row >= 0])) for row in groups])
        counts[0 if layer == VISION else layer :] = mean
    return counts


def sizes(config: TrainConfig) -> tuple[int, int]:
    """Decoder layers, and visual tokens of an image, of the model that ``config`` trains."""
    setup = build.prepare(config)
    return setup.num_layers, setup.num_tokens


def depth_and_tokens(model) -> tuple[int, int]:
    """Decoder layers, and visual tokens of an image, of a model with images of one size."""
    tokens = getattr(find_parts(model).base.config, "image_seq_length", None)
    if not tokens:
        raise BudgetError(
            "budgets need a model whose images all have the same number of visual tokens"
        )
    return len(find_parts(model).layers), tokens
