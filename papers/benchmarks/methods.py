"""Measure the time of compressors themselves.

``python papers/benchmarks/methods.py compressors`` compares those before the projector with the vision tower.
``methods.py zoo`` compares every method with a prefill and a training step.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llavolta.compression.compressors import VisualTokens
from llavolta.compression.patch import compress
from llavolta.compression.plan import parse_plan, tokens_per_layer
from llavolta.compression.probe import TowerLayer, TowerProbe
from llavolta.cost.bench import Sizes, interleaved, now, prefill_times, step_times

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
    """Measure the time of each method of ZOO in a random LLaVA, with 60 text tokens.

    Args:
        width: Width of tower and decoder.
        layers: Layers of tower and decoder.
        grid: The image has grid x grid visual tokens.
        batch: Examples in the batch.
        rounds: Measurements of each task.
        progress: Show progress bars.

    Returns:
        One row per plan. tokens: left, the mean over layers. own: seconds of the compressors alone, the least of the
        rounds. prefill, step: own as a share of a prefill and of a training step (tower frozen) without compression.
        saved: the share of a prefill's time that the plan saves, with its own time counted; below 0 if a method costs
        more than it saves.
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
        """Seconds of the plan's compressors, called again with the tokens that they got in a forward pass."""
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
    """Make random visual tokens with queries and keys of the tower, as a compressor at "vision" gets them.

    Args:
        images: Number of images I.
        grid: The images have grid x grid tokens.
        width: Width of the tower C.

    Returns:
        Visual tokens with hidden (I, grid^2, C), and a probe of a tower with class tokens.
    """
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
    """Compute PruMerge as published, image by image and token by token. This is slow.

    Args:
        tokens: Tokens of ``tower_tokens``.
        plus: PruMerge+ instead, which adds evenly spaced tokens.
        neighbours: Tokens that are merged into each selected one.

    Returns:
        (M, C) per image, with a number of tokens M of its own.
    """
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
    """Measure the time of each compressor before the projector, on random tokens.

    Args:
        images: Images of the batch.
        tower_images: Images of the batch for the comparison with the tower.
        grid: The images have grid x grid tokens.
        width: Width of the tower.
        layers: Layers of the tower.
        rounds: Measurements of each task.
        progress: Show progress bars.

    Returns:
        One row per compressor: compressor, seconds (median), tokens_left (mean over images). tower: its time over that
        of a forward pass of a CLIP ViT, the median over rounds in which they ran in turn. loop: the time of
        ``prumerge_loop``, measured once, over its time.
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


def main() -> None:
    """Measure and print one of the tables."""
    parser = argparse.ArgumentParser(prog="python papers/benchmarks/methods.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tables = {"compressors": compressor_times, "zoo": zoo_times}
    for name, table in tables.items():
        command = commands.add_parser(name)
        for option, given in inspect.signature(table).parameters.items():
            if option != "progress":
                command.add_argument(f"--{option.replace('_', '-')}", type=int, default=given.default)
    options = vars(parser.parse_args())
    table = tables[options.pop("command")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}\n")
    print(table(**options).to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
