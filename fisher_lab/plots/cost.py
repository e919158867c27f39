"""Error against cost, and which approximations nothing else beats in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from fisher_lab._ground.memory import readable
from fisher_lab.plots.reading import (
    about,
    check_known,
    chosen_labels,
    layer_title,
    layers_of,
    name_of,
    pick,
    title_of,
)
from fisher_lab.plots.scale import LEAST, Scale, drawable
from fisher_lab.plots.style import OUTLINE, Style, draw_legend, new_figure, room_for, styled, styles
from fisher_lab.results import ALL, Comparison, Row

WIDE = 60  # a ratio of largest to smallest price above which powers of ten are enough
UNITS = {"bytes": "bytes held", "seconds": "seconds to build"}


class Point(NamedTuple):
    """An approximation in the plane of price and error."""

    price: float
    height: float
    row: Row


@styled
def cost(
    comparison: Comparison,
    error: str = "frobenius",
    *,
    layer: str | None = None,
    damping: float | None = None,
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """An error against bytes held and seconds to build, with the Pareto front as a line.

    There is no front for an error without a best value.

    Args:
        comparison: a Comparison.
        error: which measure.
        layer: one layer; None for all together (their costs added up).
        damping: for damped measures, which one.
        approximations: labels of approximations, None for all; those that are the same are drawn
            each, for their costs differ.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure. Matrices that were handed in ready have no seconds and are left out of
        that panel.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error or layer that was not measured.

    Example:
        >>> figure = fl.plots.cost(comparison, layer="0")
    """
    rows = pick(comparison, error, damping)
    layer = _known_layer(layer, layers_of(rows.values()))
    found = {}
    for label in chosen_labels(rows.values(), approximations):
        if (layer, label) in rows:
            found[label] = rows[layer, label]
    scale = Scale.of(error, [row.value for row in found.values()])
    looks = styles(found)
    figure = new_figure(9.0 + room_for(found, 25), 3.7, columns)
    if columns == 1:
        figure.set_figheight(4.4)  # one panel below the other
        panels = figure.subplots(2, 1, sharey=True)
    else:
        panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, UNITS, strict=True):
        points = _points(comparison, found, layer, unit, scale)
        _draw(axes, points, looks, scale)
        _price_axis(axes, unit, [point.price for point in points.values()])
    first = panels[0]
    first.set_ylabel(title_of(error))
    name = layer_title(comparison, layer, " ")
    if scale.exact is not None:
        name = f"{name}; line: Pareto front"
    separator = "\n" if columns == 1 else ", "
    title = f"{about(comparison)}{separator}{name}"
    first.set_title(title, loc="left")
    draw_legend(figure)
    return figure


def _known_layer(layer: str | None, known: list[str]) -> str:
    """The layer asked for; unless one is, all of them, or the first."""
    if layer is None:
        return ALL if ALL in known else known[0]
    check_known("layer", layer, known)
    return layer


def _points(
    comparison: Comparison, found: Mapping[str, Row], layer: str, unit: str, scale: Scale
) -> dict[str, Point]:
    """The approximations that have a price in this unit."""
    points = {}
    for label, row in found.items():
        price = _total(comparison, layer, label, unit)
        in_range = price >= LEAST and drawable(price)
        if in_range and not math.isnan(row.value):
            points[label] = Point(price, scale.place(row.value), row)
    return points


def _draw(
    axes: Axes, points: Mapping[str, Point], looks: Mapping[str, Style], scale: Scale
) -> None:
    """A panel: marks with their whiskers, the line of the front, both axes."""
    size = 1.45 * matplotlib.rcParams["lines.markersize"]
    for label, point in points.items():
        style = looks[label]
        down, up = scale.whisker(point.row)
        lengths = [[down], [up]] if up else None
        axes.errorbar(
            [point.price],
            [point.height],
            lengths,
            fmt=style.marker,
            color=style.color,
            markersize=size,
            ecolor="black",
            label=name_of(label),
            **OUTLINE,
        )
    judged: dict[str, tuple[float, float]] = {}
    if scale.exact is not None:  # else nothing says which values are better
        for label, point in points.items():
            badness = abs(point.row.value - scale.exact)
            judged[label] = (point.price, badness)
    best = [points[label] for label in front(judged)]
    prices = [point.price for point in best]
    heights = [point.height for point in best]
    axes.plot(prices, heights, color="0.35", linewidth=1.2, zorder=1.2)
    scale.apply(axes)


def _price_axis(axes: Axes, unit: str, prices: Sequence[float]) -> None:
    """A log axis with as many names as fit, in the words of people."""
    axes.set_xlabel(UNITS[unit])
    if not prices:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    ratio = max(prices) / min(prices)
    steps = (1.0,) if ratio > WIDE else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=6))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if unit == "bytes":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda price, _: readable(price)))
    else:
        axes.xaxis.set_major_formatter(EngFormatter("s"))


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The Pareto front of points (price, error), cheapest first.

    Nothing beats its labels in one of the two without losing in the other.
    """
    best = math.inf
    kept = []
    cheapest_first = sorted(points.items(), key=lambda item: item[1])
    for label, (_, error) in cheapest_first:
        if error < best:
            kept.append(label)
            best = error
    return kept


def _total(comparison: Comparison, layer: str, label: str, unit: str) -> float:
    """What the approximation of a layer costs; of all layers, their costs added up."""
    total = 0.0
    for cost in comparison.costs:
        of_layer = layer in (cost.layer, ALL)
        if of_layer and cost.approximation == label:
            total += getattr(cost, unit)
    return total
