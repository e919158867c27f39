"""Errors as a table in colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from fisher_lab.errors.measures import MEASURES
from fisher_lab.plots.layers import every
from fisher_lab.plots.reading import (
    Cells,
    Shown,
    about,
    layer_titles,
    one_error,
    title_of,
)
from fisher_lab.plots.scale import LARGEST, Scale, drawable
from fisher_lab.plots.style import new_figure, room_for, styled
from fisher_lab.results import Comparison

FROM_EXACT = "cividis"  # dark is exact
TO_EXACT = "cividis_r"  # of a measure that falls short of its exact value
BOTH_WAYS = "PuOr"  # of signed errors: white is exact
BRIGHT = 0.5  # from this luminance on, black reads better than white
CELL = 0.36  # inches of a line
LOWEST = 0.19  # of a line whose values can be written
NARROWEST = 0.42  # inches of a column whose values can be written
TALLEST = {None: 7.5, 1: 5.0, 2: 6.0}  # inches of all lines, by the columns of a paper


@styled
def heatmap(
    comparison: Comparison,
    error: str = "frobenius",
    *,
    damping: float | None = None,
    layers: Sequence[str] | None = None,
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Table in colours: layers down, approximations across, every value in its cell where it fits.

    What is exact is dark; of signed errors, white, with one colour for what is too small and one
    for what is too large.

    Args:
        comparison: a Comparison.
        error: which measure.
        damping: for damped measures, which one.
        layers: names of layers, None for all and "(all)".
        approximations: labels of approximations, None for all.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error, damping, layer or approximation that was not measured.

    Example:
        >>> figure = fl.plots.heatmap(comparison, "trace")
    """
    asked = one_error(comparison, error, damping, layers, approximations)
    found = asked.shown
    scale = Scale.of(error, asked.values)
    norm, colours = _colours(error, asked.values, scale)
    title = about(comparison)
    lines = layer_titles(comparison, found.layers, "  ")
    names = list(found.names.values())
    # wide enough for the columns and for the title, high enough for names that stand aslant
    width = max(2.4 + 0.68 * len(names), 1.0 + 0.09 * len(title)) + room_for(lines, 20)
    line = min(CELL, TALLEST[columns] / len(lines))
    height = 1.5 + line * len(lines) + 0.6 * room_for(names, 25)
    figure = new_figure(width, height, columns)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    table = _table(asked.rows, found)
    # the colours overflow long before the numbers do
    image = axes.imshow(np.clip(table, -LARGEST, LARGEST), norm=norm, cmap=colours, aspect="auto")
    if scale.log:  # zeros have no logarithm: the colour of the smallest
        axes.set_facecolor(colours(0.0))
    across = (figure.get_figwidth() - 2.4 - room_for(lines, 20)) / len(names)
    if line >= LOWEST and across >= NARROWEST:
        _write_values(axes, table, norm, colours, scale)
    # aslant, names need a third of an inch; upright, only their height
    angle = 35 if across >= 0.3 else 90
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", rotation=angle)
    for tick in axes.get_xticklabels():
        tick.set(ha="right", va="center" if angle == 90 else "top", rotation_mode="anchor")
    named = range(0, len(lines), every(len(lines), line * len(lines)))
    axes.set_yticks(named, [lines[index] for index in named])
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    # as thick as in a figure of ordinary height
    thin = max(20.0, 6.0 * height)
    figure.colorbar(image, ax=axes, label=title_of(error, damping), pad=0.01, aspect=thin)
    return figure


def _table(rows: Cells, found: Shown) -> list[list[float]]:
    """The values, a line for each layer; NaN where nothing was measured."""
    table = []
    for layer in found.layers:
        line = []
        for label in found.labels:
            row = rows.get((layer, label))
            line.append(math.nan if row is None else row.value)
        table.append(line)
    return table


def _colours(error: str, values: Sequence[float], scale: Scale) -> tuple[Normalize, Colormap]:
    """From values to colours: those of exact values are the same in every figure."""
    finite = [value for value in values if drawable(value)]
    # of cells that hold no number, the colours do not matter
    least = min(finite, default=0.0)
    most = max(finite, default=1.0)
    exact = scale.exact
    if exact is None:
        return Normalize(least, most), colormaps[FROM_EXACT]
    measure = MEASURES.get(error)
    signed = measure is not None and measure.judges == "size"
    if signed or least < exact < most:
        farthest = max(exact - least, most - exact) or 1.0
        return CenteredNorm(exact, farthest), colormaps[BOTH_WAYS]
    if scale.log:
        positive = [value for value in finite if value > 0]
        return LogNorm(min(positive), most), colormaps[FROM_EXACT]
    if most <= exact:
        return Normalize(min(least, exact), exact), colormaps[TO_EXACT]
    return Normalize(exact, most), colormaps[FROM_EXACT]


def _write_values(
    axes: Axes, table: list[list[float]], norm: Normalize, colours: Colormap, scale: Scale
) -> None:
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            at = 0.0
            # zero has no logarithm, and the darkest colour
            if drawable(value) and not (scale.log and value <= 0):
                at = float(norm(value))
            elif value > 0:
                at = 1.0
            color = _ink(colours(at))
            text = _cell(value, scale.exact)
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color=color)


def _ink(background: tuple[float, float, float, float]) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue, _ = background
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709
    return "black" if luminance > BRIGHT else "white"


def _cell(value: float, exact: float | None) -> str:
    if math.isnan(value):
        return ""
    if value == exact:
        return "exact"
    if 1e-3 <= abs(value) < 1e3 or math.isinf(value):
        return f"{value:.3f}"
    return f"{value:.0e}"
