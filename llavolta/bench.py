"""``python -m llavolta.bench``: all that is timed, as ratios side by side; the work is done in ``llavolta.cost``."""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import typing
from pathlib import Path

import torch

from llavolta.cost import throughput
from llavolta.cost.bench import (
    Sizes,
    compressor_times,
    embedded_batches,
    recipe_times,
    scheme_times,
    step_report,
    zoo_times,
)
from llavolta.cost.gpu_report import gpu_report
from llavolta.cost.precision import precision_times
from llavolta.errors import UserError
from llavolta.paths import PAPERS, given_path
from llavolta.train.schemes import CONTROL_SCHEMES, SCHEMES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llavolta.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compressors = commands.add_parser("compressors", help="the compressors before the projector, against the tower")
    for name in ("images", "tower_images", "grid", "width", "layers", "rounds"):
        default = inspect.signature(compressor_times).parameters[name].default
        compressors.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    zoo = commands.add_parser("zoo", help="every method's own time, as a share of a prefill and of a training step")
    for name in ("width", "layers", "grid", "batch", "rounds"):
        zoo.add_argument(f"--{name}", type=int, default=inspect.signature(zoo_times).parameters[name].default)
    step = commands.add_parser("step", help="a training step and a prefill under several plans")
    for name, kind in typing.get_type_hints(Sizes).items():
        step.add_argument(f"--{name}", type=kind, default=getattr(Sizes, name))
    step.add_argument("--rounds", type=int, default=7)
    schemes = commands.add_parser("schemes", help="time of four schemes, measured and predicted; fails above 10%%")
    schemes.add_argument("--rounds", type=int, default=5)
    recipes = commands.add_parser("recipes", help="alignment and tuning under schemes, at a size of your choice")
    for name, kind in typing.get_type_hints(Sizes).items():
        recipes.add_argument(f"--{name}", type=kind, default=getattr(Sizes, name))
    compared = [name for name in SCHEMES if name not in CONTROL_SCHEMES]
    recipes.add_argument("--schemes", nargs="+", default=compared, choices=list(SCHEMES), metavar="NAME")
    recipes.add_argument("--rounds", type=int, default=5)
    opening = commands.add_parser("data", help="opening a data set of mix665k's size; fails above 20 s or 1 GB")
    opening.add_argument("--entries", type=int, default=sum(many for many, *_ in throughput.MIX.values()))
    train = commands.add_parser("train", help="parts of a step, loading, memory; fails if loading is below 2x the use")
    train.add_argument("--model", default="embedded")
    train.add_argument("--plans", nargs="+", default=["1:avgpool:8", "4:avgpool:8"])
    train.add_argument("--batch", type=int, default=32)
    train.add_argument("--rounds", type=int, default=5)
    precision = commands.add_parser("precision", help="a step in float32, autocast, and bfloat16 with a master copy")
    precision.add_argument("--model", default="nano")
    precision.add_argument("--batch", type=int, default=8)
    precision.add_argument("--rounds", type=int, default=3)
    gpu = commands.add_parser("gpu", help="everything on one GPU at the shapes of LLaVA-1.5-7B, in minutes")
    gpu.add_argument("--folder", type=given_path, default=PAPERS / "benchmarks", help="of gpu-<card>.md and .csv")
    gpu.add_argument("--parts", nargs="+", default=[], help="some of them (default: all)")
    gpu.add_argument("--minutes", type=float, default=8, help="no part begins after so many")
    gpu.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU: whether it all works")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command == "gpu":
        try:
            return min(1, gpu_report(**options))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if command == "precision":
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}\n")
        model, (batch,) = embedded_batches(options["batch"], 1, options["model"])
        print(precision_times(model, batch, options["rounds"]).to_string(index=False, float_format="{:.3f}".format))
        return 0
    if command == "train":
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}")
        tables = throughput.train_report(**options)
        for name, table in tables.items():
            print(f"\n{name}\n{table.to_string(float_format='{:.3f}'.format)}")
        return int(not throughput.keeps_up(tables["loading"]))
    if command == "data":
        with tempfile.TemporaryDirectory() as folder:
            table = throughput.data_report(Path(folder), **options)
        print(table.to_string(float_format="{:.1f}".format))
        return int(table.seconds.max() > 20 or table.resident_MB.max() > 1000)
    if command == "schemes":
        table = scheme_times(*embedded_batches(), options["rounds"])
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}\n")
        print(table.to_string(float_format="{:.3f}".format))
        return int(table.error.abs().max() > 0.1)
    if command == "zoo":
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}\n")
        print(zoo_times(**options).to_string(index=False, float_format="{:.4f}".format))
        return 0
    if command == "compressors":
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}\n")
        print(compressor_times(**options).to_string(index=False, float_format="{:.4f}".format))
        return 0
    rounds, names = options.pop("rounds"), options.pop("schemes", [])
    sizes = Sizes(**options)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}")
    if command == "recipes":
        schemes = {name: SCHEMES[name].scaled(sizes.layers) for name in names}
        print(f"\n{recipe_times(sizes, schemes, rounds).to_string(index=False, float_format='{:.2f}'.format)}")
        return 0
    for name, table in step_report(sizes, rounds).items():
        print(f"\n{name}\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
