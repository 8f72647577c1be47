"""Measure compression on one GPU at the shapes of LLaVA-1.5-7B: ``python papers/benchmarks/gpu.py`` (``make gpu``).

It takes minutes and downloads nothing: weights are random. The most important parts come first, and each is saved when
it is done, so that an interrupted run counts. Ratios are medians over rounds in which all variants ran in turn.
``--tiny`` runs the same on small shapes, also on a CPU.

The docstrings of the parts (``PARTS``) are printed on the page, so they are prose without sections.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import is_flash_attn_2_available

from llavolta.compression.families import find_parts
from llavolta.compression.labelled import IGNORED
from llavolta.compression.masks import cache_bytes
from llavolta.compression.patch import compress
from llavolta.compression.plan import parse_plan
from llavolta.cost.bench import Sizes, interleaved, now
from llavolta.cost.flops import cost_model
from llavolta.cost.references import reference_config
from llavolta.errors import UserError
from llavolta.paths import PAPERS, given_path
from llavolta.train.config import TrainConfig
from llavolta.train.models import set_trainable, spare_frozen_towers
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics

STAGES = ("none", "2:avgpool:8", "16:avgpool:8", "2:avgpool:2", "16:avgpool:2")  # of the published schemes
METHODS = ("2:fastv:0.5", "8:pyramiddrop:0.5;16:pyramiddrop:0.5", "vision:avgpool2d:2", "vision:prumerge+")
# Plans whose choice of tokens depends on positions only, and plans that rank tokens by numbers.
BY_PLACE = ("2:avgpool:4", "0:avgpool2d:2", "vision:avgpool2d:2", "1:avgpool:2;4:avgpool:2")
BY_RANK = ("2:fastv:0.5", "2:pyramiddrop:0.5", "vision:prumerge+")


@dataclass(frozen=True)
class Load:
    """The model and shapes that are measured.

    Attributes:
        config: The model's configuration.
        text: Text tokens of an example, a third of them labelled.
        batch: Examples of a training batch.
        prefill: Batch sizes of inference.
        long: Images of an example in the part ``long``.
        long_batch: Examples of a batch in the part ``long``.
        accumulated: Batches of an optimizer step (8 of 16 examples: the published batch of 128).
        new_tokens: Tokens to decode and time.
        rounds: Measurements of each variant.
        side: Rows and columns of the matrices whose product gives the card's peak.
        steps: Steps of a real training run.
        runs: Presets of the real training runs.
        device: The device.
        dtype: Precision of the weights.
    """

    config: object
    text: int = 180
    batch: int = 16
    prefill: tuple[int, ...] = (1, 16)
    long: int = 5
    long_batch: int = 4
    accumulated: int = 8
    new_tokens: int = 6
    rounds: int = 5
    side: int = 8192
    steps: int = 40
    runs: tuple[str, ...] = ("embedded", "small")
    device: str = "cuda"
    dtype: str = "bfloat16"

    @cached_property
    def model(self):
        """The model, with random weights in ``dtype`` on ``device`` and a frozen vision tower."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForImageTextToText.from_config(self.config, dtype=getattr(torch, self.dtype))
        set_trainable(model, "instruct")
        return model

    def inputs(self, batch: int, images: int = 1) -> dict:
        """Make a batch of examples with images and then text, whose last third is labelled.

        Args:
            batch: Number of examples B.
            images: Images of an example.

        Returns:
            input_ids, attention_mask and labels (B, T), and pixel_values (B * images, 3, H, W).
        """
        vision, generator = self.config.vision_config, torch.Generator().manual_seed(0)
        visual = images * self.config.image_seq_length
        some = torch.randint(10, self.config.text_config.vocab_size - 100, (batch, self.text), generator=generator)
        placeholders = torch.full((batch, visual), self.config.image_token_index)
        ids = torch.cat([some[:, :1], placeholders, some[:, 1:]], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.text // 3 :] = ids[:, -self.text // 3 :]
        shape = (batch * images, 3, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        return {name: value.to(self.device) for name, value in made.items()}

    def flops(self, plan: str, batch: int, images: int = 1, **options) -> float:
        """Compute the FLOPs of a step on ``inputs``.

        Args:
            plan: The plan in force.
            batch: Number of examples.
            images: Images of an example.
            options: Options of ``CostModel.step``.
        """
        labelled = options.pop("labelled", -(-self.text // 3))
        return batch * cost_model(self.config).step(plan, self.text, images, labelled, **options).total


def full_load() -> Load:
    """Return the shapes of LLaVA-1.5-7B: 16 examples of one image (576 tokens) and 180 text tokens in a batch."""
    return Load(reference_config("llava-1.5-7b"))


def tiny_load(device: str = "cpu") -> Load:
    """Return shapes that a CPU computes in a minute."""
    config = Sizes(width=64, layers=20, visual=16, vocabulary=200).model().config
    small = dict(batch=2, prefill=(1, 2), long=2, long_batch=2, new_tokens=2, rounds=1, side=64, steps=4)
    return Load(config, text=12, **small, runs=("embedded",), device=device)


def card_name(device: str) -> str:
    """Return the name of the GPU, or of the CPU's architecture, as part of a file name."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def peaks(load: Load) -> pd.DataFrame:
    """The card's measured limits: bfloat16 products of random ``side`` x ``side`` matrices, and copies of memory."""
    device, side = torch.device(load.device), load.side
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = interleaved({"matmul": lambda: [a @ b for _ in range(10)]}, 10, device, False) / 10
    source = torch.zeros(side * side * 8, device=device)
    target = torch.empty_like(source)
    copied = interleaved({"copy": lambda: [target.copy_(source) for _ in range(10)]}, 10, device, False) / 10
    moved = 2 * source.numel() * source.element_size()
    return pd.DataFrame(
        {"matmul_TFLOP_s": [2e-12 * side**3 / np.median(product)], "copy_TB_s": [1e-12 * moved / np.median(copied)]}
    )


@torch.no_grad()
def core(load: Load) -> pd.DataFrame:
    """Compression on the device, compared with float32 on the CPU: the relative error of the logits, and generation.

    stock_error: the error without compression. ok: the error is at most three times that, and ``generate`` gives the
    same answers with and without a cache. In bfloat16, only plans whose choice of tokens depends on positions are
    compared, because rounding decides near ties.
    """
    sizes = Sizes(width=256, layers=6, visual=64, text=24, batch=3, vocabulary=500)
    reference, batch = sizes.model().eval(), sizes.inputs()
    batch["attention_mask"][0, -9:] = batch["attention_mask"][2, -4:] = 0  # rows of different lengths
    attentions = ["sdpa", "eager", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    rows = []
    for dtype, attention in [("float32", a) for a in attentions[:2]] + [("bfloat16", a) for a in attentions]:
        config = reference.config
        config._attn_implementation = attention
        model = type(reference)._from_config(config, attn_implementation=attention)
        model.load_state_dict(reference.state_dict())
        model = model.to(load.device, getattr(torch, dtype)).eval()
        there = {name: value.to(load.device) for name, value in batch.items()}
        there["pixel_values"] = there["pixel_values"].to(model.dtype)
        stock = None
        for plan in ("none", *BY_PLACE, *(BY_RANK if dtype == "float32" else ())):
            with compress(reference, plan):
                right = reference(**batch).logits[batch["attention_mask"].bool()]
            with compress(model, plan):
                found = model(**there).logits[there["attention_mask"].bool()].float().cpu()
                error = ((found - right).norm() / right.norm()).item()
                cut = slice(sizes.visual + 10)  # up to here no row has padding
                prompt = {name: value[2:] for name, value in there.items() if name != "labels"}
                prompt |= {name: prompt[name][:, cut] for name in ("input_ids", "attention_mask")}
                asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
                cached = model.generate(**prompt, **asked)
                whole = model.generate(**prompt, **asked, use_cache=False)
            stock = error if plan == "none" else stock
            # Without a cache, plans that rank by attention choose again at each token.
            same = bool((cached == whole).all()) or dtype != "float32" or plan in BY_RANK[:2]
            ok = error <= max(3 * stock, 1e-5) and same
            rows.append(dict(dtype=dtype, attention=attention, plan=plan, error=error, stock_error=stock, ok=ok))
    return pd.DataFrame(rows)


class HostReads(TorchDispatchMode):
    """A mode that counts where the host waits for a value of the device.

    On a CPU it counts the operations for which the host would wait on another device.

    Attributes:
        places: Counts by line of the source.
    """

    _ALWAYS = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "_unique2")
    )
    _BY_MASK = frozenset(getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_"))

    def __init__(self):
        super().__init__()
        self.places: Counter[str] = Counter()
        self._cuda = torch.cuda.is_available()

    @property
    def count(self) -> int:
        """The count of all places."""
        return sum(self.places.values())

    def _waits(self, op, args: tuple, kwargs: dict) -> bool:
        """Whether the host waits for this operation."""
        if self._cuda and not any(isinstance(x, torch.Tensor) and x.is_cuda for x in args):
            return False
        if op is torch.ops.aten._to_copy:
            return str(kwargs.get("device")) == "cpu" and self._cuda
        return op in self._ALWAYS or (
            op in self._BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._waits(func._overloadpacket, args, kwargs or {}):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            place = "backward pass"  # which runs in a thread of its own on CUDA
            if frames:
                file = re.sub(r".*(site-packages/|(?=llavolta/[\w/]+\.py$))", "", frames[-1].filename)
                place = f"{file}:{frames[-1].lineno} {frames[-1].line}"
            self.places[place] += 1
        return func(*args, **(kwargs or {}))


def host_reads(load: Load) -> pd.DataFrame:
    """How often the host waits for the device in a training step and in a decoding step, by plan.

    in_llavolta: the waits of the training step that compression adds.
    """
    small = replace(load, config=tiny_load().config, batch=2, dtype="float32")
    model, batch, rows = small.model, small.inputs(2), []
    for plan in ("none", *STAGES[1:2], *METHODS):
        with compress(model.train(), plan), HostReads() as step:
            model(**batch).loss.backward()
        model.zero_grad()
        cache = DynamicCache(config=model.config.get_text_config())
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), compress(model.eval(), plan):
            model(**prompt, past_key_values=cache, use_cache=True)
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            with HostReads() as token:
                model(input_ids=batch["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
        ours = sum(count for place, count in step.places.items() if place.startswith("llavolta/"))
        rows.append(dict(plan=plan, training_step=step.count, in_llavolta=ours, decoding_step=token.count))
    return pd.DataFrame(rows)


def training(load: Load, images: int = 1, batch: int | None = None, plans: Sequence[str] = STAGES) -> pd.DataFrame:
    """A training step with gradient checkpointing and a frozen tower: forward, backward, and its share of AdamW.

    The whole decoder is tuned if weights, gradients, AdamW's moments (all in ``dtype``) and activations fit into
    memory. Otherwise its first half is frozen (column ``tuned``). seconds: forward and backward of one batch.
    optimizer: one step of AdamW, which follows ``accumulated`` batches. tokens_per_s, TFLOP_s, speedup and kept include
    a batch's share of it. speedup: relative to "none" in the same rounds. implied: the speed-up by FLOPs. kept: speedup
    over implied. kept_alone: the same if AdamW followed each batch. labelled rows: logits at labelled rows only, as in
    training.
    """
    batch = batch or load.batch
    model, device = load.model.train(), torch.device(load.device)
    set_trainable(model, "instruct")
    tuned = "decoder and projector"
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
        if 4.6 * sum(p.numel() for p in model.parameters()) * model.dtype.itemsize > room:
            for layer in find_parts(model).layers[: len(find_parts(model).layers) // 2]:
                layer.requires_grad_(False)
            tuned = "the later half of the decoder"
    model.activation_checkpointing_enable()
    spare_frozen_towers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")
    inputs = load.inputs(batch, images)
    variants = [(plan, True) for plan in plans]
    if images == 1:
        variants += [(plan, False) for plan in plans[:2]]
    peak: dict[tuple, float] = {}

    def step(plan: str, labelled: bool) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with compress(model, plan, labelled_only=labelled):
            loss = model(**inputs).loss
            loss.backward()  # gradients add up, as in accumulation
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of plan {plan} became {loss.item()}")
        peak[plan, labelled] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else np.nan

    try:
        step(*variants[0])  # so that AdamW has gradients
        tasks = {variant: partial(step, *variant) for variant in variants} | {("AdamW", True): optimizer.step}
        taken = pd.DataFrame(interleaved(tasks, load.rounds, device), columns=pd.MultiIndex.from_tuples(tasks))
    finally:
        model.activation_checkpointing_disable()
        optimizer.zero_grad(set_to_none=True)
        set_trainable(model, "instruct")
    tokens = batch * (load.text + images * load.config.image_seq_length)
    rows = []
    for plan, labelled in variants:
        flops, whole = (
            load.flops(p, batch, images, checkpointing=True, **({} if labelled else {"labelled": tokens / batch}))
            for p in (plan, "none")
        )
        adam, full, taken_here = taken["AdamW", True], taken["none", labelled], taken[plan, labelled]
        seconds = (taken_here + adam / load.accumulated).median()
        speedup, alone = (
            ((full + share * adam) / (taken_here + share * adam)).median() for share in (1 / load.accumulated, 1)
        )
        rows.append(
            dict(plan=plan, logits="labelled rows" if labelled else "all rows", batch=batch)
            | dict(seconds=taken_here.median(), optimizer=adam.median(), tokens_per_s=tokens / seconds)
            | dict(TFLOP_s=1e-12 * flops / seconds, speedup=speedup, implied=whole / flops)
            | dict(kept=speedup * flops / whole, kept_alone=alone * flops / whole, peak_GB=peak[plan, labelled])
            | dict(tuned=tuned)
        )
    return pd.DataFrame(rows)


_KERNELS = {  # kinds of kernels in the profile, by a pattern of their names; the first match counts
    "matrix products": "gemm|nvjet|cutlass|aten::(add|b)?mm|conv",
    "attention": "flash|fmha|sdp",
    "to the host": "Memcpy DtoH",
}


def profile(load: Load) -> pd.DataFrame:
    """The time of a forward and backward pass by kind of kernel, in seconds of the device, by torch.profiler.

    others: norms, activations, rotary embeddings, sums of gradients, the compressor. idle: no kernel ran. host_reads:
    copies from the device to the host.
    """
    from torch.profiler import ProfilerActivity

    model, device = load.model.train(), torch.device(load.device)
    set_trainable(model, "instruct")
    model.activation_checkpointing_enable()
    spare_frozen_towers(model)
    inputs, rows = load.inputs(load.batch), []
    cuda = device.type == "cuda"
    try:
        for plan in STAGES[:2]:
            with compress(model, plan, labelled_only=True):
                model(**inputs).loss.backward()
                start = now(device)
                model(**inputs).loss.backward()
                seconds = now(device) - start
                kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
                with torch.profiler.profile(activities=[kind]) as profiler:
                    model(**inputs).loss.backward()
                    now(device)
            model.zero_grad()
            busy = dict.fromkeys([*_KERNELS, "others"], 0.0)
            reads = 0
            for event in profiler.key_averages():
                name = next((part for part, held in _KERNELS.items() if re.search(held, event.key)), "others")
                busy[name] += 1e-6 * (event.self_device_time_total if cuda else event.self_cpu_time_total)
                reads += event.count if name == "to the host" else 0
            rows.append(
                dict(plan=plan, seconds=seconds) | busy | dict(idle=seconds - sum(busy.values()), host_reads=reads)
            )
    finally:
        model.activation_checkpointing_disable()
        model.zero_grad()
    return pd.DataFrame(rows)


@contextmanager
def _layers(decoder: nn.Module, first: int, end: int) -> Iterator[None]:
    """Leave ``decoder`` only its layers from ``first`` to before ``end``, within the block."""
    whole, decoder.layers = decoder.layers, nn.ModuleList(decoder.layers[first:end])
    try:
        yield
    finally:
        decoder.layers = whole


@torch.no_grad()
def inference(load: Load, batches: Sequence[int] | None = None, images: int = 1) -> pd.DataFrame:
    """Prefill and decoding, by plan and batch size.

    own: the time of the method itself, as a share of an uncompressed prefill. It is the prefill's time less that of
    stock layers on sequences of the same lengths (one stock pass for each length), and is known for plans with a fixed
    number of tokens. decode_ms: one token from the cache, the median.
    """
    model, device = load.model.eval(), torch.device(load.device)
    decoder = find_parts(model).decoder
    rows = []
    for batch in batches or load.prefill:
        inputs = {name: value for name, value in load.inputs(batch, images).items() if name != "labels"}
        plans = ["none", *STAGES[1:], *(METHODS if images == 1 else ())]
        held: dict[str, DynamicCache] = {}
        # Random values, because a GPU multiplies zeros faster.
        some = torch.randn(inputs["input_ids"].shape + (decoder.config.hidden_size,), device=device, dtype=model.dtype)

        def new_cache() -> DynamicCache:
            return DynamicCache(config=model.config.get_text_config())

        def prefill(plan: str, inputs=inputs, held=held) -> None:
            held[plan] = cache = new_cache()
            with compress(model, plan):
                model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def direct(groups: list[tuple[int, int]], inputs=inputs, some=some) -> None:
            (count, _), *others = groups
            with _layers(decoder, 0, count):
                model(**inputs, past_key_values=new_cache(), use_cache=True, logits_to_keep=1)
            done = count
            for count, length in others:
                with _layers(decoder, done, done + count):
                    decoder(inputs_embeds=some[:, :length], past_key_values=new_cache(), use_cache=True)
                done += count

        tasks: dict[str, Callable[[], None]] = {plan: partial(prefill, plan) for plan in plans}
        for plan in plans[1:]:
            lengths = cost_model(load.config).lengths(plan, load.text, images)
            if "vision" in parse_plan(plan) or any(x != int(x) for x in lengths):
                continue  # no stock pass is the same: shortened before the decoder, or by a mean number of tokens
            groups = [(len(list(same)), int(length)) for length, same in groupby(lengths)]
            tasks[f"stock layers of {plan}"] = partial(direct, groups)
        taken = pd.DataFrame(interleaved(tasks, load.rounds, device), columns=list(tasks))
        tokens: dict[str, list[float]] = {plan: [] for plan in plans}
        decoding = {plan: partial(_decode, load, plan, inputs, tokens[plan]) for plan in plans}
        interleaved(decoding, min(3, load.rounds), device)
        whole = taken["none"]
        for plan in plans:
            flops, all_flops = (load.flops(p, batch, images, labelled=1, phase="forward") for p in (plan, "none"))
            stock = taken.get(f"stock layers of {plan}")
            own = np.nan if stock is None else ((taken[plan] - stock) / whole).median()
            speedup = (whole / taken[plan]).median()
            rows.append(
                dict(plan=plan, batch=batch, prefill_ms=1e3 * taken[plan].median(), speedup=speedup)
                | dict(implied=all_flops / flops, own=own, cache_GB=cache_bytes(held[plan]) / 1e9)
                | dict(decode_ms=1e3 * np.median(tokens[plan]))
            )
        held.clear()
    return pd.DataFrame(rows)


@torch.no_grad()
def _decode(load: Load, plan: str, inputs: dict, seconds: list[float]) -> None:
    """Decode greedily from a cache, and append the seconds of each token to ``seconds``."""
    model, device, taken = load.model, torch.device(load.device), []
    cache = DynamicCache(config=model.config.get_text_config())
    mask, given = inputs["attention_mask"], inputs
    with compress(model, plan):
        for _ in range(load.new_tokens + 2):
            start = now(device)
            out = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            taken.append(now(device) - start)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = dict(input_ids=out.logits.argmax(-1), attention_mask=mask)
    seconds += taken[2:]  # without the prefill and the first token, a warm-up


def long(load: Load) -> pd.DataFrame:
    """Training and prefill with many visual tokens in an example (five images: 2,880)."""
    steps = training(load, load.long, load.long_batch, STAGES[:4])
    prompts = inference(load, (load.long_batch,), load.long)
    return pd.concat([steps.assign(work="training step"), prompts.assign(work="prefill")], ignore_index=True)


def runs(load: Load) -> pd.DataFrame:
    """Real training, as ``python -m llavolta.train`` does it: stage 1 under bfloat16, and a few steps under ZeRO-2.

    seconds: the whole run with alignment, loading and saving. steps_per_s: of the stage, without its first ten steps.
    """
    rows = []
    for preset, engine in [*((name, None) for name in load.runs), ("embedded", "zero2")]:
        steps = load.steps if engine is None else 4
        settings = dict(stage=1, bf16=True, align_steps=steps, max_steps=3 * steps, log_steps=1, scenes=400)
        settings |= dict(deepspeed=engine, num_workers=0)
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig.from_preset(preset, output=f"{folder}/run", **settings)
            start = time.perf_counter()
            if engine is None:
                train(config, progress=False)
            else:  # DeepSpeed changes the whole process, so it gets one of its own
                file = Path(folder, "config.yaml")
                file.write_text(yaml.safe_dump(config.model_dump()))
                command = [sys.executable, "-m", "llavolta.train", str(file), "--num-processes", "1"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{preset} under {engine}: {done.stderr[-3000:]}")
            seconds = time.perf_counter() - start
            log = [row for row in read_metrics(f"{config.output}/metrics.jsonl") if "loss" in row]
        later = [row["seconds"] for row in log[10:]]
        rate = 1 / np.median(later) if later else np.nan
        row = dict(preset=preset, engine=engine or "none", seconds=seconds, steps_per_s=rate)
        rows.append(row | dict(first_loss=log[0]["loss"], last_loss=log[-1]["loss"]))
    return pd.DataFrame(rows)


PARTS: dict[str, Callable[[Load], pd.DataFrame]] = {
    "peaks": peaks,
    "core": core,
    "training": training,
    "profile": profile,
    "inference": inference,
    "host_reads": host_reads,
    "long": long,
    "runs": runs,
}


def gpu_report(folder: Path, tiny: bool = False, parts: Sequence[str] = (), minutes: float = 8) -> int:
    """Measure the parts one after the other, and write gpu-<card>.md and .csv after each.

    A part that fails is reported, and the next one begins.

    Args:
        folder: The folder of the two files.
        tiny: Use small shapes, on the CPU if there is no GPU.
        parts: Keys of PARTS; empty: all.
        minutes: No part begins later than this.

    Returns:
        The number of parts that failed, found something wrong, or were left out.

    Raises:
        UserError: There is no GPU and ``tiny`` is False, or a part does not exist.
    """
    if not tiny and not torch.cuda.is_available():  # before anything is written
        raise UserError("there is no CUDA device to measure on; --tiny runs the same on small shapes on the CPU")
    load = full_load() if not tiny else tiny_load("cuda" if torch.cuda.is_available() else "cpu")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UserError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    name, start, tables, wrong = card_name(load.device), time.perf_counter(), {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts or PARTS:
        began = time.perf_counter()
        if began - start > 60 * minutes:
            wrong.append(f"{part}: not begun, {minutes:g} minutes were over")
            continue
        try:
            tables[part] = PARTS[part](load)
        except Exception as error:  # whatever it is, the next part may still work
            traceback.print_exc()
            wrong.append(f"{part}: {type(error).__name__}: {str(error)[:300]}")
        else:
            if "ok" in tables[part] and not tables[part].ok.all():
                wrong.append(f"{part}: {(~tables[part].ok).sum()} of {len(tables[part])} rows are not ok")
            print(f"\n{part} ({time.perf_counter() - began:.0f} s)\n{tables[part].to_string(index=False)}", flush=True)
        gc.collect()
        if load.device != "cpu":
            torch.cuda.empty_cache()
        _write(folder / f"gpu-{name}", load, tiny, tables, wrong)
    print(
        "\n".join(["", *wrong] if wrong else ["", "all parts are done"]), f"\n{folder / f'gpu-{name}'}.md", flush=True
    )
    return len(wrong)


TITLES = {name: part.__doc__.split("\n\n") for name, part in PARTS.items()}


def _write(file: Path, load: Load, tiny: bool, tables: dict[str, pd.DataFrame], wrong: list[str]) -> None:
    parts = [table.assign(part=part) for part, table in tables.items()]
    if parts:
        table = pd.concat(parts, ignore_index=True)
        table[["part", *table.columns.drop("part")]].to_csv(file.with_suffix(".csv"), index=False, float_format="%.6g")
    where = torch.cuda.get_device_name(load.device) if load.device != "cpu" else "a CPU"
    lines = [
        f"# Measured on {where}",
        f"`python papers/benchmarks/gpu.py{' --tiny' if tiny else ''}`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {load.dtype}, random weights. Shapes: {_shapes(load)}.",
    ]
    peak = tables["peaks"].matmul_TFLOP_s[0] if "peaks" in tables else np.nan
    for part, table in tables.items():
        if "TFLOP_s" in table:
            table = table.copy()
            table.insert(table.columns.get_loc("TFLOP_s") + 1, "of_peak", table.TFLOP_s / peak)
        text = [" ".join(paragraph.split()) for paragraph in TITLES[part]]
        lines += [f"## {part}", *text, _markdown(table)]
    lines += ["## What fell short", *[f"- {line}" for line in wrong]] if wrong else []
    file.with_suffix(".md").write_text("\n\n".join(lines) + "\n")


def _shapes(load: Load) -> str:
    text, vision = load.config.text_config, load.config.vision_config
    return (
        f"decoder of {text.num_hidden_layers} layers of width {text.hidden_size}, tower of {vision.num_hidden_layers} "
        f"layers of width {vision.hidden_size}, {load.config.image_seq_length} visual tokens a picture and {load.text} "
        "text tokens an example"
    )


def _markdown(table: pd.DataFrame) -> str:
    def cell(value) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
        return str(value)

    rows = [table.columns, ["---"] * len(table.columns), *(map(cell, row) for row in table.itertuples(index=False))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the report. Returns the exit code: 1 if a part failed, found something wrong or was left out."""
    parser = argparse.ArgumentParser(prog="python papers/benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=given_path, default=PAPERS / "benchmarks", help="of gpu-<card>.md and .csv")
    parser.add_argument("--parts", nargs="+", default=[], help="some of them (default: all)")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after so many")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU: whether it all works")
    try:
        return min(1, gpu_report(**vars(parser.parse_args(arguments))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
