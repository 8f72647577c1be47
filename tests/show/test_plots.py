"""Plots leave the user's matplotlib settings alone and draw what the defaults never are: many stages, ragged counts."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llavolta.show import plots, token_maps, widgets
from llavolta.train.schemes import Scheme


def test_what_the_backend_sets_with_the_first_figure_stays():
    before = matplotlib.is_interactive()
    try:
        plots.themed(lambda: matplotlib.interactive(not before))()  # as the backend of notebooks does
        assert matplotlib.is_interactive() is not before
    finally:
        matplotlib.interactive(before)


def test_every_public_function_draws_under_the_theme():
    public = [
        item
        for module in (plots, token_maps)
        for name, item in vars(module).items()
        if getattr(item, "__module__", "") == module.__name__ and name[0] != "_"
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


@pytest.mark.slow
def test_plots_of_twenty_five_stages():
    plans = [f"{layer}:avgpool:{stride}" for stride in (16, 8, 4, 3, 2) for layer in range(5)]
    figure = plots.scheme_diagram(Scheme.equal("long", *plans), 8, 144, 100, current=25)
    drawn = [ax for ax in figure.axes if ax.get_visible() and ax.patches]
    assert [ax.get_title().split("\n")[0] for ax in drawn] == [f"Stage {k}: {plan}" for k, plan in enumerate(plans, 1)]
    figure.draw_without_rendering()  # every panel has room, none covers its neighbour
    boxes = [ax.get_tightbbox() for ax in drawn]
    assert not any(one.overlaps(two) for k, one in enumerate(boxes) for two in boxes[k + 1 :])
    ax = plots.loss_curve(_metrics(25)).axes[0]
    assert len(ax.lines) == 25 and len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 25
    token_maps.stage_token_maps(np.zeros((8, 8, 3)), {plan: np.arange(4).reshape(2, 2) for plan in plans})
    plt.close("all")


def test_attention_of_many_kinds_and_tables_of_many_columns():
    kinds = [f"kind {number}" for number in range(25)]
    rows = [(kind, layer, 0.1, 0.0, 0.2, 0.3) for kind in kinds for layer in range(2)]
    table = pd.DataFrame(rows, columns=["kind", "layer", "share", "low", "high", "tokens_share"])
    assert len(plots.attention_lines(table).axes[0].get_legend_handles_labels()[1]) == 26
    assert len(plots._stacked(pd.DataFrame(1.0, ["a", "b"], kinds), ["a", "b"], "x").axes[0].patches) == 50
    plt.close("all")


def test_scheme_of_a_model_whose_number_of_visual_tokens_varies():
    figure = plots.scheme_diagram(Scheme.equal("mine", "1:avgpool:8", "none"), 4, 0, 100)
    ax = figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [576, 72, 72, 72]
    assert ax.get_xlabel() == "visual tokens of 576" and ax.get_title().endswith(f"CR {4 * 576 / 792:.2f}")
    plt.close("all")


def _metrics(stages: int):
    rows = [
        {"stage": stage, "step": step, "loss": 1.0 / step, "plan": f"{stage}:avgpool:2"}
        for stage in range(1, stages + 1)
        for step in (2 * stage, 2 * stage + 1)
    ]
    return pd.DataFrame(rows)
