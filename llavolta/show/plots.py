"""Plots of training, accuracy and cost: colour-blind-safe, labelled, and readable in print.

Every function returns the figure that it drew. Token maps are in ``token_maps``.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from llavolta.cost.flops import PARTS
from llavolta.train.schemes import Scheme

COLOURS = sns.color_palette("colorblind")
LINES = ("-", "--", ":", "-.")
THEME = (
    sns.plotting_context("notebook")
    | sns.axes_style("whitegrid")
    | {"axes.prop_cycle": plt.cycler(color=COLOURS)}
)


def themed(draw: Callable) -> Callable:
    """Decorate a function to draw under this module's theme.

    The caller's matplotlib settings are restored afterwards. ``plt.rc_context`` does not do: it
    would also undo the settings that a notebook's backend makes while it loads with the first
    figure, and no figure would be shown.

    Args:
        draw: A function that draws.

    Returns:
        The function under the theme.
    """

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        # Only the names of the theme, so that a backend's own settings stay.
        held = {name: plt.rcParams[name] for name in THEME}
        plt.rcParams.update(THEME)
        try:
            return draw(*args, **kwargs)
        finally:
            plt.rcParams.update(held)

    return drawn


@themed
def scheme_diagram(
    scheme: Scheme, num_layers: int, num_tokens: int, total_steps: int, current: int | None = None
) -> Figure:
    """Draw the visual tokens per decoder layer in each stage (LLaVolta, figure 1).

    Each stage has a panel, with one bar per layer.

    Args:
        scheme: The scheme, for the model's depth.
        num_layers: Decoder layers of the model.
        num_tokens: Visual tokens of an image; 0 if the number varies, which draws 576.
        total_steps: Optimizer steps of the scheme.
        current: The stage to highlight, from 1; None: all.

    Returns:
        The figure.
    """
    of = num_tokens or 576  # the tokens of an image in LLaVA-1.5
    steps = np.diff([0, *scheme.boundaries(total_steps)])
    columns = min(len(steps), 4)
    rows = -(-len(steps) // columns)  # rounded up
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(10, 3.2 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for number, (ax, stage) in enumerate(zip(axes.flat, scheme.stages, strict=False), start=1):
        counts = stage.tokens_per_layer(num_layers, of)
        colour = COLOURS[0] if current in (None, number) else "0.7"
        ax.barh(range(num_layers), counts, color=colour, height=0.8)
        ax.set_title(
            f"Stage {number}: {stage}\n{steps[number - 1]} steps, "
            f"CR {num_layers * of / sum(counts):.2f}",
            fontsize=11,
        )
        ax.set_xlabel("visual tokens" if num_tokens else f"visual tokens of {of}")
        ax.set_xlim(0, of * 1.05)
        ax.grid(axis="y", visible=False)
    for ax in axes.flat[len(steps) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("decoder layer")
    axes[0][0].set_yticks(range(0, num_layers, max(1, num_layers // 8)))
    return figure


@themed
def example(conversation) -> Figure:
    """Draw the first image of an example, or the frames of its first clip if it has no image.

    Args:
        conversation: A ``data.Example``.
    """
    pictures = conversation.images[:1] or conversation.videos[0]
    size = (2.6, 2.6) if len(pictures) == 1 else (1.3 * len(pictures), 1.6)
    figure, axes = plt.subplots(1, len(pictures), figsize=size, squeeze=False, layout="constrained")
    for ax, picture in zip(axes[0], pictures, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    figure.suptitle(conversation.name, fontsize=8)
    return figure


@themed
def asked(rows: Sequence[tuple]) -> Figure:
    """Draw images with questions and answers below, three in a row.

    Args:
        rows: (image, question, answer, reference answer or "") each.
    """
    across = min(len(rows), 3)
    down = -(-len(rows) // across)  # rounded up
    figure, axes = plt.subplots(
        down, across, figsize=(3.2 * across, 3.9 * down), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    for ax, (picture, question, answer, right) in zip(axes.flat, rows, strict=False):
        ax.imshow(picture)
        told = f"{answer}" + (f"   (right: {right})" if right else "")
        ax.set_xlabel(
            "\n".join([*textwrap.wrap(question, 34), *textwrap.wrap(told, 34)]), fontsize=11
        )
        ax.set(xticks=[], yticks=[])
    return figure


@themed
def loss_curve(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Draw the training loss against the optimizer step, with a colour for each stage.

    Args:
        metrics: Rows of metrics.jsonl: stage, plan, step, loss (in nats per token).
        title: The title.
    """
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (stage, part) in enumerate(metrics.groupby("stage")):
        label = f"stage {stage} ({part.plan.iloc[0]})"
        # Where stages outnumber the colours, the next line style tells them apart.
        style = LINES[number // len(COLOURS) % len(LINES)]
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(
            part.step,
            part.loss,
            color=colour,
            linestyle=style,
            label=label,
            marker=".",
            markersize=4,
        )
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    few = len(ax.lines) <= 6  # a longer legend would cover the curve
    ax.legend(
        **{}
        if few
        else dict(
            loc="upper left", bbox_to_anchor=(1, 1), ncols=-(-len(ax.lines) // 13), fontsize=7
        )
    )
    return figure


@themed
def training_logs(logs: dict[str, pd.DataFrame]) -> Figure:
    """Draw loss and accuracy against the step, in a panel for each log.

    Args:
        logs: Tables by name: step, loss (in nats), and the accuracy (0 to 1) as the last column.
    """
    figure, axes = plt.subplots(
        1, len(logs), figsize=(5 * len(logs), 3.2), squeeze=False, layout="constrained"
    )
    for ax, (name, log) in zip(axes[0], logs.items(), strict=True):
        accuracy = log.columns[-1]
        ax.plot(log.step, 100 * log[accuracy], color=COLOURS[0], label=accuracy.replace("_", " "))
        ax.set(title=name, xlabel="step", ylabel="accuracy (%)", ylim=(0, 102))
        loss = ax.twinx()  # a second y axis, for nats
        loss.plot(log.step, log.loss, color=COLOURS[1], linestyle="--", label="loss")
        loss.set(ylabel="loss (nats)", ylim=(0, None))
        loss.grid(visible=False)  # two grids would be hard to read
        ax.legend(handles=[*ax.lines, *loss.lines], loc="center right")
    return figure


@themed
def accuracy_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw the accuracy per question type, beside the best constant answer.

    Args:
        table: From ``statistics.accuracy_table``, with the column constant.
        title: The title.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
    place = np.arange(len(table))
    # matplotlib takes the distances to both ends of the interval: (2, n)
    error = np.abs(100 * table[["low", "high"]].to_numpy().T - 100 * table.accuracy.to_numpy())
    bars = ax.bar(
        place - 0.2,
        100 * table.accuracy,
        0.4,
        yerr=error,
        capsize=3,
        label="model",
        color=COLOURS[0],
    )
    ax.bar(
        place + 0.2,
        100 * table.constant,
        0.4,
        label="best constant answer",
        color="0.75",
        hatch="//",
    )
    ax.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    ax.set_xticks(place, [f"{name}\n(n={count})" for name, count in table.questions.items()])
    ax.set(ylabel="accuracy (%)", ylim=(0, 112), title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@themed
def step_time_bars(times: pd.DataFrame, labels: Sequence[str] | None = None) -> Figure:
    """Draw measured step times relative to no compression, beside the relative FLOPs.

    Args:
        times: From ``bench.step_times``.
        labels: Names of the bars; None: the plans.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
    place = np.arange(len(times))
    for shift, column, label, colour, hatch in (
        (-0.2, "ratio", "measured", COLOURS[0], ""),
        (0.2, "flops_ratio", "FLOPs imply", "0.75", "//"),
    ):
        bars = ax.bar(place + shift, times[column], 0.4, label=label, color=colour, hatch=hatch)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    crowded = len(times) > 5  # then plan texts would overlap
    ax.set_xticks(
        place,
        labels or times.plan,
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )
    ax.set(ylabel="step time relative\nto no compression", ylim=(0, 1.2))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


LAYER_MARKERS = "osD^vP*X"  # beside colours, for print without colour


@themed
def accuracy_curves(table: pd.DataFrame, constant: pd.Series | None = None) -> Figure:
    """Draw accuracy against the share of visual tokens left, in a panel for each question type.

    There is a curve per layer, and a point per stride with its 95% interval.

    Args:
        table: From ``redundancy.sweep_table``.
        constant: By type, the accuracy of the best constant answer, drawn as a line.
    """
    kinds = ["overall", *sorted(set(table.type) - {"overall"})]
    kinds = kinds[:1] if len(kinds) == 2 else kinds  # a single type equals "overall"
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(1 + 3 * len(kinds), 3.6), sharey=True, layout="constrained"
    )
    layers = sorted(set(table.layer))
    for ax, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        for number, layer in enumerate(layers):
            part = table.query("type == @kind and layer == @layer").sort_values("kept")
            middle = 100 * part.accuracy.to_numpy()
            error = np.abs(100 * part[["low", "high"]].to_numpy().T - middle)
            ax.errorbar(
                100 * part.kept,
                middle,
                yerr=error,
                color=COLOURS[number % len(COLOURS)],
                marker=LAYER_MARKERS[number % len(LAYER_MARKERS)],
                markersize=5,
                linewidth=1.5,
                capsize=2,
                elinewidth=1,
                label=f"layer {layer}",
            )
        if constant is not None:
            ax.axhline(
                100 * constant[kind], color="0.5", linestyle=":", label="best constant answer"
            )
        ax.set_xscale("log")
        ticks = sorted({round(100 * kept, 1) for kept in table.kept})
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=8)
        ax.set_xticks([], minor=True)
        ax.set(
            title=f"{kind} (n={part.questions.iloc[0]})",
            xlabel="visual tokens kept (%)",
            ylim=(0, 102),
        )
    np.atleast_1d(axes)[0].set_ylabel("accuracy (%)")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False
    )
    return figure


@themed
def attention_lines(table: pd.DataFrame) -> Figure:
    """Draw the answer position's attention to each kind of token, against the layer.

    Dotted lines are the shares of the prompt's tokens that are of each kind.

    Args:
        table: From ``redundancy.attention_table``.
    """
    figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
        colour, marker = COLOURS[number % len(COLOURS)], LAYER_MARKERS[number % len(LAYER_MARKERS)]
        ax.plot(part.layer, 100 * part.share, color=colour, marker=marker, label=kind)
        ax.fill_between(part.layer, 100 * part.low, 100 * part.high, color=colour, alpha=0.2)
        ax.axhline(100 * part.tokens_share.mean(), color=colour, linestyle=":", linewidth=1.2)
    # An empty line, which gives the legend one entry for all dotted lines.
    ax.plot([], [], color="0.4", linestyle=":", label="share of the tokens")
    ax.set(
        xlabel="decoder layer",
        ylabel="share of the answer\nposition's attention (%)",
        ylim=(0, 102),
    )
    ax.set_xticks(sorted(set(table.layer))[:: max(1, table.layer.nunique() // 16)])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@themed
def design_grid(table: pd.DataFrame) -> Figure:
    """Draw compression ratio and training FLOPs by layer K and stride S, as two heat maps.

    Args:
        table: From ``inspect.design_table``.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, column, title, form in (
        (axes[0], "ratio", "compression ratio", ".2f"),
        (axes[1], "flops", "training FLOPs (% of no compression)", ".0f"),
    ):
        grid = table.pivot(index="layer", columns="stride", values=column) * (
            100 if column == "flops" else 1
        )
        sns.heatmap(
            grid, annot=True, fmt=form, cmap="cividis", ax=ax, annot_kws={"size": 9}, cbar=False
        )
        ax.set(title=title, xlabel="stride S (wider: to the left)", ylabel="layer K (deeper: down)")
        ax.tick_params(axis="y", rotation=0)
    return figure


@themed
def accuracy_against_cost(table: pd.DataFrame, baseline: str) -> Figure:
    """Draw each scheme's accuracy, with its 95% interval, against its training time.

    Args:
        table: From ``compare.table``, with costs.
        baseline: The scheme whose accuracy is drawn as a dotted line.
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for number, (name, row) in enumerate(table.iterrows()):
        error = 100 * np.array([[row.accuracy - row.low], [row.high - row.accuracy]])
        ax.errorbar(
            100 * row.time,
            100 * row.accuracy,
            yerr=error,
            color=COLOURS[number % len(COLOURS)],
            marker=LAYER_MARKERS[number % len(LAYER_MARKERS)],
            markersize=8,
            capsize=3,
            linestyle="none",
            label=name,
        )
    ax.axhline(100 * table.accuracy[baseline], color="0.5", linestyle=":")
    low, high = ax.get_ylim()  # as wide as the intervals, but within 0 and 102%
    ax.set(
        xlabel="training time (% of no compression)",
        ylabel="accuracy (%)",
        ylim=(max(low, 0), min(high, 102)),
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@themed
def frontier(table: pd.DataFrame) -> Figure:
    """Draw the accuracy difference against the speed-up, with a colour for each group of schemes.

    Args:
        table: One row per scheme, indexed by its name: group, speedup (times), and difference,
            difference_low, difference_high (shares from -1 to 1).
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    for number, (group, of) in enumerate(table.groupby("group", sort=False)):
        for shape, (name, row) in enumerate(of.iterrows()):
            reach = [[row.difference - row.difference_low], [row.difference_high - row.difference]]
            ax.errorbar(
                row.speedup,
                100 * row.difference,
                yerr=100 * np.array(reach),
                color=COLOURS[number % len(COLOURS)],
                marker=LAYER_MARKERS[shape % len(LAYER_MARKERS)],
                markersize=7,
                capsize=3,
                linestyle="none",
                label=f"{group}: {name}",
            )
    ax.axhline(0, color="0.5", linestyle=":")
    # On a linear scale, large losses would hide the differences between small ones.
    ax.set_yscale("symlog", linthresh=2)
    low, high = ax.get_ylim()
    ticks = [tick for tick in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    ax.set_yticks([], minor=True)
    ax.set(
        xlabel="speed-up of the whole recipe (times)",
        ylabel="accuracy less that of no compression\n(points; logarithmic beyond 2)",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


@themed
def differences(table: pd.DataFrame, baseline: str) -> Figure:
    """Draw each scheme's accuracy difference to the baseline's, with its 95% interval.

    Args:
        table: From ``compare.table``.
        baseline: The scheme that the differences are to.
    """
    rest = table.drop(index=baseline)
    figure, ax = plt.subplots(figsize=(7.5, 1 + 0.4 * len(rest)), layout="constrained")
    place, middle = np.arange(len(rest)), 100 * rest.difference
    error = np.abs(
        100 * rest[["difference_low", "difference_high"]].to_numpy().T - middle.to_numpy()
    )
    ax.errorbar(
        middle, place, xerr=error, color=COLOURS[0], marker="o", capsize=3, linestyle="none"
    )
    ax.axvline(0, color="0.5", linestyle=":")
    ax.set_yticks(place, rest.index)
    ax.invert_yaxis()
    ax.set_xlabel(f"accuracy less that of {baseline} (points)")
    return figure


@themed
def loss_curves(curves: pd.DataFrame, columns: int = 4) -> Figure:
    """Draw the training loss against the step, with a panel per scheme and a line per seed.

    Args:
        curves: From ``compare.curves``.
        columns: Panels in a row.
    """
    names = list(dict.fromkeys(curves.scheme))
    columns = min(columns, len(names))
    figure, axes = plt.subplots(
        -(-len(names) // columns),
        columns,
        figsize=(2.8 * columns, 2.3 * -(-len(names) // columns)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for number, ax in enumerate(axes.flat):  # the last row may have panels to spare
        ax.set_visible(number < len(names))
        if number >= len(names):
            continue
        runs = curves[curves.scheme == names[number]]
        for _, run in runs.groupby("seed"):
            ax.plot(run.step, run.loss, color=COLOURS[0], linewidth=1, alpha=0.7)
        for step in runs.groupby("stage").step.max().iloc[:-1]:  # where a stage ends
            ax.axvline(step, color="0.6", linestyle=":", linewidth=1)
        ax.set_title(names[number], fontsize=10)
    axes.flat[0].set_yscale("log")
    axes.flat[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.flat[0].yaxis.set_major_formatter("{x:g}")
    axes.flat[0].yaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("optimizer step", fontsize=11)
    figure.supylabel("loss (nats per token)", fontsize=11)
    return figure


@themed
def _stacked(table: pd.DataFrame, labels: Sequence[str], xlabel: str, title: str = "") -> Figure:
    """Draw a horizontal bar for each row, its columns stacked, with the sum at its end."""
    figure, ax = plt.subplots(figsize=(8.5, 1.2 + 0.45 * len(table)), layout="constrained")
    left, hatches = np.zeros(len(table)), ("", "//", "..", "xx", "--", "\\\\")
    for number, column in enumerate(table):
        colour = COLOURS[number % len(COLOURS)]
        ax.barh(
            labels, table[column], left=left, label=column, color=colour, hatch=hatches[number % 6]
        )
        left += table[column].to_numpy()
    for place, total in enumerate(left):
        ax.annotate(
            f"{total:.3g}",
            (total, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, title=title, xlim=(0, 1.12 * left.max()))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@themed
def step_cost_bars(costs: dict, title: str = "") -> Figure:
    """Draw the FLOPs of one example's training step by part of the model, with a bar per plan.

    Args:
        costs: ``cost.StepCost`` by plan.
        title: The title.
    """
    parts = {
        plan: {part: getattr(cost, part).total / 1e12 for part in PARTS}
        for plan, cost in costs.items()
    }
    names = [  # in the order of PARTS
        "vision tower",
        "projector",
        "decoder, linear",
        "decoder, attention",
        "compressors",
        "head",
    ]
    table = pd.DataFrame.from_dict(parts, orient="index").set_axis(names, axis=1)
    return _stacked(table, list(costs), "operations per example and step (TFLOP)", title)


@themed
def memory_bars(table: pd.DataFrame, limit: float | None = None) -> Figure:
    """Draw the memory of one GPU by part, with a bar per plan.

    Args:
        table: From ``planner.memory_table``.
        limit: Memory of the GPU in GB, drawn as a dotted line.
    """
    figure = _stacked(
        table[["weights", "gradients", "optimizer", "activations"]],
        list(table.index),
        "memory (GB)",
    )
    if limit is not None:
        figure.axes[0].axvline(limit, color="0.3", linestyle=":")
        figure.axes[0].set_xlim(0, max(figure.axes[0].get_xlim()[1], 1.1 * limit))
    return figure


@themed
def hours_bars(table: pd.DataFrame, budget: float | None = None) -> Figure:
    """Draw the hours of training, with a bar per scheme.

    Args:
        table: From ``planner.scheme_table``.
        budget: Available hours, drawn as a dotted line. Schemes that exceed them are grey.
    """
    figure, ax = plt.subplots(figsize=(8.5, 1.2 + 0.4 * len(table)), layout="constrained")
    fits = table.hours <= (budget or np.inf)
    bars = ax.barh(table.index, table.hours, color=[COLOURS[0] if fit else "0.7" for fit in fits])
    ax.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
    if budget is not None:
        ax.axvline(budget, color="0.3", linestyle=":")
    ax.invert_yaxis()
    ax.set(xlabel="hours of training", xlim=(0, 1.12 * max(table.hours.max(), budget or 0)))
    ax.grid(axis="y", visible=False)
    return figure


@themed
def measured_and_predicted(table: pd.DataFrame) -> Figure:
    """Draw measured and predicted training times relative to no compression.

    Args:
        table: One row per scheme, indexed by its name: measured, predicted.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
    place = np.arange(len(table))
    for shift, column, colour, hatch in (
        (-0.2, "measured", COLOURS[0], ""),
        (0.2, "predicted", "0.75", "//"),
    ):
        bars = ax.bar(place + shift, table[column], 0.4, label=column, color=colour, hatch=hatch)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    ax.set_xticks(place, table.index)
    ax.set(ylabel="training time relative\nto no compression", ylim=(0, 1.2))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@themed
def budget_rows(table: pd.DataFrame, kinds: Sequence[str] = ("overall", "difficult")) -> Figure:
    """Draw the accuracy of each method at each budget, in a panel for each kind of question.

    Methods stand in rows, the best first. Each budget is a mark with its 95% interval.

    Args:
        table: From ``budgets.accuracy``.
        kinds: Question types.
    """
    overall = table[table.type == "overall"]
    # A method that cannot meet small budgets would have too high a mean accuracy. So methods are
    # ranked by their mean difference to the average of each budget.
    relative = overall.accuracy - overall.groupby("budget").accuracy.transform("mean")
    methods = list(relative.groupby(overall.method).mean().sort_values(ascending=False).index)
    size = (4.2 * len(kinds) + 1.5, 1.4 + 0.3 * len(methods))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    budgets = sorted(set(table.budget))
    for ax, kind in zip(axes[0], kinds, strict=True):
        for number, budget in enumerate(budgets):
            part = table.query("type == @kind and budget == @budget")
            middle = 100 * part.accuracy.to_numpy()
            place = np.array([methods.index(method) for method in part.method])
            ax.errorbar(
                middle,
                # Budgets of one method lie around its row, so that their intervals do not overlap.
                place + 0.22 * (number - (len(budgets) - 1) / 2),
                xerr=np.abs(100 * part[["low", "high"]].to_numpy().T - middle),
                color=COLOURS[number % len(COLOURS)],
                marker=LAYER_MARKERS[number % len(LAYER_MARKERS)],
                linestyle="none",
                markersize=5,
                capsize=2,
                elinewidth=0.8,
                label=f"{budget:.0%} of the visual tokens",
            )
        ax.set_yticks(range(len(methods)), methods)
        ax.set(title=kind, xlabel="accuracy (%)", xlim=(0, 102), ylim=(len(methods) - 0.4, -0.6))
        ax.grid(axis="y", color="0.9")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(budgets),
        frameon=False,
    )
    return figure


@themed
def benchmark_table(table: pd.DataFrame) -> Figure:
    """Draw a table of benchmark scores in percent, hatched where nothing was run.

    Rows whose name begins with "published" have no colour, because they are of other models and
    not to be compared.

    Args:
        table: From ``harness.table.paper_table``.
    """
    figure, ax = plt.subplots(
        figsize=(1.5 + 0.62 * table.shape[1], 1.6 + 0.42 * len(table)), layout="constrained"
    )
    ax.set_facecolor("0.92")
    ax.patch.set(hatch="//", edgecolor="0.75")
    values, others = table.astype(float), table.index.astype(str).str.startswith("published")
    shared = dict(annot=True, fmt=".1f", vmin=0, vmax=100, ax=ax, annot_kws={"size": 8})
    # Masked cells are not drawn, so that the hatched background shows.
    sns.heatmap(
        values,
        mask=values.isna() | others[:, None],
        cmap="cividis",
        cbar_kws={"label": "score (%)"},
        **shared,
    )
    if others.any():
        sns.heatmap(
            values, mask=values.isna() | ~others[:, None], cmap=["white"], cbar=False, **shared
        )
    ax.set(xlabel="benchmark (hatched: not run, or not given)", ylabel="model, plan")
    ax.tick_params(axis="x", rotation=60, labelsize=9)
    ax.tick_params(axis="y", rotation=0, labelsize=9)
    ax.grid(visible=False)
    return figure
