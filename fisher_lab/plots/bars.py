"""Errors of every layer: as bars, or of many layers as lines along the depth."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.plots.layers import (
    depth_places,
    depth_width,
    fits_bars,
    name_depth,
    name_height,
    name_layers,
)
from fisher_lab.plots.reading import Cells, Shown, about, one_error, title_of
from fisher_lab.plots.scale import Scale, Series
from fisher_lab.plots.style import (
    OUTLINE,
    Style,
    draw_legend,
    new_figure,
    room_for,
    styled,
    styles,
)
from fisher_lab.results import ALL, Comparison

GROUP = 0.84  # width of a layer's bars together; layers are 1 apart


@styled
def errors(
    comparison: Comparison,
    error: str = "frobenius",
    *,
    damping: float | None = None,
    layers: Sequence[str] | None = None,
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Bars: one group per layer, one bar per approximation; of many layers, lines along the depth.

    The axis is logarithmic where the values span more than a factor of 30; a dashed line says what
    is exact. Rows with a `stderr` get a whisker of one standard error. Approximations that are the
    same on these layers are drawn once, under all their names.

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

    See Also:
        heatmap, which shows the same as a table.

    Example:
        >>> figure = fl.plots.errors(comparison, "spectral", layers=["0"])
    """
    asked = one_error(comparison, error, damping, layers, approximations)
    found = asked.shown
    scale = Scale.of(error, asked.values)
    as_bars = fits_bars(len(found.layers), len(found.labels), columns)
    if as_bars:
        # a group is at least as wide as six bars, so that its name fits under it
        group = 0.105 * max(len(found.labels), 6)
        width = max(6.0, 1.6 + group * len(found.layers))
    else:
        width = depth_width(len(found.layers))
    height = 3.6 + name_height(found.layers, as_bars)
    figure = new_figure(width + room_for(found.names.values(), 25), height, columns)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    scale.apply(axes)
    if as_bars:
        _draw_groups(axes, asked.rows, found, scale)
        name_layers(axes, comparison, found.layers)
        axes.set_xlim(-0.5, len(found.layers) - 0.5)
    else:
        _draw_lines(axes, asked.rows, found, scale)
        name_depth(axes, comparison, found.layers)
    axes.set_ylabel(title_of(error, damping))
    axes.set_title(about(comparison), loc="left")
    draw_legend(figure)
    return figure


def _draw_groups(axes: Axes, rows: Cells, found: Shown, scale: Scale) -> None:
    """A group of bars for each layer."""
    each = GROUP / len(found.labels)
    middle = (len(found.labels) - 1) / 2
    for index, (label, style) in enumerate(styles(found.labels).items()):
        offset = (index - middle) * each
        series = Series(scale)
        for place, layer in enumerate(found.layers):
            row = rows.get((layer, label))
            if row is not None:
                series.add(place + offset, row)
        _draw_bars(axes, series, found.names[label], style, 0.92 * each)


def _draw_bars(axes: Axes, series: Series, name: str, style: Style, width: float) -> None:
    """The bars, from what is exact to the value, and their whiskers."""
    scale = series.scale
    bottom = scale.low if scale.base is None else scale.base
    heights = [top - bottom for top in series.y]
    axes.bar(
        series.x,
        heights,
        width,
        bottom=bottom,
        color=style.color,
        hatch=style.hatch,
        edgecolor="0.15",
        linewidth=0.4,
        label=name,
    )
    series.draw_whiskers(axes, "black", capsize=1.5)
    # a bar of no height would look like one that was not measured
    exact = Series(scale)
    for x, row in zip(series.x, series.rows, strict=True):
        if row.value == scale.exact:
            exact.add(x, row)
    if exact.rows:
        axes.plot(exact.x, exact.y, "o", color="black", markersize=2.5)


def _draw_lines(axes: Axes, rows: Cells, found: Shown, scale: Scale) -> None:
    """A line for each approximation along the depth, and a mark for all layers together."""
    places = depth_places(found.layers)
    for label, style in styles(found.labels).items():
        line = Series(scale)
        together = Series(scale)
        for place, layer in zip(places, found.layers, strict=True):
            row = rows.get((layer, label))
            if row is not None:
                series = together if layer == ALL else line
                series.add(place, row)
        axes.plot(
            line.x,
            line.y,
            style.line,
            color=style.color,
            marker=style.marker,
            label=found.names[label],
            **OUTLINE,
        )
        axes.plot(together.x, together.y, style.marker, color=style.color, **OUTLINE)
        line.draw_whiskers(axes, style.color, capsize=1.5)
        together.draw_whiskers(axes, style.color, capsize=1.5)
