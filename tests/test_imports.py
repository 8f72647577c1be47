"""Importing the package changes nothing for the process: settings, environment, random numbers, signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)

CODE = """
import importlib, logging, os, pkgutil, random, signal, sys, warnings
import IPython, av, ipywidgets, matplotlib.pyplot, numpy, pandas, seaborn, sklearn.datasets, torch, transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer  # loads what transformers puts off

def state():
    root = logging.getLogger()
    return {
        "matplotlib": dict(matplotlib.rcParams), "warnings": list(warnings.filters), "environment": dict(os.environ),
        "logging": (root.level, list(root.handlers), logging.root.manager.disable),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
                  torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "random": (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "process": ([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], sys.excepthook, os.getcwd()),
    }

before, count = state(), 0
import llavolta
for module in pkgutil.walk_packages(llavolta.__path__, "llavolta."):
    if module.name.split(".")[-1] not in ("__main__", "plugin"):  # plugin: needs lmms-eval
        importlib.import_module(module.name)
        after, count = state(), count + 1
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"importing {module.name} changes {changed}"
print(count)
"""


def test_importing_any_module_changes_nothing_global():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 35


ALONE = """
import sys

for name in ("av", "peft", "datasets", "deepspeed", "papermill", "accelerate", "pandas", "matplotlib"):
    sys.modules[name] = None  # importing it fails
import llavolta.compression.patch
from llavolta import AveragePool, compress
from tiny import ragged_batch, tiny_llava

model = tiny_llava()
for plan in ({2: AveragePool(stride=8)}, "vision:prumerge+;1:fastv:0.5"):
    with compress(model, plan):
        assert model(**ragged_batch([[3, 4]])).loss.item() > 0
"""


def test_compression_needs_neither_video_nor_adapters_nor_data_nor_engines():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


LIGHT = """
import sys, torch
from transformers import LlavaForConditionalGeneration

before = {*sys.modules}
import llavolta
added = {name.split(".")[0] for name in {*sys.modules} - before}
assert added <= {"llavolta", "transformers"}, added
assert issubclass(llavolta.StageCallback, sys.modules["transformers"].TrainerCallback)
assert llavolta.COMPRESSORS["avgpool"] is llavolta.AveragePool
"""


def test_the_package_costs_no_more_to_import_than_a_model_of_transformers():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
