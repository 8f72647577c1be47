"""Draw token maps: images with the tokens that their patches ended in.

See ``studies.inspect`` for the maps and views that are drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from llavolta.show.plots import COLOURS, themed


@themed
def scene_grid(pictures: np.ndarray) -> Figure:
    """Draw images in one row.

    Args:
        pictures: (N, H, W, 3).
    """
    figure, axes = plt.subplots(
        1, len(pictures), figsize=(1.6 * len(pictures), 1.7), layout="constrained"
    )
    for ax, picture in zip(np.atleast_1d(axes), pictures, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_axis_off()
    return figure


@themed
def token_map(
    picture: np.ndarray,
    groups: np.ndarray,
    ax=None,
    title: str = "",
    shared: np.ndarray | None = None,
):
    """Draw an image under its patch grid, tinted by the token that each patch ended in.

    Dropped patches are dark. Patches that were not merged keep the image's own colours.

    Args:
        picture: (H, W, 3), or a PIL image.
        groups: (rows, columns) the number of each patch's token; -1 if dropped.
        ax: The axes to draw on; None: those of a new figure.
        title: The title.
        shared: (frames, rows, columns) the groups of the whole clip, if the image is a frame. A
            token may then merge patches of several frames.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(3.4, 3.4), layout="constrained")[1]
    rows, columns = groups.shape
    extent = (0, columns, rows, 0)  # the axes count patches, from the upper left corner
    ax.imshow(picture, extent=extent, interpolation="nearest")
    tint = np.array([COLOURS[number % len(COLOURS)] for number in groups.ravel()]).reshape(
        rows, columns, 3
    )
    numbers, count = np.unique(groups if shared is None else shared, return_counts=True)
    # ``numbers`` is sorted and has every group, so searchsorted finds each patch's count.
    merged = count[np.searchsorted(numbers, groups)] > 1
    alpha = np.where(groups < 0, 0.85, np.where(merged, 0.4, 0.0))
    ax.imshow(
        np.where(groups[..., None] < 0, 0.0, tint),
        extent=extent,
        alpha=alpha,
        interpolation="nearest",
    )
    # A border wherever two neighbouring patches end in different tokens.
    row, column = np.nonzero(groups[:, 1:] != groups[:, :-1])
    ax.vlines(column + 1, row, row + 1, color="white", linewidth=1)
    row, column = np.nonzero(groups[1:] != groups[:-1])
    ax.hlines(row + 1, column, column + 1, color="white", linewidth=1)
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(visible=False)
    return ax


@themed
def stage_token_maps(picture: np.ndarray, maps: dict[str, np.ndarray]) -> Figure:
    """Draw the token maps of several plans on one image, five in a row.

    Args:
        picture: (H, W, 3), or a PIL image.
        maps: By title, the groups as of ``token_map``.

    Returns:
        The figure.
    """
    columns = min(len(maps), 5)
    rows = -(-len(maps) // columns)  # rounded up
    # At a lower resolution, several rows of maps do not make the notebook's file too large.
    size, dpi = (2.7 * columns, 3.1 * rows), 100 if rows == 1 else 70
    figure, axes = plt.subplots(
        rows, columns, figsize=size, dpi=dpi, squeeze=False, layout="constrained"
    )
    for ax, (name, groups) in zip(axes.flat, maps.items(), strict=False):
        token_map(picture, groups, ax, f"{name}\n{_left(groups)} of {groups.size} tokens")
        ax.title.set_fontsize(11)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    return figure


@themed
def clip_token_maps(frames: Sequence, maps: dict[str, np.ndarray]) -> Figure:
    """Draw the frames of a clip under the token maps of several plans, one plan in a row.

    Patches of one colour in one row, also in different frames, may have ended in one token. Colours
    repeat.

    Args:
        frames: The frames, as images of ``token_map``.
        maps: By plan, (frames, rows, columns) the number of each patch's token; -1 if dropped.

    Returns:
        The figure.
    """
    size = (1.4 * len(frames), 1.75 * len(maps))  # tall enough for a plan's text beside its row
    figure, axes = plt.subplots(
        len(maps), len(frames), figsize=size, dpi=100, squeeze=False, layout="constrained"
    )
    for row, (name, groups) in zip(axes, maps.items(), strict=True):
        for ax, frame, part in zip(row, frames, groups, strict=True):
            token_map(frame, part, ax, shared=groups)
        row[0].set_ylabel(f"{name}\n{_left(groups)} tokens", fontsize=8)
    for number, ax in enumerate(axes[0], start=1):
        ax.set_title(f"frame {number}", fontsize=9)
    return figure


@themed
def picture_with_tokens(picture, view) -> Figure:
    """Draw a view's token map, and the most likely first tokens of the answer.

    Args:
        picture: The image of the view.
        view: An ``inspect.View``.

    Returns:
        The figure.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.6, 3.4), layout="constrained", width_ratios=(1, 1.1)
    )
    _view_map(picture, view, left)
    words, chances = list(view.guesses), [100 * chance for chance in view.guesses.values()]
    bars = right.barh(range(len(words)), chances, color=COLOURS[0])
    right.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    right.set_yticks(range(len(words)), words)
    right.invert_yaxis()
    right.set(xlim=(0, 112), xlabel="probability (%)", title="first token of the answer")
    right.grid(axis="y", visible=False)
    return figure


@themed
def picture_with_layers(picture, view) -> Figure:
    """Draw a view's token map, and the visual tokens that each decoder layer processed.

    Args:
        picture: The image of the view.
        view: An ``inspect.View``.

    Returns:
        The figure.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.6, 3.4), layout="constrained", width_ratios=(1, 1.1)
    )
    _view_map(picture, view, left)
    right.barh(range(len(view.tokens)), view.tokens, color=COLOURS[0], height=0.8)
    right.set_yticks(range(0, len(view.tokens), max(1, len(view.tokens) // 8)))
    right.set(
        xlabel="visual tokens",
        ylabel="decoder layer",
        xlim=(0, view.grid().size * 1.05),
        title=f"CR {view.ratio:.2f}",
    )
    right.grid(axis="y", visible=False)
    return figure


def _view_map(picture, view, ax) -> None:
    """Draw the token map after the plan's last layer on ``ax``."""
    groups = view.grid()
    token_map(picture, groups, ax, f"{view.plan}\n{_left(groups)} of {groups.size} tokens")
    ax.title.set_fontsize(11)


def _left(groups: np.ndarray) -> int:
    """The number of tokens left."""
    return len(np.unique(groups[groups >= 0]))


@themed
def layer_maps(picture, view) -> Figure:
    """Draw a view's token map after each layer that compresses.

    Args:
        picture: The image of the view.
        view: An ``inspect.View``.

    Returns:
        The figure.
    """
    return stage_token_maps(
        picture, {f"from layer {layer} on": view.grid(layer) for layer in view.maps}
    )
