"""Time a training step and a prefill under several plans: ``python -m llavolta.bench step``."""

from __future__ import annotations

import argparse
import sys
import typing

import torch

from llavolta.cost.bench import Sizes, step_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``arguments``, by default those of the shell. Return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m llavolta.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="step")
    step = commands.add_parser("step", help="a training step and a prefill under several plans")
    for name, kind in typing.get_type_hints(Sizes).items():
        step.add_argument(f"--{name}", type=kind, default=getattr(Sizes, name))
    step.add_argument("--rounds", type=int, default=7)
    options = vars(parser.parse_args(arguments))
    rounds = options.pop("rounds")
    options.pop("command")
    sizes = Sizes(**options)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}")
    for name, table in step_report(sizes, rounds).items():
        print(f"\n{name}\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
