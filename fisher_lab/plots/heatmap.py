"""Errors as a table in colours."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    Cells,
    about,
    labels_of,
    layer_titles,
    layers_of,
    pick,
    plain,
    title_of,
)
from fisher_lab.plots.scale import Scale
from fisher_lab.plots.style import new_figure, styled
from fisher_lab.results import Comparison

BRIGHT = 0.55  # from this share of the colours on, black reads better than white


@styled
def heatmap(
    comparison: Comparison, error: str = "frobenius", *, damping: float | None = None
) -> Figure:
    """Table in colours: layers down, approximations across, every value written in its cell.

    Args:
        comparison: a Comparison.
        error: which measure.
        damping: for damped measures, which one.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error or damping that was not measured.
    """
    rows = pick(comparison, error, damping)
    layers = layers_of(rows.values())
    labels = labels_of(rows.values())
    table = _table(rows, layers, labels)
    finite = [value for line in table for value in line if math.isfinite(value)]
    scale = Scale.of(error, finite)
    norm = _norm(finite, scale)
    title = about(comparison)
    # wide enough for the columns and for the title
    width = max(2.4 + 0.68 * len(labels), 1.0 + 0.09 * len(title))
    height = 1.5 + 0.36 * len(layers)
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    image = axes.imshow(table, norm=norm, aspect="auto")
    if scale.log:  # zeros have no logarithm: the colour of the smallest
        axes.set_facecolor(image.cmap(0.0))
    _write_values(axes, table, norm, scale)
    names = [plain(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), layer_titles(comparison, layers, "  "))
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes, label=title_of(error, damping), pad=0.01)
    return figure


def _table(rows: Cells, layers: list[str], labels: list[str]) -> list[list[float]]:
    """The values, a line for each layer; NaN where nothing was measured."""
    table = []
    for layer in layers:
        line = []
        for label in labels:
            row = rows.get((layer, label))
            line.append(math.nan if row is None else row.value)
        table.append(line)
    return table


def _norm(finite: list[float], scale: Scale) -> Normalize:
    """From values to the range of colours."""
    if scale.log:
        positive = [value for value in finite if value > 0]
        return LogNorm(min(positive), max(positive))
    return Normalize(min(finite), max(finite))


def _write_values(axes: Axes, table: list[list[float]], norm: Normalize, scale: Scale) -> None:
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            # what has no place among the colours is dark: zero on a log scale, nan, infinity
            shown = math.isfinite(value) and not (scale.log and value <= 0)
            bright = shown and float(norm(value)) > BRIGHT
            color = "black" if bright else "white"
            text = _cell(value, scale.exact)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)


def _cell(value: float, exact: float | None) -> str:
    if math.isnan(value):
        return ""
    if value == exact:
        return "exact"
    if 1e-3 <= abs(value) < 1e3 or math.isinf(value):
        return f"{value:.3f}"
    return f"{value:.0e}"
