"""Estimate staged compression on 8 to 512 GPUs, without running it.

``python papers/scaling.py`` writes papers/scaling.md, and the hours in papers/REPRODUCE.md. Operations come from the
cost model, the speed of a GPU from the paper's own hours, and the batches from the sampler that training uses. The
lengths of the texts (``training.MIX``), the bandwidths and the speed of loading (``Cluster``) are assumptions, and so
is that the paper's hours are of 8 A100-80GB.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from benchmarks.training import MIX

from llavolta.cost.flops import cost_model
from llavolta.cost.planner import CAPTION_TOKENS, CAPTIONS, INSTRUCTIONS, memory_table, published_hours
from llavolta.cost.planner import GPUS as GPU_DATA
from llavolta.cost.references import reference_config
from llavolta.data import GroupedSampler
from llavolta.paths import PAPERS, PUBLISHED
from llavolta.train.schemes import EXTRA_SCHEMES, PAPER_SCHEMES, SCHEMES, Scheme, Stage

GPU_PAGE = PAPERS / "benchmarks" / "gpu-nvidia-h100-80gb-hbm3.csv"
PAGE, RECIPE = PAPERS / "scaling.md", PAPERS / "REPRODUCE.md"
TRAINED_ON = 8  # GPUs of the run whose hours the paper reports (assumed)
PLANS = [stage.plan for stage in SCHEMES["three-stage"].stages]
GPUS = (8, 32, 128, 512)
TOKENS_A_WORD = 1.3


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines.

    Attributes:
        node: GPUs of a node.
        inside: Bytes per second that a GPU moves to the GPUs of its node.
        across: Bytes per second that a GPU moves to other nodes.
        overlap: The share of communication that can overlap with computation.
        pictures: Images per second that a CPU core decodes and prepares.
    """

    node: int = 8
    inside: float = 200e9
    across: float = 20e9
    overlap: float = 0.9
    pictures: float = 60.0


def text_tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw random examples with turns and words as in ``training.MIX``.

    Args:
        count: Number of examples.
        seed: Seed of the generator.

    Returns:
        (count,) text tokens of each example, and (count,) whether it has an image.
    """
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
    """(3,) coefficients of an example's FLOPs, which are a quadratic in its text tokens."""
    model, at = cost_model(reference_config()), np.array([64.0, 512.0, 2048.0])
    return np.polyfit(at, [model.step(plan, t, images, checkpointing=True).total for t in at], 2)


def flops(plan: str, tokens: np.ndarray, has_image: np.ndarray) -> np.ndarray:
    """Compute the FLOPs of a training step of LLaVA-1.5-7B per example, with gradient checkpointing.

    Args:
        plan: The plan in force.
        tokens: Text tokens of each example.
        has_image: Whether each example has an image; of the same shape.

    Returns:
        FLOPs of each example, of the same shape.
    """
    return np.where(has_image, np.polyval(_quadratic(plan, 1), tokens), np.polyval(_quadratic(plan, 0), tokens))


def gpu_speed() -> float:
    """Compute the FLOP/s of a GPU in the run of 15.3 hours that the paper reports, if its texts are like MIX."""
    tokens, has_image = text_tokens(20_000)
    seconds = TRAINED_ON * published_hours()["single-stage"] * 3600
    return flops("none", tokens, has_image).mean() * INSTRUCTIONS / seconds


def simulate(plan: str, gpus: int, batch: int, engine: str, cluster: Cluster, grouped: bool = True) -> dict:
    """Simulate one stage of training.

    Args:
        plan: The plan in force.
        gpus: Number of GPUs.
        batch: Examples of each GPU in a step.
        engine: "zero2" or "zero3".
        cluster: Assumptions about the machines.
        grouped: Group examples by length and modality, as training does; False: in random order.

    Returns:
        Means over 40 steps. Seconds of a step: ideal (computing tokens that are not padding), padding, waiting (for
        the GPU with the longest rows), communication (that does not overlap), and seconds, their sum. efficiency: ideal
        / seconds. cores: CPU cores that a GPU needs for its images.
    """
    tokens, has_image = text_tokens(40 * gpus * batch, seed=1)
    if grouped:
        order = np.array(list(GroupedSampler(tokens + 576 * has_image, has_image, gpus * batch, 0)))
    else:
        order = np.random.default_rng(0).permutation(len(tokens))
    # (steps, gpus, batch) text tokens and whether there is an image
    rows, pictures = (values[order].reshape(-1, gpus, batch) for values in (tokens, has_image))
    speed = gpu_speed()
    # Each GPU pads its own rows to its longest one, and a step ends with the slowest GPU.
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
    """Bytes that a GPU sends in a step in bfloat16.

    ZeRO-3 gathers the weights twice and scatters gradients. ZeRO-2 scatters gradients and gathers the new weights.
    """
    rounds = {"zero2": 2, "zero3": 3}[engine]
    return rounds * 2 * sum(cost_model(reference_config()).parameters.values()) * (gpus - 1) / gpus


def weak(cluster: Cluster, batch: int = 16, grouped: bool = True) -> pd.DataFrame:
    """Simulate a fixed number of examples per GPU on growing numbers of GPUs, under ZeRO-3.

    Args:
        cluster: Assumptions about the machines.
        batch: Examples of each GPU in a step.
        grouped: As of ``simulate``.

    Returns:
        One row per number of GPUs and stage, with the columns of ``simulate``.
    """
    rows = [
        dict(GPUs=gpus, plan=plan) | simulate(plan, gpus, batch, "zero3", cluster, grouped)
        for gpus in GPUS
        for plan in PLANS
    ]
    return pd.DataFrame(rows).set_index(["GPUs", "plan"])


def strong(cluster: Cluster, whole: int = 128) -> pd.DataFrame:
    """Simulate a fixed batch that is split over growing numbers of GPUs.

    Args:
        cluster: Assumptions about the machines.
        whole: Examples of a step over all GPUs; by default the published batch.

    Returns:
        One row per number of GPUs: examples of each GPU, and per engine the seconds of the three-stage scheme's mean
        step, also relative to no compression.
    """
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
{machines} of them take the paper's {hours} hours, batches are drawn by the sampler that training uses. Assumed:
texts of {words:.0f} tokens, {inside:.0f} GB/s a GPU within a node of {node}, {across:.0f} GB/s between nodes,
{overlap:.0%} of the communication hidden as long as there is computation to hide it, {pictures:.0f} pictures a second
from a CPU core. Put your own in `papers/scaling.py` (`Cluster`);
`python papers/benchmarks/training.py train` measures the speeds.

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
    """Render papers/scaling.md.

    Args:
        cluster: Assumptions about the machines.
        batch: Examples of each GPU in a step.

    Returns:
        Markdown.
    """
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
        words=text_tokens(20_000)[0].mean(),
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


def work(scheme: Scheme) -> tuple[float, float]:
    """Compute the FLOPs of LLaVA-1.5-7B's alignment and tuning under ``scheme``."""
    tokens, has_image = text_tokens(20_000)
    model, mean, align = cost_model(reference_config()), tokens.mean(), scheme.align or Stage("none", 1)

    def cost(stage: Stage, text: float, **options) -> float:
        parts = model.stage(stage, text, 1, checkpointing=True, **options)
        return stage.share * sum(often * part.total for often, part in parts)

    whole = flops("none", tokens, has_image).mean()
    if any(stage.slow_every for stage in scheme.stages):  # of the mean text, relative to no compression on it
        whole *= sum(cost(stage, mean) for stage in scheme.stages) / cost(Stage("none", 1), mean)
    else:
        whole = sum(stage.share * flops(stage.plan, tokens, has_image).mean() for stage in scheme.stages)
    return CAPTIONS * cost(align, CAPTION_TOKENS, phase="align"), INSTRUCTIONS * whole


def speedup(scheme: Scheme, own: tuple[float, float] | None = None) -> float:
    """Compute how many times faster the recipe of a scheme is, by its FLOPs.

    Args:
        scheme: The scheme.
        own: Hours of alignment and tuning without compression, which weight the two phases; None: by their FLOPs.

    Returns:
        The speed-up.
    """
    (align, tuning), (first, second) = work(scheme), work(SCHEMES["single-stage"])
    left, right = own or (first, second)
    return (left + right) / (left * align / first + right * tuning / second)


def discounts() -> pd.DataFrame:
    """Compare the speed-ups that FLOPs predict with measured ones, of known trainings.

    Returns:
        One row per training: the predicted and the measured speed-up, and kept, the second over the first.
    """
    told = published_hours()
    dualspeed = pd.read_csv(PAPERS / "faster" / "published.csv").set_index("quantity").value
    faster = dualspeed["training of LLaVA-1.5 faster by"]
    gpu = pd.read_csv(GPU_PAGE).query("part == 'training' and logits == 'labelled rows'").set_index("plan")
    first, scheme = PLANS[0], SCHEMES["dualspeed"]
    tuning = work(SCHEMES["single-stage"])[1] / np.array([work(SCHEMES["four-stage-wider"])[1], work(scheme)[1]])
    rows = {
        "LLaVolta, four stages, tuning": (tuning[0], told["single-stage"] / told["four-stage-wider"]),
        f"stage I (`{first}`), steps on one H100": (gpu.implied[first], gpu.speedup[first]),
        "DualSpeed, if its figure is of tuning": (tuning[1], faster),
        "DualSpeed, if its figure is of the recipe": (speedup(scheme), faster),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["promised, times", "measured, times"])
    return table.assign(kept=table["measured, times"] / table["promised, times"]).rename_axis("training")


def gap() -> pd.DataFrame:
    """Look for an explanation of LLaVolta's own saving.

    Returns:
        The time of four stages relative to no compression, by what is counted.
    """
    scheme, told = SCHEMES["four-stage-wider"], published_hours()
    tokens, has_image = text_tokens(20_000)
    gpu = pd.read_csv(GPU_PAGE).query("part == 'training' and logits == 'labelled rows'").set_index("plan").seconds

    def mean(of) -> float:
        return sum(stage.share * of(stage.plan) for stage in scheme.stages) / of("none")

    def on(cluster: Cluster) -> float:
        return mean(lambda plan: simulate(plan, TRAINED_ON, 16, "zero3", cluster)["seconds"])

    rows = {f"FLOPs, texts of {tokens.mean():.0f} tokens": mean(lambda plan: flops(plan, tokens, has_image).mean())}
    for longer in (350, 500):
        rows[f"FLOPs, texts of {longer} tokens"] = mean(lambda plan: flops(plan, np.array([longer]), True)[0])  # noqa: B023
    rows["steps measured on one H100: tower, launches and optimizer are in it"] = mean(lambda plan: gpu[plan])
    rows["FLOPs, padding, waiting, and communication as assumed"] = on(Cluster())
    rows["the same, communication 20 times as slow and none of it hidden"] = on(Cluster(inside=10e9, overlap=0))
    rows["published"] = told["four-stage-wider"] / told["single-stage"]
    return pd.DataFrame({"of single-stage": rows}).rename_axis("what is counted")


def hours(gpus: int = 8) -> pd.DataFrame:
    """Estimate the hours of LLaVA-1.5-7B by scheme.

    Args:
        gpus: Number of GPUs.

    Returns:
        One row per phase or scheme: hours on A100 at the paper's speed, the same with the discount of ``discounts`` for
        tuning, hours on H100 at the same share of its peak, the time relative to single-stage (tuning alone, and with
        alignment), and GB of a GPU in the stage that needs most.
    """
    a100 = gpu_speed()
    h100 = a100 * GPU_DATA["H100-SXM"].peak / GPU_DATA["A100-80GB"].peak
    known, model = discounts().kept, cost_model(reference_config())
    best, worst = known.iloc[:3].max(), known.iloc[:3].min()  # of tuning
    base, rows = work(SCHEMES["single-stage"]), {}

    def row(name: str, flops: float, plans: list[str], both: float | None = None) -> None:
        taken = flops / (gpus * a100 * 3600)
        text = int(text_tokens(20_000)[0].mean())
        memory = memory_table(model, plans, 16, gpus, True, text_tokens=text).total.max() if plans else math.nan
        rows[name] = {
            f"{gpus} x A100 (assumed), hours": taken,
            "with the discount": f"{taken / best:.1f} to {taken / worst:.1f}" if plans[:-1] else "",
            f"{gpus} x H100, hours": flops / (gpus * h100 * 3600),
            "of single-stage": flops / base[1],
            "with alignment": math.nan if both is None else both / sum(base),
            "GB a GPU": memory,
        }

    row("projector alignment", base[0], [])
    for name, scheme in (PAPER_SCHEMES | EXTRA_SCHEMES).items():
        align, tuning = work(scheme)
        if scheme.align:
            row(f"projector alignment, {name}", align, [])
        row(name, tuning, [stage.plan for stage in scheme.stages], align + tuning)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


RECIPE_TEXT = """{hours}

GB a GPU: weights, gradients and optimizer under ZeRO-3, and activations of 16 examples with checkpointing, in the stage
that needs most. A scheme that ends without compression needs as much as `single-stage`.

**What such promises are worth.** The model counts operations. Where it can be held against trainings, less was saved:

{discounts}

So the hours with the discount are those of the model at {worst:.2f} to {best:.2f} of its speed-up. `fast` is promised
{promised:.1f} times over alignment and tuning, {own:.1f} with the {alignment:g} and {tuning:g} hours of LLaVA's page.
At what DualSpeed kept of such a promise, it is about {low:.1f} to {high:.1f} times.
Alignment is off the other way: the model says {model_alignment:.1f} hours, LLaVA's page {alignment:g}
for 7B on 8 A100-80GB.

What could explain the four stages:

{gap}

Nothing in the model does by itself. Were the rest a time that compression does not touch (reading and decoding
pictures, saving, waiting for other machines), it would be {fixed:.1f} of the {published:g} hours.
Then the GPUs would be {faster:.2f} times as fast as assumed here, and alignment would take {align_then:.1f} hours,
nearer to LLaVA's {alignment:g}. Both errors point to such a time. It is not measured."""


def recipe_block() -> str:
    """Render the block between the marks in REPRODUCE.md."""
    known, told, fast = discounts(), published_hours(), SCHEMES["fast"]
    kept, taken = known.kept, gap()["of single-stage"]
    own = pd.read_csv(PUBLISHED).query("claim == 'LLaVA-1.5'").set_index("quantity").value.astype(float)
    alignment, tuning = own["alignment, 7B on 8 A100-80GB"], own["tuning, 7B on 8 A100-40GB"]
    promised, of_own = speedup(fast), speedup(fast, (alignment, tuning))
    dualspeed = speedup(SCHEMES["dualspeed"], (alignment, tuning))
    low = min(promised * kept.min(), of_own * known["measured, times"].iloc[-1] / dualspeed)
    whole, promise = told["single-stage"], taken.iloc[0]
    fixed = (told["four-stage-wider"] - promise * whole) / (1 - promise)
    model_alignment = work(SCHEMES["single-stage"])[0] / (TRAINED_ON * gpu_speed() * 3600)
    return RECIPE_TEXT.format(
        hours=_markdown(hours()),
        discounts=_markdown(known),
        gap=_markdown(taken.to_frame()),
        worst=kept.iloc[:3].min(),
        best=kept.max(),
        promised=promised,
        own=of_own,
        alignment=alignment,
        tuning=tuning,
        low=low,
        high=promised * kept.max(),
        model_alignment=model_alignment,
        fixed=fixed,
        published=whole,
        faster=whole / (whole - fixed),
        align_then=model_alignment * (whole - fixed) / whole,
    )


def recipe(text: str) -> str:
    """Return the text of REPRODUCE.md with its block of hours brought up to date."""
    start, end = "<!-- hours: python papers/scaling.py -->\n", "\n<!-- end of hours -->"
    before, rest = text.split(start)
    return before + start + recipe_block() + end + rest.split(end)[1]


def _markdown(table: pd.DataFrame) -> str:
    flat = table.reset_index()
    lines = ["| " + " | ".join(map(str, flat.columns)) + " |", "|" + "---|" * len(flat.columns)]
    for row in flat.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value) if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages. Returns the exit code: 1 if a page is out of date."""
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
