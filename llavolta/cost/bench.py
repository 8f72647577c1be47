"""Timing, side by side in one process: each plan in turn on the same batches, medians, ratios to no compression."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from llavolta.compression.compressors import VisualTokens
from llavolta.compression.families import find_parts, unwrap
from llavolta.compression.labelled import IGNORED
from llavolta.compression.masks import cache_bytes
from llavolta.compression.patch import compress
from llavolta.compression.plan import parse_plan, tokens_per_layer
from llavolta.compression.probe import TowerLayer, TowerProbe
from llavolta.cost.flops import cost_model, of_tower
from llavolta.cost.planner import CAPTION_TOKENS, fit_speed
from llavolta.data import Collator, LlavaData
from llavolta.train.build import visual_tokens
from llavolta.train.config import TrainConfig
from llavolta.train.dualspeed import add_isolator, fast_mode, slow_mode
from llavolta.train.models import autocasts, load_model, set_trainable, with_adapters
from llavolta.train.schemes import ISOLATOR, SCHEMES, Scheme, Stage
from llavolta.worlds import HOMES, WORLDS

CAPTIONS, INSTRUCTIONS = 558_128, 665_298  # that LLaVA-1.5 is aligned and tuned on


def now(device: torch.device) -> float:
    """Seconds of a clock, when all that was asked of ``device`` is done.

    On a CPU with one thread it is the clock of this process's CPU time, which other processes do not advance.
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
    """Seconds of a training step (forward, backward, AdamW) under each plan, interleaved on the same ``batches``.

    A plan may also be a stage of a scheme: of one with slow steps it is the mean over its fast and slow steps, of one
    that is drawn the mean over its plans.
    The learning rate is 0, so the model stays as it is. config: a run's, whose adapters and precision the steps have
    (default: float32, all but the tower trains). Returns one row per plan: seconds (median), ratio (the median
    over rounds of this plan's time over that of "none" in the same round), flops_ratio (what the FLOPs promise).
    """
    stages = {str(plan): plan if isinstance(plan, Stage) else Stage(plan, 1) for plan in ["none", *plans]}
    training, trained = model.training, [(p, p.requires_grad) for p in model.parameters()]
    own, name = getattr(unwrap(model), ISOLATOR, None), model.name_or_path
    options = dict(train_tower=config.train_tower, lora_rank=config.lora_rank) if config else {}
    set_trainable(model.train(), phase, options.get("train_tower", False))
    adapted = model
    if config and config.lora_rank and phase == "instruct":
        adapted = with_adapters(model, config.changed(quantize=None), name)
    precision = torch.autocast(model.device.type, torch.bfloat16, enabled=bool(config) and autocasts(config))
    try:
        with precision:
            return _step_times(adapted, batches, stages, rounds, dict(phase=phase, **options), progress)
    finally:
        delattr(unwrap(model), ISOLATOR)
        if own is not None:
            setattr(unwrap(model), ISOLATOR, own)
        if adapted is not model:
            adapted.unload()
            model.name_or_path = model.config.name_or_path = name
        model.train(training)
        model.zero_grad()
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


def _step_times(model, batches, stages: dict[str, Stage], rounds: int, trains: dict, progress: bool) -> pd.DataFrame:
    add_isolator(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    device = next(model.parameters()).device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]

    drawn = {name: stage.fixed() for name, stage in stages.items() if len(stage.choices) > 1}

    def step(stage: Stage, slow: bool) -> None:
        for batch in batches:
            with slow_mode(model, stage, batch) if slow else fast_mode(model, stage):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tasks = {name: partial(step, stage, False) for name, stage in stages.items() if name not in drawn}
    tasks |= {choice.plan: partial(step, choice, False) for choices in drawn.values() for choice in choices}
    slow = {name: f"slow step of {name}" for name, stage in stages.items() if stage.slow_every}
    tasks |= {slow[name]: partial(step, stages[name], True) for name in slow}
    taken = pd.DataFrame(interleaved(tasks, rounds, device, progress) / len(batches), columns=list(tasks))
    for name in slow:
        taken[name] += (taken[slow[name]] - taken[name]) / stages[name].slow_every
    for name, choices in drawn.items():
        taken[name] = taken[[choice.plan for choice in choices]].mean(axis=1)
    seconds = taken[list(stages)]
    text, images, labelled = _sizes(model, batches)
    if not visual_tokens(unwrap(model).config):  # by the picture: all those of a batch count as one
        images = len(batches) / sum(len(batch["input_ids"]) for batch in batches)
        trains = {**trains, "pictures": of_tower(next((b for b in batches if "pixel_values" in b), {})) or None}
    costs = [cost_model(model.config).stage(stage, text, images, labelled, **trains) for stage in stages.values()]
    flops = np.array([sum(often * cost.total for often, cost in parts) for parts in costs])
    return pd.DataFrame(
        {
            "plan": list(stages),
            "seconds": seconds.median().to_numpy(),
            "ratio": seconds.div(seconds["none"], axis=0).median().to_numpy(),
            "flops_ratio": flops / flops[0],
        }
    )


def _sizes(model, batches) -> tuple[float, float, float]:
    """Text tokens, images and labelled rows per example, means over the batches; a clip counts as its frames."""
    examples = sum(len(batch["input_ids"]) for batch in batches)
    images = sum(len(batch.get("pixel_values", ())) for batch in batches)
    images += sum(batch["pixel_values_videos"].shape[:2].numel() for batch in batches if "pixel_values_videos" in batch)
    rows = sum(batch["input_ids"].numel() for batch in batches)
    placeholders = torch.tensor(list(find_parts(model).visual_ids.values()))
    visual = sum(
        torch.isin(batch["input_ids"], placeholders.to(batch["input_ids"].device)).sum().item() for batch in batches
    )
    labelled = sum((batch["labels"] != IGNORED).sum().item() for batch in batches)
    return (rows - visual) / examples, images / examples, labelled / examples


@dataclass(frozen=True)
class Sizes:
    """A random LLaVA and batch to time: ``width`` and ``layers`` of the decoder, tokens and examples of the batch.

    The tower is tiny, so that the decoder is what is measured; a third of the text tokens are labelled.
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
        """A LlavaForConditionalGeneration with random weights, made on ``device``."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        grid = math.isqrt(self.visual)
        if grid**2 != self.visual:
            raise ValueError(f"visual must be a square number of tokens, not {self.visual}")
        tower = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        heads = max(1, self.width // 64)
        decoder = dict(hidden_size=self.width, intermediate_size=self.width * 11 // 4, num_attention_heads=heads)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=4 * grid, patch_size=4),
            text_config=LlamaConfig(**decoder, num_hidden_layers=self.layers, vocab_size=self.vocabulary),
            image_token_index=5,
            image_seq_length=self.visual,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlavaForConditionalGeneration(config).to(getattr(torch, self.dtype))

    def inputs(self) -> dict:
        """One batch: a beginning token, the picture's placeholders, text; labels on the last third of the text."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, self.vocabulary, (self.batch, self.visual + self.text), generator=generator)
        ids[:, 1 : 1 + self.visual] = 5
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.text // 3 :] = ids[:, -self.text // 3 :]
        side = 4 * math.isqrt(self.visual)
        pixels = torch.randn(self.batch, 3, side, side, generator=generator).to(getattr(torch, self.dtype))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        return {name: value.to(self.device) for name, value in batch.items()}


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, progress: bool = True):
    """Seconds (rounds, tasks) of each task, the tasks in a new random order each round, after a round of warm-up."""
    names = list(tasks)
    seconds = np.zeros((rounds + 1, len(names)))
    for turn in tqdm(range(rounds + 1), desc="timing", disable=not progress, leave=False):
        for column in np.random.default_rng(turn).permutation(len(names)):
            start = now(device)
            tasks[names[column]]()
            seconds[turn, column] = now(device) - start
    return seconds[1:]


def step_report(sizes: Sizes, rounds: int = 5, progress: bool = True) -> dict[str, pd.DataFrame]:
    """Everything ``python -m llavolta.bench step`` prints: tables "step", "overhead", "memory" and "prefill"."""
    half = sizes.layers // 2
    plans = [f"{layer}:avgpool:{stride}" for layer, stride in ((2, 8), (half, 8), (2, 2), (half, 2))]
    plans = list(dict.fromkeys(plans))  # in a model of four layers two of them are the same
    model, batch = sizes.model(), sizes.inputs()
    step = step_times(model, [batch], plans, rounds, progress=progress)
    step["speedup"] = 1 / step.ratio
    step["promised"] = 1 / step.flops_ratio
    step["kept_promise"] = step.speedup / step.promised
    return {
        "step": step,
        "overhead": _overhead(sizes, rounds, progress),
        "memory": _memory(sizes),
        "prefill": prefill_times(model.eval(), batch, plans, rounds, progress),
    }


def _backward(model, batch: dict, plan: str | None, labelled_only: bool | None) -> None:
    with compress(model, plan, labelled_only=labelled_only) if plan else nullcontext():
        model(**batch).loss.backward()
    model.zero_grad()


_VARIANTS = {"stock": (None, None), "stride 1": ("2:avgpool:1", None), "labelled rows only": ("none", True)}


def _overhead(sizes: Sizes, rounds: int, progress: bool) -> pd.DataFrame:
    """Forward and backward without compression, relative to the stock model, at the vocabulary of Vicuna."""
    sizes = replace(sizes, vocabulary=32000)
    model, batch = sizes.model().train(), sizes.inputs()
    tasks = {name: partial(_backward, model, batch, *how) for name, how in _VARIANTS.items()}
    seconds = interleaved(tasks, rounds, torch.device(sizes.device), progress)
    return pd.DataFrame(
        {
            "variant": list(tasks),
            "seconds": np.median(seconds, axis=0),
            "ratio": np.median(seconds / seconds[:, [0]], axis=0),
        }
    )


def _memory(sizes: Sizes) -> pd.DataFrame:
    """Peak memory of a step above the model's own, each variant in a fresh process on the CPU."""
    sizes = replace(sizes, vocabulary=32000)
    plans = {**_VARIANTS, "2:avgpool:8": ("2:avgpool:8", None)}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = [pool.submit(_peak, sizes, *how).result() for how in plans.values()]
    return pd.DataFrame({"variant": list(plans), "peak_MB": np.array(peaks) / 1e6, "ratio": np.array(peaks) / peaks[0]})


def _peak(sizes: Sizes, plan: str | None, labelled_only: bool | None) -> int:
    """Bytes that a forward and backward pass needs above the weights."""
    model, batch = sizes.model().train(), sizes.inputs()
    if sizes.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _backward(model, batch, plan, labelled_only)
        return torch.cuda.max_memory_allocated() - before
    forget_peak()  # importing and building may have taken more than the step does
    before = peak_resident()
    _backward(model, batch, plan, labelled_only)
    return peak_resident() - before


def forget_peak() -> None:
    """Let ``peak_resident`` count from what this process holds now, where Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most bytes that this process ever held (Linux; getrusage would count the parent process, too)."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError(f"no {status}: peak memory on the CPU is measured on Linux only")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


@torch.no_grad()
def prefill_times(model, batch: dict, plans: Sequence[str], rounds: int = 5, progress: bool = True) -> pd.DataFrame:
    """Time of reading the prompt into a cache, and the bytes of the cache, relative to no compression."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    size: dict[str, int] = {}

    def prefill(plan: str) -> None:
        cache = DynamicCache(config=model.config.get_text_config())
        with compress(model, plan):
            model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        size[plan] = cache_bytes(cache)

    plans = list(dict.fromkeys(["none", *plans]))
    seconds = interleaved({plan: partial(prefill, plan) for plan in plans}, rounds, model.device, progress)
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


ZOO = (
    "vision:cls:0.25",
    "vision:visionzip:0.25",
    "vision:vispruner:0.25",
    "vision:tome:0.25",
    "vision:kmeans:0.25",
    "vision:prumerge+:0.25",
    "0:avgpool2d:2",
    "0:divprune:0.25",
    "0:cdpruner:0.25",
    "0:holov:0.25",
    "0:vscan:0.25",
    "0:restore:divprune:0.25",
    "2:fastv:0.25",
    "2:dart:0.25",
    "3:sparsevlm:0.25",
    "4:pact:0.55",
)
"""Every method at about a quarter of the tokens."""


def zoo_times(
    width: int = 1024, layers: int = 24, grid: int = 24, batch: int = 1, rounds: int = 3, progress: bool = True
) -> pd.DataFrame:
    """The own time of each method of ZOO in a random LLaVA whose tower and decoder have ``layers`` of ``width``, with
    grid x grid visual tokens and 60 of text, as a share of a prefill and of a training step (tower frozen) without it.

    One row per plan: own (seconds of the compressor alone, median), prefill and step (its share of theirs), tokens
    (left, mean over layers), saved (what the plan saves of a prefill's time, its own time counted in: below 0 where a
    method costs more than it saves).
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, intermediate_size=4 * width, image_size=14 * grid, patch_size=14),
        text_config=LlamaConfig(**sizes, intermediate_size=width * 11 // 4, vocab_size=2000),
        image_token_index=5,
        image_seq_length=grid * grid,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = Sizes(visual=grid * grid, batch=batch).inputs()
    inputs["pixel_values"] = torch.randn(batch, 3, 14 * grid, 14 * grid)
    own: dict[str, float] = {}

    def timed(plan: str) -> float:
        """Seconds of the plan's compressors, called again with what they were given, while their layers are there."""
        taken = []

        def again(layer, tokens, out) -> None:
            compressor = parse_plan(plan)[layer]
            taken.append(min(_seconds(partial(compressor, tokens)) for _ in range(rounds)))

        with torch.no_grad(), compress(model, plan, observe=again):
            model(**{name: value for name, value in inputs.items() if name != "labels"}, logits_to_keep=1)
        return sum(taken)

    for plan in tqdm(ZOO, desc="methods", disable=not progress, leave=False):
        own[plan] = timed(plan)
    prefills = prefill_times(model, inputs, ZOO, rounds, progress).set_index("plan")
    step = step_times(model, [inputs], [], rounds, progress=progress).seconds.iloc[0]
    rows = [
        dict(
            plan=plan,
            tokens=float(np.mean(tokens_per_layer(plan, layers, grid * grid))),
            own=own[plan],
            prefill=own[plan] / prefills.seconds["none"],
            step=own[plan] / step,
            saved=1 - prefills.ratio[plan],
        )
        for plan in ZOO
    ]
    return pd.DataFrame(rows)


def _seconds(task: Callable[[], object]) -> float:
    start = now(torch.device("cpu"))
    task()
    return now(torch.device("cpu")) - start


BEFORE_PROJECTOR = (
    "random:0.25",
    "avgpool:4",
    "avgpool2d:2",
    "downsample:0.25",
    "kmeans:0.25",
    "prumerge",
    "prumerge+",
)


def tower_tokens(images: int, grid: int = 24, width: int = 1024) -> VisualTokens:
    """Random features (images, grid^2, width), queries and keys, as a compressor at "vision" gets them."""
    length, generator = grid * grid, torch.Generator().manual_seed(0)
    hidden, query, key = (
        torch.randn(*shape, width, generator=generator) for shape in ((images, length), (images,), (images, length + 1))
    )
    query = torch.cat([query[:, None], torch.randn(images, length, width, generator=generator)], dim=1)
    heads = max(1, width // 64)
    layers = {name: TowerLayer(query.clone(), key.clone(), heads) for name in ("last", "selected", "early")}
    mask = torch.ones(images, length, dtype=torch.bool)
    positions = torch.arange(length)[None, :, None].expand(images, -1, -1)
    sides = torch.full((images, 2), grid)
    return VisualTokens(hidden, mask, positions, sides, probe=TowerProbe(layers, length, True))


def prumerge_loop(tokens: VisualTokens, plus: bool = False, neighbours: int = 32) -> list[Tensor]:
    """PruMerge (``plus``: PruMerge+) word for word, image by image and token by token: (M, C) of each image. Slow."""
    results = []
    last = tokens.probe.layers["last"]
    for x, query, keys in zip(tokens.hidden, last.query[:, 0], last.key, strict=True):
        a = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(len(query)), 0)[-len(x) :]
        keys, places = keys[-len(x) :], range(len(x))
        low, high = np.percentile(a.numpy(), [25, 75])
        ranked = sorted(places, key=lambda j: -a[j].item())
        kept = ranked[: sum(value > high + 1.5 * (high - low) for value in a.tolist())]
        if plus:
            step = max(1, int(int(len(x) / max(1, len(kept))) / 3))
            kept = kept + [j for j in places[::step] if j not in kept]
        merged = []
        for i in sorted(kept):
            alike = {j: torch.dot(keys[i], keys[j]) / (keys[i].norm() * keys[j].norm()) for j in places if j != i}
            nearest = sorted(alike, key=lambda j: -alike[j].item())[:neighbours]
            merged.append(x[i] + sum(a[j] * x[j] for j in nearest))
        if len(kept) < len(x):
            merged.append(sum(a[j] * x[j] for j in places if j not in kept))
        results.append(torch.stack(merged))
    return results


@torch.no_grad()
def compressor_times(
    images: int = 32,
    tower_images: int = 4,
    grid: int = 24,
    width: int = 1024,
    layers: int = 24,
    rounds: int = 5,
    progress: bool = True,
) -> pd.DataFrame:
    """Seconds of each compressor on a vision tower's output of ``images`` x ``grid``^2 tokens.

    loop: how many times longer ``prumerge_loop`` takes on the same tokens (one round of it). tower: the compressor's
    time over that of the forward pass of a CLIP ViT of this width and depth, both on ``tower_images`` images, the
    median over rounds in which they ran in turn.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    plans = {name: parse_plan(f"vision:{name}")["vision"] for name in BEFORE_PROJECTOR}
    device, tokens, few = (
        torch.device("cpu"),
        tower_tokens(images, grid, width),
        tower_tokens(tower_images, grid, width),
    )
    seconds = interleaved({name: partial(plan, tokens) for name, plan in plans.items()}, rounds, device, progress)

    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(1, width // 64))
    config = CLIPVisionConfig(**sizes, num_hidden_layers=layers, image_size=14 * grid, patch_size=14)
    tower, pixels = CLIPVisionModel(config).eval(), torch.randn(tower_images, 3, 14 * grid, 14 * grid)
    tasks = {"tower": partial(tower, pixels)} | {name: partial(plan, few) for name, plan in plans.items()}
    short = interleaved(tasks, rounds, device, progress)

    table = pd.DataFrame({"compressor": list(plans), "seconds": np.median(seconds, axis=0)})
    table["tokens_left"] = [plan(tokens).mask.sum(1).double().mean().item() for plan in plans.values()]
    table["tower"] = np.median(short[:, 1:] / short[:, :1], axis=0)
    table["loop"] = math.nan
    for name, plus in (("prumerge", False), ("prumerge+", True)):
        start = now(device)
        prumerge_loop(tokens, plus)
        row = table.compressor == name
        table.loc[row, "loop"] = (now(device) - start) / table.seconds[row]
    return table


PREDICTED = ("single-stage", "three-stage", "four-stage-wider", "four-stage-deeper")


def scheme_times(model, batches: Sequence[dict], rounds: int = 5, progress: bool = True) -> pd.DataFrame:
    """Measured against predicted time of four schemes relative to no compression.

    The speed is fitted to two of the measured steps, without compression and under the heaviest plan. Columns:
    measured, predicted, error (of the prediction, as a share).
    """
    depth = len(find_parts(model).layers)
    schemes = {name: SCHEMES[name].scaled(depth) for name in PREDICTED}
    heaviest = schemes["three-stage"].stages[0].plan
    plans = [stage.plan for scheme in schemes.values() for stage in scheme.stages]
    steps = step_times(model, batches, plans, rounds, progress=progress).set_index("plan")
    text, images, labelled = _sizes(model, batches)
    told = cost_model(model.config)
    costs = {plan: told.step(plan, text, images, labelled) for plan in steps.index}
    known = ["none", heaviest]
    speed = fit_speed([costs[plan] for plan in known], [steps.ratio[plan] for plan in known])
    rows = []
    for name, scheme in schemes.items():
        measured = sum(stage.share * steps.ratio[stage.plan] for stage in scheme.stages)
        predicted = sum(stage.share * speed.seconds(costs[stage.plan]) for stage in scheme.stages)
        rows.append(dict(scheme=name, measured=measured, predicted=predicted, error=predicted / measured - 1))
    return pd.DataFrame(rows).set_index("scheme")


def recipe_times(sizes: Sizes, schemes: Mapping[str, Scheme], rounds: int = 5, progress: bool = True) -> pd.DataFrame:
    """How many times faster each scheme is than no compression: tuning, align (projector alignment), and recipe, both
    as often as LLaVA-1.5 does them; measured, and beside each what its FLOPs promise (``_promised``).

    schemes: for ``sizes.layers`` layers. Alignment is on captions of CAPTION_TOKENS.
    """
    model, captions = sizes.model(), replace(sizes, text=CAPTION_TOKENS).inputs()
    aligned = {name: scheme.align or Stage("none", 1) for name, scheme in schemes.items()}
    stages = [stage for scheme in schemes.values() for stage in scheme.stages]
    tuning = step_times(model, [sizes.inputs()], stages, rounds, progress=progress).set_index("plan")
    align = step_times(model, [captions], list(aligned.values()), rounds, "align", progress).set_index("plan")
    whole, rows = [CAPTIONS * align.seconds["none"], INSTRUCTIONS * tuning.seconds["none"]], []
    for name, scheme in schemes.items():
        row = {"scheme": name}
        for ending, ratio in (("", "ratio"), ("_promised", "flops_ratio")):
            tuned = sum(stage.share * tuning[ratio][str(stage)] for stage in scheme.stages)
            first = aligned[name].share * align[ratio][str(aligned[name])]
            both = (whole[0] * first + whole[1] * tuned) / sum(whole)
            row |= {f"tuning{ending}": 1 / tuned, f"align{ending}": 1 / first, f"recipe{ending}": 1 / both}
        rows.append(row)
    return pd.DataFrame(rows)


def embedded_batches(batch: int = 32, count: int = 2, name: str = "embedded") -> tuple:
    """(model, batches) of the embedded LLaVA, or of the model ``name``, and the first training scenes of its world."""
    model, processor = load_model(name)
    data, collate = LlavaData(WORLDS[HOMES.get(name, "digits")].train()), Collator(processor)
    return model, [collate([data[i] for i in range(k * batch, (k + 1) * batch)]) for k in range(count)]
