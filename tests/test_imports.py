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

matplotlib.pyplot.rcParams.update({"axes.grid": False, "font.size": 7.5, "axes.facecolor": "black", "figure.dpi": 61})
before, count = state(), 0
import llavolta
for module in pkgutil.walk_packages(llavolta.__path__, "llavolta."):
    if module.name.split(".")[-1] not in ("__main__", "plugin"):  # plugin: needs lmms-eval
        importlib.import_module(module.name)
        after, count = state(), count + 1
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"importing {module.name} changes {changed}"
from llavolta.show import token_maps
token_maps.scene_grid(numpy.zeros((2, 4, 4, 3)))
token_maps.token_map(numpy.zeros((4, 4, 3)), numpy.zeros((2, 2), int))
assert state()["matplotlib"] == before["matplotlib"], "drawing changes matplotlib's settings"
assert issubclass(llavolta.StageCallback, transformers.TrainerCallback)
print(count)
"""


def test_importing_any_module_changes_nothing_global():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 35


ALONE = """
import sys, torch
from transformers import LlavaForConditionalGeneration

for name in ("av", "peft", "datasets", "deepspeed", "papermill", "accelerate", "pandas", "matplotlib"):
    sys.modules[name] = None  # importing it fails
before = {*sys.modules}
import llavolta
added = {name.split(".")[0] for name in {*sys.modules} - before}
assert added <= {"llavolta", "transformers"}, added
assert llavolta.COMPRESSORS["avgpool"] is llavolta.AveragePool

from llavolta import AveragePool, compress
from tiny import ragged_batch, tiny_llava

model = tiny_llava()
for plan in ({2: AveragePool(stride=8)}, "vision:prumerge+;1:fastv:0.5"):
    with compress(model, plan):
        assert model(**ragged_batch([[3, 4]])).loss.item() > 0
"""


def test_compression_imports_no_more_than_a_model_of_transformers_and_runs_without_the_rest():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
