"""Staged compression on 8 to 512 GPUs, on paper: ``python papers/scaling.py`` writes papers/scaling.md, and the hours
in papers/REPRODUCE.md.

Operations come from the cost model, the speed of a GPU from the paper's own hours, the batches from the sampler that
training uses, on texts as long as those of mix665k. Bandwidths and the speed of loading are assumptions (``Cluster``).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from llavolta.cost.bench import CAPTIONS, INSTRUCTIONS
from llavolta.cost.flops import cost_model
from llavolta.cost.planner import CAPTION_TOKENS, published_hours
from llavolta.cost.planner import GPUS as GPU_DATA
from llavolta.cost.references import reference_config
from llavolta.cost.throughput import MIX
from llavolta.data import GroupedSampler
from llavolta.paths import PAPERS
from llavolta.train.schemes import OURS, SCHEMES

PAGE, RECIPE = PAPERS / "scaling.md", PAPERS / "REPRODUCE.md"
TRAINED_ON = 8  # GPUs, of the run whose hours the paper reports
PLANS = [stage.plan for stage in SCHEMES["three-stage"].stages]
GPUS = (8, 32, 128, 512)
TOKENS_A_WORD = 1.3


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines.

    inside, across: bytes a second that a GPU moves to the GPUs of its node, to other nodes. overlap: the share of
    communication that can hide behind computation. pictures: that a CPU core decodes and prepares in a second.
    """

    node: int = 8
    inside: float = 200e9
    across: float = 20e9
    overlap: float = 0.9
    pictures: float = 60.0


def text_tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, has_image) of ``count`` random examples: turns and words as in ``bench.MIX``."""
    rng = np.random.default_rng(seed)
    folders = list(MIX)
    share = np.array([MIX[name][0] for name in folders], float)
    chosen = rng.choice(len(folders), count, p=share / share.sum())
    fewest, most, words = (np.array([MIX[name][column] for name in folders])[chosen] for column in (1, 2, 3))
    turns = 2 * rng.integers(fewest, most + 1)
    mean, spread = turns * (1 + words) / 2, np.sqrt(turns * (words**2 - 1) / 12)  # of a sum of uniform draws
    tokens = TOKENS_A_WORD * rng.normal(mean, spread)
    return np.clip(tokens, 20, 2048).round().astype(int), np.array([bool(name) for name in folders])[chosen]


@cache
def _quadratic(plan: str, images: int) -> np.ndarray:
    """FLOPs of an example's step as a quadratic in its text tokens, which they are."""
    model, at = cost_model(reference_config()), np.array([64.0, 512.0, 2048.0])
    return np.polyfit(at, [model.step(plan, t, images, checkpointing=True).total for t in at], 2)


def flops(plan: str, tokens: np.ndarray, has_image: np.ndarray) -> np.ndarray:
    """FLOPs of a training step of LLaVA-1.5-7B per example, with gradient checkpointing."""
    return np.where(has_image, np.polyval(_quadratic(plan, 1), tokens), np.polyval(_quadratic(plan, 0), tokens))


def gpu_speed() -> float:
    """FLOP/s of a GPU in the run of 15.3 hours that the paper reports, on texts like ours."""
    tokens, has_image = text_tokens(20_000)
    seconds = TRAINED_ON * published_hours()["single-stage"] * 3600
    return flops("none", tokens, has_image).mean() * INSTRUCTIONS / seconds


def simulate(plan: str, gpus: int, batch: int, engine: str, cluster: Cluster, grouped: bool = True) -> dict:
    """One stage on ``gpus`` GPUs with ``batch`` examples each: means over the steps of one pass over 40 batches.

    Seconds of a step: ideal (all GPUs busy with tokens that are not padding), padding, waiting (for the GPU with the
    longest rows), communication (what does not hide behind computation), and their sum, seconds. efficiency:
    ideal / seconds. cores: CPU cores a GPU needs for its pictures.
    """
    tokens, has_image = text_tokens(40 * gpus * batch, seed=1)
    if grouped:
        order = np.array(list(GroupedSampler(tokens + 576 * has_image, has_image, gpus * batch, 0)))
    else:
        order = np.random.default_rng(0).permutation(len(tokens))
    rows, pictures = (values[order].reshape(-1, gpus, batch) for values in (tokens, has_image))
    speed = gpu_speed()
    padded = np.broadcast_to(rows.max(2, keepdims=True), rows.shape)
    own, computed = (flops(plan, length, pictures).sum(2) / speed for length in (rows, padded))
    slowest = computed.max(1)
    traffic = _traffic(engine, gpus) / (cluster.across if gpus > cluster.node else cluster.inside)
    hidden = np.minimum(cluster.overlap * traffic, slowest)
    parts = {
        "ideal": own.mean(),
        "padding": (computed - own).mean(),
        "waiting": (slowest - computed.mean(1)).mean(),
        "communication": (traffic - hidden).mean(),
    }
    seconds = sum(parts.values())
    rate = pictures.sum() / (seconds * len(rows) * gpus)
    return parts | dict(seconds=seconds, efficiency=parts["ideal"] / seconds, cores=rate / cluster.pictures)


def _traffic(engine: str, gpus: int) -> float:
    """Bytes that a GPU sends in a step of bfloat16: ZeRO-3 gathers the weights twice and scatters gradients; ZeRO-2
    scatters gradients and gathers the new weights."""
    rounds = {"zero2": 2, "zero3": 3}[engine]
    return rounds * 2 * sum(cost_model(reference_config()).parameters.values()) * (gpus - 1) / gpus


def weak(cluster: Cluster, batch: int = 16, grouped: bool = True) -> pd.DataFrame:
    """``batch`` examples a GPU, on more and more GPUs, ZeRO-3: a row for each number of GPUs and stage."""
    rows = [
        dict(GPUs=gpus, plan=plan) | simulate(plan, gpus, batch, "zero3", cluster, grouped)
        for gpus in GPUS
        for plan in PLANS
    ]
    return pd.DataFrame(rows).set_index(["GPUs", "plan"])


def strong(cluster: Cluster, whole: int = 128) -> pd.DataFrame:
    """The published batch of ``whole`` examples, split over more and more GPUs: seconds of the three-stage scheme's
    mean step over those without compression, by engine, and examples a GPU."""
    rows = []
    for gpus in (8, 32, 128):
        row = dict(GPUs=gpus, examples=whole // gpus)
        for engine in ("zero2", "zero3"):
            seconds = [simulate(plan, gpus, whole // gpus, engine, cluster)["seconds"] for plan in PLANS]
            row |= {f"{engine}, s": np.mean(seconds), f"{engine}, of uncompressed": np.mean(seconds) / seconds[-1]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("GPUs")


TEMPLATE = """# Staged compression on many machines

Written by `python papers/scaling.py`; do not edit. LLaVA-1.5-7B under `three-stage`, gradient checkpointing,
bfloat16. Nothing here was run on GPUs: operations are the cost model's, the speed ({speed:.0f} TFLOP/s) is what makes
{machines} of them take the paper's {hours} hours, batches are drawn by the sampler that training uses from texts as
long as mix665k's. Assumed: {inside:.0f} GB/s a GPU within a node of {node}, {across:.0f} GB/s between nodes,
{overlap:.0%} of the communication hidden as long as there is computation to hide it, {pictures:.0f} pictures a second
from a CPU core. Put your own in `papers/scaling.py` (`Cluster`); `python -m llavolta.bench train` measures the speeds.

## {batch} examples a GPU, ZeRO-3

Seconds of a step and where they go; means over the batches. ideal: every GPU computes tokens that are not padding.
waiting: for the GPU with the longest rows. cores: CPU cores that a GPU needs for its pictures.

{weak}

## The published batch of 128, split

{strong}

## What bounds it, and what to set

- **Waiting grows with compression.** A picture is the same work in every row and text is not. In stage I (`{first}`)
  text is most of what is left: on {last} GPUs {waiting:.0%} of a step is waiting, against {waiting_plain:.0%} without
  compression; in random order it would be {waiting_loose:.0%}. Training here always groups by length and modality.
- **Communication stays, computation shrinks.** ZeRO-3 moves {zero3:.0f} GB a GPU and step whatever the plan. With
  {batch} examples a GPU it hides: it takes {near:.2f} of the uncompressed time on 8 GPUs, {far:.2f} on {last}. With
  the published batch split over 128 GPUs, one example each, it does not: {split:.2f}, and a step is mostly traffic.
  Use `deepspeed: zero2` ({zero2:.0f} GB) where the model fits, or give each GPU more examples and accumulate less:
  `batch_size` up, `global_batch` kept; compression leaves room for them.
- **Loading must keep up with stage I**, which consumes pictures {rate:.1f} times as fast: {cores:.2f} cores a GPU in
  place of {cores_plain:.2f}. Set `num_workers` for stage I, not for the mean.
- **The batch.** {batch} examples on each of {last} GPUs are {whole} a step, {times} times the published batch: learning
  rate and number of steps are then an open question of optimisation that this page does not answer.
"""


def render(cluster: Cluster, batch: int = 16) -> str:
    """The page, in Markdown."""
    table, loose, split = weak(cluster, batch), weak(cluster, batch, grouped=False), strong(cluster)
    plain = table.seconds.xs("none", level="plan")
    of_plain = table.seconds.div(plain, level="GPUs")
    ratio = of_plain.groupby("GPUs").mean()  # the stages are equally long
    (first, last), near = (PLANS[0], GPUS[-1]), GPUS[0]
    waits = {name: one.waiting / one.seconds for name, one in (("grouped", table), ("loose", loose))}
    shown = table.assign(**{"waiting, random order": loose.waiting, "of uncompressed": of_plain})
    return TEMPLATE.format(
        speed=gpu_speed() / 1e12,
        machines=TRAINED_ON,
        hours=published_hours()["single-stage"],
        inside=cluster.inside / 1e9,
        across=cluster.across / 1e9,
        node=cluster.node,
        overlap=cluster.overlap,
        pictures=cluster.pictures,
        batch=batch,
        weak=_markdown(shown),
        strong=_markdown(split),
        first=first,
        last=last,
        waiting=waits["grouped"][last, first],
        waiting_plain=waits["grouped"][last, "none"],
        waiting_loose=waits["loose"][last, first],
        zero2=_traffic("zero2", last) / 1e9,
        zero3=_traffic("zero3", last) / 1e9,
        near=ratio[near],
        far=ratio[last],
        split=split["zero3, of uncompressed"].iloc[-1],
        rate=table.cores[near, first] / table.cores[near, "none"],
        cores=table.cores[near, first],
        cores_plain=table.cores[near, "none"],
        whole=batch * last,
        times=batch * last // 128,
    )


def hours(gpus: int = 8) -> pd.DataFrame:
    """Hours of LLaVA-1.5-7B by scheme on ``gpus`` GPUs: A100 at the paper's speed, H100 at that share of its peak;
    of the last column, alignment and tuning together."""
    tokens, has_image = text_tokens(20_000)
    model, a100 = cost_model(reference_config()), gpu_speed()
    speeds = {"A100-80GB": a100, "H100": a100 * GPU_DATA["H100-SXM"].peak / GPU_DATA["A100-80GB"].peak}

    def alignment(plan: str) -> float:
        return CAPTIONS * model.step(plan, CAPTION_TOKENS, 1, phase="align", checkpointing=True).total

    work, whole = {"projector alignment": alignment("none")}, {}
    for name, scheme in (SCHEMES | OURS).items():
        example = sum(stage.share * flops(stage.plan, tokens, has_image).mean() for stage in scheme.stages)
        first = work["projector alignment"]
        if scheme.align:
            first = work[f"projector alignment, {name}"] = scheme.align.share * alignment(scheme.align.plan)
        work[name] = INSTRUCTIONS * example
        whole[name] = first + work[name]
    run = pd.Series(work, name="FLOPs").rename_axis("run")
    table = pd.DataFrame({f"{gpus} x {name}, hours": run / (gpus * speed * 3600) for name, speed in speeds.items()})
    both = pd.Series(whole)  # which the rows of alignment alone are not in
    return table.assign(**{"of single-stage": run / run["single-stage"], "with alignment": both / both["single-stage"]})


def recipe(text: str) -> str:
    """REPRODUCE.md's ``text`` with its table of hours brought up to date."""
    start, end = "<!-- hours: python papers/scaling.py -->\n", "\n<!-- end of hours -->"
    before, rest = text.split(start)
    return before + start + _markdown(hours()) + end + rest.split(end)[1]


def _markdown(table: pd.DataFrame) -> str:
    flat = table.reset_index()
    lines = ["| " + " | ".join(map(str, flat.columns)) + " |", "|" + "---|" * len(flat.columns)]
    for row in flat.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value) if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python papers/scaling.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    options = parser.parse_args(arguments)
    pages = {PAGE: render(Cluster()), RECIPE: recipe(RECIPE.read_text())}
    for page, text in pages.items():
        if not options.check:
            page.write_text(text)
            print(f"written: papers/{page.name}")
        elif not page.exists() or page.read_text() != text:
            print(f"error: papers/{page.name} is out of date; run python papers/scaling.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
