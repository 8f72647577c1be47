"""Command ``python -m llavolta.train CONFIG.yaml``: trains a stage or a scheme without a notebook.

It trains in its own process, or starts torchrun (``--num-processes``). Under a launcher it is one
of the launcher's processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import torch

from llavolta.errors import Stopped, UserError
from llavolta.paths import given_path
from llavolta.train.config import PRESETS, ConfigError, TrainConfig, parse_changes, parse_yaml
from llavolta.train.launch import launch
from llavolta.train.run import WANTED_PROCESSES, train


def _leave() -> None:
    """Close the process group, if there is one. Else gloo's threads may abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments of the command; None reads them from ``sys.argv``.

    Returns:
        The exit status: 0, 1 for an error of the user's, or 128 + the number of the signal that
        stopped the training.
    """
    about = [
        f"  {name} ({'required' if field.is_required() else field.default}): "
        f"{' '.join(field.description.split())}"
        for name, field in TrainConfig.model_fields.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m llavolta.train",
        description="Train a stage or a scheme.",
        epilog="\n".join(["parameters:", *about]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = ", ".join(PRESETS)
    parser.add_argument(
        "config",
        type=given_path,
        help=f"YAML file of TrainConfig's parameters, or a preset: {presets}",
    )
    parser.add_argument("--stage", type=int, help="overrides the file's stage")
    parser.add_argument("--output", help="overrides the file's output")
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="processes of this machine, by torchrun"
    )
    parser.add_argument(
        "--torchrun", default="", metavar="OPTIONS", help="its options for several machines"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="overrides any other parameter"
    )
    options = parser.parse_args(arguments)
    try:
        changes = {
            key: getattr(options, key)  # stage 0 is projector alignment, and no missing value
            for key in ("stage", "output")
            if getattr(options, key) is not None
        }
        changes |= parse_changes(options.set)
        if (name := str(options.config)) in PRESETS:
            config = TrainConfig.from_preset(name, **changes)
        else:
            try:
                text = options.config.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{options.config} is not UTF-8 text ({error})") from None
            values = parse_yaml(text, name)
            if not isinstance(values, dict):
                raise ConfigError(f"{options.config} must hold 'name: value' lines")
            config = TrainConfig(**values | changes)
        # A launcher has started this process: train() checks the number of processes.
        if options.num_processes and "WORLD_SIZE" in os.environ:
            os.environ[WANTED_PROCESSES] = str(options.num_processes)
            train(config)
            _leave()
        elif options.num_processes or options.torchrun:
            launch(config, options.num_processes or 1, options.torchrun)
        else:
            train(config)
            _leave()
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("stopped: interrupted; run again to go on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
