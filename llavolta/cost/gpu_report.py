"""``python -m llavolta.bench gpu`` (``make gpu``): the parts of ``gpu``, one after another, as a page and a CSV."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from llavolta.cost.gpu import core, host_reads, inference, long, peaks, profile, runs, training
from llavolta.cost.load import Load, card_name, full_load, tiny_load
from llavolta.errors import UserError

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


class NoGpu(UserError, RuntimeError):
    """There is no CUDA device to measure on."""


def gpu_report(folder: Path, tiny: bool = False, parts: Sequence[str] = (), minutes: float = 8) -> int:
    """Measure ``parts`` (default: all) one after the other; write gpu-<card>.md and .csv to ``folder`` after each.

    tiny: small shapes, on the CPU where there is no GPU. A part that fails is reported and the next one begins; none
    begins after ``minutes``. Returns the number of parts that failed, that found something wrong, or were left out.
    """
    if not tiny and not torch.cuda.is_available():  # before anything is written
        raise NoGpu("there is no CUDA device to measure on; --tiny runs the same on small shapes on the CPU")
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
        f"`python -m llavolta.bench gpu{' --tiny' if tiny else ''}`, torch {torch.__version__}, transformers "
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
