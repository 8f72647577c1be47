"""Importing the package changes nothing for the process: settings, environment, random numbers, signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)

# One interpreter for both: starting a second one costs more than all that is checked.
CODE = """
import importlib, logging, os, pkgutil, random, signal, sys, warnings
import numpy, torch, transformers
from transformers import LlavaForConditionalGeneration

def state():
    root = logging.getLogger()
    return {
        "matplotlib": dict(matplotlib.rcParams) if "matplotlib" in globals() else {},
        "warnings": list(warnings.filters), "environment": dict(os.environ),
        "logging": (root.level, list(root.handlers), logging.root.manager.disable),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
                  torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "random": (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "process": ([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], sys.excepthook, os.getcwd()),
    }

def unchanged(by):
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{by} changes {changed}"

rest = ("av", "peft", "datasets", "deepspeed", "papermill", "accelerate", "pandas", "matplotlib")
sys.modules.update(dict.fromkeys(rest))  # importing one fails
before, loaded = state(), {*sys.modules}
import llavolta
unchanged("importing llavolta")
added = {name.split(".")[0] for name in {*sys.modules} - loaded}
assert added <= {"llavolta", "transformers"}, added
assert llavolta.COMPRESSORS["avgpool"] is llavolta.AveragePool

from llavolta import AveragePool, compress
from tiny import ragged_batch, tiny_llava

model = tiny_llava()
for plan in ({2: AveragePool(stride=8)}, "vision:prumerge+;1:fastv:0.5"):
    with compress(model, plan):
        assert model(**ragged_batch([[3, 4]])).loss.item() > 0
print("compressed")

for name in rest:
    del sys.modules[name]
import IPython, av, ipywidgets, matplotlib.pyplot, pandas, seaborn, sklearn.datasets
from transformers import AutoProcessor, Trainer  # loads what transformers puts off

matplotlib.pyplot.rcParams.update({"axes.grid": False, "font.size": 7.5, "axes.facecolor": "black", "figure.dpi": 61})
before, count = state(), 0
for module in pkgutil.walk_packages(llavolta.__path__, "llavolta."):
    if module.name.split(".")[-1] not in ("__main__", "plugin"):  # plugin: needs lmms-eval
        importlib.import_module(module.name)
        unchanged(f"importing {module.name}")
        count += 1
from llavolta.show import token_maps
token_maps.scene_grid(numpy.zeros((2, 4, 4, 3)))
token_maps.token_map(numpy.zeros((4, 4, 3)), numpy.zeros((2, 2), int))
assert state()["matplotlib"] == before["matplotlib"], "drawing changes matplotlib's settings"
assert issubclass(llavolta.StageCallback, transformers.TrainerCallback)
print(count)
"""


def test_importing_any_module_changes_nothing_global_and_compression_imports_no_more_than_a_model():
    """Compression runs without what the rest needs."""
    path = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    compressed, count = run.stdout.split()[-2:]
    assert compressed == "compressed" and int(count) > 35
