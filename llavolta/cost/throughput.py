"""Where the time of training goes: parts of a step, loading of data against its consumption, memory of a batch."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from llavolta.compression.families import find_parts, towers
from llavolta.cost.bench import embedded_batches, forget_peak, interleaved, now, peak_resident
from llavolta.data import Collator, LlavaData
from llavolta.data import index as data_index
from llavolta.train.dualspeed import fast_mode
from llavolta.train.models import load_model, set_trainable
from llavolta.train.schemes import Stage
from llavolta.worlds import WORLDS

PARTS = ["tower", "projector", "decoder", "head and loss", "optimizer"]


class Clock:
    """Adds up the seconds between marks, each under the name of the part that the mark ends."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        self.last = now(device)

    def mark(self, part: str) -> None:
        reached = now(self.device)
        self.seconds[part] += reached - self.last
        self.last = reached

    @contextmanager
    def on(self, model) -> Iterator[None]:
        """Marks at the ends of tower, projector, decoder and head, in the forward and in the backward pass."""
        parts = find_parts(model)

        def backward(tensor: torch.Tensor, part: str) -> None:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.mark(part))

        def before_decoder(module, args, kwargs):
            self.mark("projector")
            backward(kwargs["inputs_embeds"], "decoder")  # from here on back lie projector and embeddings

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
    """A training step under each plan, in turn on the same batches, and the share of it that each part takes.

    Columns: seconds a step, images_per_second, tokens_per_second (of the input, text and visual, without padding),
    and a share (0 to 1) for each of tower, projector (with embeddings), decoder, head and loss, optimizer.
    """
    model.train()
    set_trainable(model, "instruct")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    plans = list(dict.fromkeys(["none", *plans]))
    spent = {plan: [] for plan in plans}

    def step(plan: str) -> None:
        with fast_mode(model, Stage(plan, 1)):  # its hooks come first: the marks are to see what the model computes
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
    """Examples a second that the data loader gives to a consumer that only asks for the next, by workers."""
    rows = []
    for count in workers:
        loader = DataLoader(data, batch, collate_fn=collate, num_workers=count, shuffle=True)
        stream = iter(loader)
        next(stream)  # starting the workers is not loading
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
        rows.append(dict(workers=count, examples_per_second=batch * batches / seconds))
    return pd.DataFrame(rows).set_index("workers")


def memory_by_batch(model: str, batches: Sequence[int], plans: Sequence[str], rounds: int = 3) -> pd.DataFrame:
    """Peak MB of a training step above what is held before it, for each number of examples: the median of ``rounds``.

    Each in a fresh process; on a CPU the allocator's habits differ from one to the next.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = []
        for size in batches:
            peaks = {plan: [pool.submit(_peak, model, size, plan).result() for _ in range(rounds)] for plan in plans}
            rows.append(dict(examples=size, **{plan: np.median(peaks[plan]) / 1e6 for plan in plans}))
    return pd.DataFrame(rows).set_index("examples")


def _peak(name: str, size: int, plan: str) -> int:
    model, [batch] = embedded_batches(size, 1, name)
    set_trainable(model.train(), "instruct")
    if torch.cuda.is_available():
        model, batch = model.cuda(), {key: value.cuda() for key, value in batch.items()}
    forget_peak()  # loading may have taken more than the step does
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else peak_resident()
    with fast_mode(model, Stage(plan, 1)):
        model(**batch).loss.backward()
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
    return after - before


def train_report(
    model: str = "embedded",
    plans: Sequence[str] = ("1:avgpool:8", "4:avgpool:8"),
    batch: int = 32,
    rounds: int = 5,
    workers: Sequence[int] = (0, 1, 2),
    sizes: Sequence[int] = (8, 16, 32, 64),
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Everything ``python -m llavolta.bench train`` prints: tables "step", "loading" and "memory"."""
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
    """Whether some number of workers loads at least twice as fast as the fastest plan consumes."""
    return bool(np.max(loading.times_consumption) >= 2)


# LLaVA-1.5's mix665k: entries a folder, fewest and most rounds of an entry, most words of a turn (the mean is half).
MIX = {
    "coco/train2017": (364_100, 1, 8, 30),
    "vg/VG_100K": (86_417, 6, 20, 12),
    "gqa/images": (72_140, 4, 14, 12),
    "ocr_vqa/images": (80_000, 3, 6, 14),
    "textvqa/train_images": (21_953, 1, 2, 30),
    "": (40_688, 1, 8, 200),  # text alone
}


def write_mix(file: Path, entries: int, seed: int = 0) -> None:
    """A JSON list of ``entries`` random conversations, as mixed and as large as those of mix665k; no pictures."""
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
    """Opening a data set as large as ``entries`` of mix665k, each time in a fresh process on the CPU.

    Columns: opening (the first makes the index, the second finds it), seconds, resident_MB (at most, of the process
    with all it imports), entries_per_second (read in random order, without pictures).
    """
    file = folder / "mix.json"
    write_mix(file, entries)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [pool.submit(_open_data, file, folder / "cache").result() for _ in range(2)]
    columns = ["seconds", "resident_MB", "entries_per_second"]
    table = pd.DataFrame(rows, columns=columns, index=pd.Index(["first", "second"], name="opening"))
    return table.assign(file_MB=file.stat().st_size / 1e6)


def _open_data(file: Path, cache: Path) -> tuple[float, float, float]:
    data_index.CACHE, start = cache, time.perf_counter()
    opened = LlavaData(file)
    seconds, some = time.perf_counter() - start, np.random.default_rng(0).permutation(len(opened))[:5000]
    start = time.perf_counter()
    for index in some:
        opened.entry(index)
    return seconds, peak_resident() / 1e6, len(some) / (time.perf_counter() - start)
