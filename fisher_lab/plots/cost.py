"""Error against cost, and which approximations nothing else beats in both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    about,
    check_layer,
    layer_title,
    layers_of,
    pick,
    plain,
    title_of,
    values_at,
)
from fisher_lab.plots.scale import Scale
from fisher_lab.plots.style import OUTLINE, Style, new_figure, styled, styles
from fisher_lab.results import ALL, Comparison, Row

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
) -> Figure:
    """An error against bytes held and seconds to build, with the Pareto front as a line.

    There is no front for an error without a best value.

    Args:
        comparison: a Comparison.
        error: which measure.
        layer: one layer; None for all together (their costs added up).
        damping: for damped measures, which one.

    Returns:
        A matplotlib Figure. Matrices that were handed in ready have no seconds and are left out of
        that panel.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error or layer that was not measured.
    """
    rows = pick(comparison, error, damping)
    layer = _known_layer(layer, layers_of(rows.values()))
    found = {row.approximation: row for row in rows.values() if row.layer == layer}
    scale = Scale.of(error, values_at(rows.values(), [layer]))
    looks = styles(found)
    figure = new_figure(9.0, 3.7)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (unit, name) in zip(panels, UNITS.items(), strict=True):
        points = _points(comparison, found, layer, unit, scale)
        _draw(axes, points, looks, scale)
        axes.set_xlabel(name)
    first = panels[0]
    first.set_ylabel(title_of(error))
    title = f"{about(comparison)}, {layer_title(comparison, layer, ' ')}"
    if scale.exact is not None:
        title = f"{title}; line: Pareto front"
    first.set_title(title, loc="left")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    return figure


def _known_layer(layer: str | None, known: list[str]) -> str:
    """The layer asked for; unless one is, all of them, or the first."""
    if layer is None:
        return ALL if ALL in known else known[0]
    check_layer(layer, known)
    return layer


def _points(
    comparison: Comparison, found: Mapping[str, Row], layer: str, unit: str, scale: Scale
) -> dict[str, Point]:
    """The approximations that have a price in this unit."""
    points = {}
    for label, row in found.items():
        price = _total(comparison, layer, label, unit)
        if price > 0:
            points[label] = Point(price, scale.place(row.value), row)
    return points


def _draw(
    axes: Axes, points: Mapping[str, Point], looks: Mapping[str, Style], scale: Scale
) -> None:
    """A panel: marks with their whiskers, the line of the front, both axes."""
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
            markersize=8,
            ecolor="black",
            label=plain(label),
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
    axes.set_xscale("log")
    scale.apply(axes)


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
