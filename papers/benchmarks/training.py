"""Measure time and memory of training: ``python papers/benchmarks/training.py COMMAND``.

- ``overhead``: forward, backward and peak memory without compression, relative to the stock model.
- ``schemes``: time of four schemes, measured and predicted; fails if they differ by more than 10%.
- ``recipes``: alignment and tuning under schemes.
- ``precision``: a step in float32, under autocast to bfloat16, and on bfloat16 weights with a float32 master copy.
- ``train``: parts of a step, loading and consumption of data, memory by batch; fails if loading is less than twice as
  fast as consumption.
- ``data``: opening a data set of mix665k's size; fails above 20 s or 1 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from llavolta.compression.families import find_parts, towers
from llavolta.compression.patch import compress
from llavolta.cost.bench import (
    Sizes,
    embedded_batches,
    interleaved,
    now,
    scheme_times,
    step_times,
)
from llavolta.cost.planner import CAPTION_TOKENS, CAPTIONS, INSTRUCTIONS
from llavolta.data import Collator, LlavaData
from llavolta.data import index as data_index
from llavolta.train.dualspeed import fast_mode
from llavolta.train.models import load_model, set_trainable
from llavolta.train.schemes import CONTROL_SCHEMES, SCHEMES, Scheme, Stage
from llavolta.worlds import WORLDS


def _backward(model, batch: dict, plan: str | None, labelled_only: bool | None) -> None:
    """One forward and backward pass; plan None: of the stock model, without ``compress``."""
    with compress(model, plan, labelled_only=labelled_only) if plan else nullcontext():
        model(**batch).loss.backward()
    model.zero_grad()


_VARIANTS = {"stock": (None, None), "stride 1": ("2:avgpool:1", None), "labelled rows only": ("none", True)}


def overhead_times(sizes: Sizes, rounds: int = 5, progress: bool = True) -> pd.DataFrame:
    """Measure forward and backward passes that compress nothing, relative to the stock model.

    Args:
        sizes: The model and batch. The vocabulary is that of Vicuna.
        rounds: Measurements of each variant.
        progress: Show a progress bar.

    Returns:
        One row per variant: variant, seconds (median), ratio (to the stock model, the median over rounds).
    """
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


def peak_memory(sizes: Sizes) -> pd.DataFrame:
    """Measure the peak memory of a step above the model's own, each variant in a new process.

    Args:
        sizes: The model and batch. The vocabulary is that of Vicuna.

    Returns:
        One row per variant: variant, peak_MB, ratio (to the stock model).
    """
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
    forget_peak()  # imports and building the model may have had a higher peak than the step
    before = peak_resident()
    _backward(model, batch, plan, labelled_only)
    return peak_resident() - before


def forget_peak() -> None:
    """Reset the peak that ``peak_resident`` returns to the current memory, if Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes.

    Raises:
        OSError: This is not Linux.
    """
    # Not getrusage, whose peak includes that of the parent process before the fork.
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError(f"no {status}: peak memory on the CPU is measured on Linux only")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


def recipe_times(sizes: Sizes, schemes: Mapping[str, Scheme], rounds: int = 5, progress: bool = True) -> pd.DataFrame:
    """Measure how many times faster each scheme is than no compression.

    Args:
        sizes: The model and batch. Alignment is on captions of CAPTION_TOKENS.
        schemes: Schemes by name, for ``sizes.layers`` layers.
        rounds: Measurements of each step.
        progress: Show a progress bar.

    Returns:
        One row per scheme: scheme, and the speed-ups of tuning, of align (projector alignment) and of recipe (both, for
        the numbers of examples of LLaVA-1.5). Columns that end in _promised are the speed-ups by FLOPs.
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


FULL, AUTOCAST, MASTER = "float32", "autocast", "bfloat16 weights, float32 master"


def _step(model, batch: dict, autocast: bool) -> torch.Tensor:
    """The loss, after a backward pass."""
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=autocast),
        compress(model, "none", labelled_only=True),
    ):
        loss = model(**batch).loss
    loss.backward()
    return loss


def _whole_step(model, batch: dict, autocast: bool) -> Callable[[], float]:
    """A function that trains one step and returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> float:
        loss = _step(model, batch, autocast)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _master_step(model, batch: dict) -> Callable[[], float]:
    """A function that trains one step of a float32 copy, from which the weights are rounded afterwards."""
    held = [p for p in model.parameters() if p.requires_grad]
    masters = [torch.nn.Parameter(p.detach().float()) for p in held]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=0.0)
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}

    def step() -> float:
        loss = _step(model, batch, autocast=False)
        for weight, master in zip(held, masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(held, masters, strict=True):
                weight.copy_(master)
        return loss.item()

    return step


def precision_times(model, batch: dict, rounds: int = 3, progress: bool = True) -> pd.DataFrame:
    """Measure a training step (forward, backward, AdamW) in each precision. All but the tower is trained.

    The learning rate is 0, so that every step is on the same weights.

    Args:
        model: The model, in float32.
        batch: A batch of training.
        rounds: Measurements of each precision.
        progress: Show a progress bar.

    Returns:
        One row per precision: kind, seconds (median), ratio (to float32, the median over rounds), loss.
    """
    set_trainable(model.train(), "instruct")
    steps = {
        FULL: _whole_step(model, batch, autocast=False),
        AUTOCAST: _whole_step(model, batch, autocast=True),
        MASTER: _master_step(copy.deepcopy(model), batch),
    }
    losses: dict[str, float] = {}
    tasks = {name: lambda name=name, step=step: losses.__setitem__(name, step()) for name, step in steps.items()}
    seconds = interleaved(tasks, rounds, model.device, progress)
    rows = [
        dict(kind=name, seconds=np.median(column), ratio=np.median(column / seconds[:, 0]), loss=losses[name])
        for name, column in zip(steps, seconds.T, strict=True)
    ]
    return pd.DataFrame(rows)


PARTS = ["tower", "projector", "decoder", "head and loss", "optimizer"]


class Clock:
    """A clock that adds up the seconds of each part of a training step.

    Args:
        device: The device that computes.

    Attributes:
        seconds: Seconds by part.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        self.last = now(device)

    def mark(self, part: str) -> None:
        """Add the time since the last mark to ``part``."""
        reached = now(self.device)
        self.seconds[part] += reached - self.last
        self.last = reached

    @contextmanager
    def on(self, model) -> Iterator[None]:
        """Mark the ends of tower, projector, decoder and head within the block, in forward and backward passes."""
        parts = find_parts(model)

        def backward(tensor: torch.Tensor, part: str) -> None:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.mark(part))

        def before_decoder(module, args, kwargs):
            self.mark("projector")
            backward(kwargs["inputs_embeds"], "decoder")  # its gradient ends the decoder's backward pass

        def after_decoder(module, args, output):
            self.mark("decoder")
            backward(output.last_hidden_state, "head and loss")

        hooks = [tower.register_forward_hook(lambda *_: self.mark("tower")) for tower in towers(parts).values()]
        hooks.append(parts.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
        hooks.append(parts.decoder.register_forward_hook(after_decoder))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def part_times(
    model, batches: Sequence[dict], plans: Sequence[str], rounds: int = 5, progress: bool = True
) -> pd.DataFrame:
    """Measure a training step under each plan, and the share of each part.

    Args:
        model: The model.
        batches: Batches of training.
        plans: The plans, in addition to "none".
        rounds: Measurements of each plan.
        progress: Show a progress bar.

    Returns:
        One row per plan: seconds (of a step), images_per_second, tokens_per_second (text and visual tokens of the
        input, without padding), and the share (0 to 1) of tower, projector (with embeddings), decoder, head and loss,
        and optimizer.
    """
    model.train()
    set_trainable(model, "instruct")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    plans = list(dict.fromkeys(["none", *plans]))
    spent = {plan: [] for plan in plans}

    def step(plan: str) -> None:
        # The plan's hooks are registered first, so that the clock's marks come after them.
        with fast_mode(model, Stage(plan, 1)):
            clock = Clock(model.device)
            with clock.on(model):
                for batch in batches:
                    loss = model(**batch).loss
                    clock.mark("head and loss")
                    loss.backward()
                    clock.mark("projector")
                    optimizer.step()
                    optimizer.zero_grad()
                    clock.mark("optimizer")
        spent[plan].append(clock.seconds)

    interleaved({plan: partial(step, plan) for plan in plans}, rounds, model.device, progress)
    images = sum(len(batch.get("pixel_values", ())) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rows = []
    for plan in plans:
        parts = pd.DataFrame(spent[plan][1:]).median()  # the first was the warm-up
        total = parts.sum()
        row = dict(plan=plan, seconds=total / len(batches), images_per_second=images / total)
        rows.append(row | dict(tokens_per_second=tokens / total) | (parts / total).to_dict())
    return pd.DataFrame(rows).set_index("plan")


def loading_times(data: LlavaData, collate: Collator, batch: int, workers: Sequence[int], batches: int) -> pd.DataFrame:
    """Measure the speed of the data loader alone.

    Args:
        data: The data set.
        collate: Makes batches.
        batch: Examples of a batch.
        workers: Numbers of loader processes to try.
        batches: Batches to load.

    Returns:
        One row per number of workers: examples_per_second.
    """
    rows = []
    for count in workers:
        loader = DataLoader(data, batch, collate_fn=collate, num_workers=count, shuffle=True)
        stream = iter(loader)
        next(stream)  # so that the start of the workers does not count
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
        rows.append(dict(workers=count, examples_per_second=batch * batches / seconds))
    return pd.DataFrame(rows).set_index("workers")


def memory_by_batch(model: str, batches: Sequence[int], plans: Sequence[str], rounds: int = 3) -> pd.DataFrame:
    """Measure the peak memory of a training step, by the number of examples.

    Each measurement has a new process. A CPU's allocator behaves differently in each, so the median is taken.

    Args:
        model: The model's name.
        batches: Numbers of examples.
        plans: The plans.
        rounds: Measurements of each.

    Returns:
        One row per number of examples, one column per plan: MB above the memory before the step, the median.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = []
        for size in batches:
            peaks = {plan: [pool.submit(_peak_of, model, size, plan).result() for _ in range(rounds)] for plan in plans}
            rows.append(dict(examples=size, **{plan: np.median(peaks[plan]) / 1e6 for plan in plans}))
    return pd.DataFrame(rows).set_index("examples")


def train_report(
    model: str = "embedded",
    plans: Sequence[str] = ("1:avgpool:8", "4:avgpool:8"),
    batch: int = 32,
    rounds: int = 5,
    workers: Sequence[int] = (0, 1, 2),
    sizes: Sequence[int] = (8, 16, 32, 64),
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Make the tables of the command ``train``.

    Args:
        model: The model's name.
        plans: The plans, in addition to "none".
        batch: Examples of a batch.
        rounds: Measurements of each plan.
        workers: Numbers of loader processes to try.
        sizes: Numbers of examples for the memory.
        progress: Show progress bars.

    Returns:
        The tables "step", "loading" and "memory"; see ``part_times``, ``loading_times`` and ``memory_by_batch``.
    """
    loaded, batches = embedded_batches(batch, 2, model)
    if torch.cuda.is_available():
        loaded, batches = loaded.cuda(), [{key: value.cuda() for key, value in one.items()} for one in batches]
    step = part_times(loaded, batches, plans, rounds, progress)
    processor = load_model(model)[1]
    data = LlavaData(WORLDS["digits"].train())
    loading = loading_times(data, Collator(processor), batch, workers, min(20, len(data) // batch - 1))
    fastest = batch / step.seconds.min()
    loading["times_consumption"] = loading.examples_per_second / fastest
    return {"step": step, "loading": loading, "memory": memory_by_batch(model, sizes, ["none", plans[0]])}


def keeps_up(loading: pd.DataFrame) -> bool:
    """Return whether some number of workers loads at least twice as fast as the fastest plan consumes."""
    return bool(np.max(loading.times_consumption) >= 2)


# LLaVA-1.5's mix665k, by image folder: entries, fewest and most rounds of an entry, most words of a turn (mean: half).
MIX = {
    "coco/train2017": (364_100, 1, 8, 30),
    "vg/VG_100K": (86_417, 6, 20, 12),
    "gqa/images": (72_140, 4, 14, 12),
    "ocr_vqa/images": (80_000, 3, 6, 14),
    "textvqa/train_images": (21_953, 1, 2, 30),
    "": (40_688, 1, 8, 200),  # text alone
}


def write_mix(file: Path, entries: int, seed: int = 0) -> None:
    """Write a JSON list of random conversations with the mixture and lengths of mix665k, without images.

    Args:
        file: The file to write.
        entries: Number of conversations.
        seed: Seed of the generator.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzé", k=rng.randint(1, 9))) for _ in range(5000)]
    folders = list(MIX)
    said = {name: [" ".join(rng.choices(words, k=rng.randint(1, MIX[name][3]))) for _ in range(2000)] for name in MIX}
    chosen = rng.choices(folders, [MIX[name][0] for name in folders], k=entries)
    with file.open("w") as out:
        for number, folder in enumerate(chosen):
            turns = rng.choices(said[folder], k=2 * rng.randint(*MIX[folder][1:3]))
            turns[0] = f"<image>\n{turns[0]}" if folder else turns[0]
            entry = {"id": f"{number:012d}", "image": f"{folder}/{number:012d}.jpg"} if folder else {"id": number}
            entry["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
            out.write(("[" if number == 0 else ", ") + json.dumps(entry))
        out.write("]")


def data_report(folder: Path, entries: int) -> pd.DataFrame:
    """Measure opening a data set of mix665k's size, twice, each time in a new process.

    Args:
        folder: A folder for the data set and its index.
        entries: Number of conversations.

    Returns:
        One row per opening ("first" makes the index, "second" finds it): seconds, resident_MB (the peak of the process
        with its imports), entries_per_second (in random order, without images), file_MB.
    """
    file = folder / "mix.json"
    write_mix(file, entries)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [pool.submit(_open_data, file, folder / "cache").result() for _ in range(2)]
    columns = ["seconds", "resident_MB", "entries_per_second"]
    table = pd.DataFrame(rows, columns=columns, index=pd.Index(["first", "second"], name="opening"))
    return table.assign(file_MB=file.stat().st_size / 1e6)


def _peak_of(name: str, size: int, plan: str) -> int:
    """Bytes that a forward and backward pass of ``size`` examples needs above the memory before it."""
    model, [batch] = embedded_batches(size, 1, name)
    set_trainable(model.train(), "instruct")
    if torch.cuda.is_available():
        model, batch = model.cuda(), {key: value.cuda() for key, value in batch.items()}
    forget_peak()  # loading may have had a higher peak than the step
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else peak_resident()
    with fast_mode(model, Stage(plan, 1)):
        model(**batch).loss.backward()
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
    return after - before


def _open_data(file: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds to open a file, peak MB of this process, and entries read per second."""
    data_index.CACHE, start = cache, time.perf_counter()
    opened = LlavaData(file)
    seconds, some = time.perf_counter() - start, np.random.default_rng(0).permutation(len(opened))[:5000]
    start = time.perf_counter()
    for index in some:
        opened.entry(index)
    return seconds, peak_resident() / 1e6, len(some) / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and print its tables. Returns the exit code: 1 if a figure is worse than it may be."""
    parser = argparse.ArgumentParser(
        prog="python papers/benchmarks/training.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    overhead, recipes = commands.add_parser("overhead"), commands.add_parser("recipes")
    for command in (overhead, recipes):
        for name, kind in typing.get_type_hints(Sizes).items():
            command.add_argument(f"--{name}", type=kind, default=getattr(Sizes, name))
    compared = [name for name in SCHEMES if name not in CONTROL_SCHEMES]
    recipes.add_argument("--schemes", nargs="+", default=compared, choices=list(SCHEMES), metavar="NAME")
    commands.add_parser("schemes")
    train = commands.add_parser("train")
    train.add_argument("--model", default="embedded")
    train.add_argument("--plans", nargs="+", default=["1:avgpool:8", "4:avgpool:8"])
    train.add_argument("--batch", type=int, default=32)
    precision = commands.add_parser("precision")
    precision.add_argument("--model", default="nano")
    precision.add_argument("--batch", type=int, default=8)
    commands.add_parser("data").add_argument("--entries", type=int, default=sum(many for many, *_ in MIX.values()))
    for command in commands.choices.values():
        command.add_argument("--rounds", type=int, default=5)
    options = vars(parser.parse_args(arguments))
    command, rounds = options.pop("command"), options.pop("rounds")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}")
    wrong = False
    if command == "train":
        tables = train_report(**options, rounds=rounds)
        wrong = not keeps_up(tables["loading"])
    elif command == "data":
        with tempfile.TemporaryDirectory() as folder:
            table = data_report(Path(folder), **options)
        tables, wrong = {"data": table}, table.seconds.max() > 20 or table.resident_MB.max() > 1000
    elif command == "schemes":
        table = scheme_times(*embedded_batches(), rounds)
        tables, wrong = {"schemes": table}, table.error.abs().max() > 0.1
    elif command == "precision":
        model, (batch,) = embedded_batches(options["batch"], 1, options["model"])
        tables = {"precision": precision_times(model, batch, rounds).set_index("kind")}
    else:
        names = options.pop("schemes", [])
        sizes = Sizes(**options)
        if command == "recipes":
            schemes = {name: SCHEMES[name].scaled(sizes.layers) for name in names}
            tables = {"recipes": recipe_times(sizes, schemes, rounds).set_index("scheme")}
        else:
            found = {"overhead": overhead_times(sizes, rounds), "memory": peak_memory(sizes)}
            tables = {name: table.set_index("variant") for name, table in found.items()}
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(float_format='{:.3f}'.format)}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
