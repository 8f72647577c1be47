"""Plots leave the user's matplotlib settings alone and draw what the defaults never are: many stages, ragged counts."""

import os
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from llavolta import plots, widgets


def test_importing_and_drawing_leave_matplotlib_s_settings_alone():
    code = """
import matplotlib, matplotlib.pyplot as plt
plt.rcParams.update({"axes.grid": False, "font.size": 7.5, "axes.facecolor": "black", "figure.dpi": 61})
before = dict(plt.rcParams)
import numpy as np
from llavolta import plots, widgets
assert {name: value for name, value in plt.rcParams.items() if before[name] != value} == {}
plots.scene_grid(np.zeros((2, 4, 4, 3)))
plots.token_map(np.zeros((4, 4, 3)), np.zeros((2, 2), int))
assert {name: value for name, value in plt.rcParams.items() if before[name] != value} == {}
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MPLBACKEND": "agg"}, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_every_public_function_draws_under_the_theme():
    public = [
        item
        for name, item in vars(plots).items()
        if getattr(item, "__module__", "") == plots.__name__ and name[0] != "_"
    ]
    functions = [item for item in public if callable(item) and item is not plots.themed]
    assert len(functions) > 20 and all(hasattr(item, "__wrapped__") for item in functions)
    with matplotlib.rc_context(plots.THEME):
        themed = widgets.png(plots.loss_curve(_metrics(2)))
    odd = {
        "axes.facecolor": "black",
        "axes.grid": False,
        "xtick.labelsize": 4,
        "ytick.color": "red",
        "grid.color": "red",
    }
    with matplotlib.rc_context(odd):
        assert widgets.png(plots.loss_curve(_metrics(2))) == themed
    plt.close("all")


def _metrics(stages: int):
    rows = [
        {"stage": stage, "step": step, "loss": 1.0 / step, "plan": f"{stage}:avgpool:2"}
        for stage in range(1, stages + 1)
        for step in (2 * stage, 2 * stage + 1)
    ]
    return pd.DataFrame(rows)
