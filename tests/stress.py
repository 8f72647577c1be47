"""Kill a training at random moments until it ends: ``python tests/stress.py --kills 20`` (make stress).

Every run is killed (SIGKILL) again and again, at moments drawn evenly over the time that a whole run takes, and started
again, until it comes to its end; then its weights must be those of the run that nothing disturbed, bit for bit. The
runs are forks of this process, which has loaded the libraries: kills fall on training, saving and changes of stage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with OpenMP threads hangs
sys.path.insert(0, str(Path(__file__).parent))

import torch
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


def start(settings: dict):
    """A process that trains."""
    child = get_context("fork").Process(target=_train, args=(settings,))
    child.start()
    return child


def _train(settings: dict) -> None:
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        train(TrainConfig(**settings), progress=False)


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


def stress(kills: int, seed: int, folder: Path) -> Counter:
    """Kill at least ``kills`` times; how often in which state. Raises AssertionError if a run ends otherwise."""
    data = digits.build(folder / "digits", 120, 10, seed=3)
    settings = dict(
        model=str(write_small_llava(folder / "model")),
        data=str(data / "train.json"),
        align_data=str(data / "align.json"),
        align_steps=2,
        max_steps=STEPS,
        batch_size=8,
        log_steps=1,
        save_steps=1,
    )
    reference, begun = folder / "reference", time.perf_counter()
    child = start({**settings, "output": str(reference)})
    child.join()
    assert child.exitcode == 0, "the undisturbed run failed"
    seconds = time.perf_counter() - begun
    print(f"an undisturbed run takes {seconds:.1f} s", flush=True)
    moments, where, runs = random.Random(seed), Counter(), 0
    while where.total() < kills:
        run = folder / f"run-{runs}"
        runs += 1
        while True:
            child = start({**settings, "output": str(run)})
            child.join(moments.uniform(0, seconds))
            if child.exitcode is None:
                child.kill()
                child.join()
            if child.exitcode == 0:
                break
            assert child.exitcode == -9, f"a resumed run failed with exit code {child.exitcode}"
            where[state_of(run)] += 1
        check(run, reference)
        shutil.rmtree(run)
        print(f"run {runs}: equal to the undisturbed one, bit for bit; {where.total()} kills so far", flush=True)
    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = stress(options.kills, options.seed, Path(folder))
    print("; ".join(f"{count} kills {state}" for state, count in where.most_common()))


if __name__ == "__main__":
    main()
