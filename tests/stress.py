"""Kill a training at random moments until it ends: ``python tests/stress.py --kills 20`` (make stress).

Every run is killed (SIGKILL) again and again, at moments drawn evenly over the time that a whole run takes, and started
again, until it comes to its end; then its weights must be those of the run that nothing disturbed, bit for bit. The
runs are forks of this process, which has loaded the libraries: kills fall on training, saving and changes of stage.
--kinds: whole tuning, adapters, a Qwen2.5-VL, and two processes under DistributedDataParallel and ZeRO-2, of which one
is killed first, as happens, and the other a moment later, as torchrun does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with OpenMP threads hangs
sys.path.insert(0, str(Path(__file__).parent))

import torch
from processors_tiny import write
from safetensors.torch import load_file
from tiny import write_small_llava
from transformers.utils import logging

from llavolta.train import checkpoints
from llavolta.train.config import TrainConfig
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics
from llavolta.worlds import digits

torch.set_num_threads(1)
logging.disable_progress_bar()
STEPS = 9
KINDS = {  # the configuration, and how many processes
    "plain": ({}, 1),
    "lora": ({"lora_rank": 2}, 1),
    "qwen2.5-vl": ({}, 1),
    "ddp": ({"batch_size": 4, "global_batch": 8}, 2),
    "zero2": ({"batch_size": 4, "global_batch": 8, "deepspeed": "zero2"}, 2),
}


def start(settings: dict, processes: int) -> list:
    """Processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = get_context("fork")
    children = [fork.Process(target=_train, args=(settings, rank, processes, port)) for rank in range(processes)]
    for child in children:
        child.start()
    return children


def _train(settings: dict, rank: int, processes: int, port: int) -> None:
    if processes > 1:
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(TrainConfig(**settings), progress=False)
        if processes > 1:
            torch.distributed.destroy_process_group()


def wait(children: list, seconds: float | None = None) -> bool:
    """Whether all ``children`` have ended well within so many seconds; raises AssertionError if one ended otherwise."""
    until = None if seconds is None else time.perf_counter() + seconds
    for child in children:
        child.join(None if until is None else max(0.0, until - time.perf_counter()))
        assert child.exitcode in (0, None), f"a resumed run failed with exit code {child.exitcode}"
    return all(child.exitcode == 0 for child in children)


def kill(children: list, first: int) -> None:
    for child in [children[first], *children]:
        child.kill()
        child.join(0.1)
    for child in children:
        child.join()


def state_of(run: Path) -> str:
    """Where a kill has left ``run``."""
    if not (run / "config.yaml").exists():
        return "before the run began"
    if any(path.is_file() for path in run.rglob(f"{checkpoints.STAGING}/**/*")):
        return "while saving"
    saved = checkpoints.checkpoints(run)
    if not saved:
        return "in projector alignment"
    return "between stages" if checkpoints.step_of(saved[0]) % (STEPS // 3) == 0 else "within a stage"


def check(run: Path, reference: Path) -> None:
    """Assert that ``run`` ended as ``reference`` did."""
    expected, found = (load_file(folder / "model.safetensors") for folder in (reference, run))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert not (run / checkpoints.STAGING).exists()
    assert all(checkpoints.find_damage(folder) is None for folder in checkpoints.checkpoints(run))


def stress(kind: str, kills: int, seed: int, folder: Path) -> Counter:
    """Kill at least ``kills`` times; how often in which state. Raises AssertionError if a run ends otherwise."""
    own, processes = KINDS[kind]
    data = digits.build(folder / "digits", 120, 10, seed=3)
    model = write("qwen2_5_vl", folder / "model") if kind == "qwen2.5-vl" else write_small_llava(folder / "model")
    settings = dict(
        model=str(model),
        data=str(data / "train.json"),
        align_data=str(data / "align.json"),
        align_steps=2,
        align_batch_size=4,
        max_steps=STEPS,
        batch_size=8,
        log_steps=1,
        save_steps=1,
    )
    settings |= own
    reference, begun = folder / "reference", time.perf_counter()
    assert wait(start({**settings, "output": str(reference)}, processes)), "the undisturbed run failed"
    seconds = time.perf_counter() - begun
    print(f"{kind}: an undisturbed run takes {seconds:.1f} s", flush=True)
    moments, where, runs = random.Random(seed), Counter(), 0
    while where.total() < kills:
        run = folder / f"run-{runs}"
        runs += 1
        while True:
            children = start({**settings, "output": str(run)}, processes)
            if wait(children, moments.uniform(0, seconds)):
                break
            kill(children, moments.randrange(processes))
            where[state_of(run)] += 1
        check(run, reference)
        shutil.rmtree(run)
        print(f"run {runs}: equal to the undisturbed one, bit for bit; {where.total()} kills so far", flush=True)
    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            where = stress(kind, options.kills, options.seed, Path(folder))
        print(f"{kind}: " + "; ".join(f"{count} kills {state}" for state, count in where.most_common()), flush=True)


if __name__ == "__main__":
    main()
