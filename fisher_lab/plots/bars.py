"""Errors of every layer as bars."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    Cells,
    about,
    chosen_layers,
    labels_of,
    layer_titles,
    pick,
    plain,
    title_of,
    values_at,
)
from fisher_lab.plots.scale import Scale, Series
from fisher_lab.plots.style import Style, new_figure, styled, styles
from fisher_lab.results import ALL, Comparison

GROUP = 0.84  # width of a layer's bars together; layers are 1 apart
UPRIGHT = 10  # characters of a layer's name that still fit under its bars


@styled
def errors(
    comparison: Comparison,
    error: str = "frobenius",
    *,
    damping: float | None = None,
    layers: Sequence[str] | None = None,
) -> Figure:
    """Bars: one group per layer, one bar per approximation.

    The axis is logarithmic where the values span more than a factor of 30; a dashed line says what
    is exact. Rows with a `stderr` get a whisker of one standard error.

    Args:
        comparison: a Comparison.
        error: which measure.
        damping: for damped measures, which one.
        layers: names of layers, None for all and "(all)".

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error, damping or layer that was not measured.

    See Also:
        heatmap, which shows the same as a table.
    """
    rows = pick(comparison, error, damping)
    shown = chosen_layers(rows.values(), layers)
    labels = labels_of(rows.values())
    scale = Scale.of(error, values_at(rows.values(), shown))
    # a group is at least as wide as six bars, so that its name fits under it
    group = 0.105 * max(len(labels), 6)
    figure = new_figure(max(6.0, 1.6 + group * len(shown)), 3.6)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    scale.apply(axes)
    width = GROUP / len(labels)
    middle = (len(labels) - 1) / 2
    for index, (label, style) in enumerate(styles(labels).items()):
        offset = (index - middle) * width
        series = _series(rows, shown, label, offset, scale)
        _draw(axes, series, label, style, 0.92 * width)
    name_layers(axes, comparison, shown)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylabel(title_of(error, damping))
    axes.set_title(about(comparison), loc="left")
    figure.legend(loc="outside right upper")
    return figure


def _series(rows: Cells, layers: list[str], label: str, offset: float, scale: Scale) -> Series:
    """The bars of one approximation, at the layers where it was measured."""
    series = Series(scale)
    for place, layer in enumerate(layers):
        row = rows.get((layer, label))
        if row is not None:
            series.add(place + offset, row)
    return series


def _draw(axes: Axes, series: Series, label: str, style: Style, width: float) -> None:
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
        label=plain(label),
    )
    series.draw_whiskers(axes, "black", capsize=1.5)
    # a bar of no height would look like one that was not measured
    exact = Series(scale)
    for x, row in zip(series.x, series.rows, strict=True):
        if row.value == scale.exact:
            exact.add(x, row)
    if exact.rows:
        axes.plot(exact.x, exact.y, "o", color="black", markersize=2.5)


def name_layers(axes: Axes, comparison: Comparison, layers: list[str]) -> None:
    """One tick a layer; long names stand aslant."""
    lengths = [len(name) for name in layers if name != ALL]
    places = range(len(layers))
    if max(lengths, default=0) <= UPRIGHT:
        axes.set_xticks(places, layer_titles(comparison, layers))
    else:
        names = layer_titles(comparison, layers, "  ")
        axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
