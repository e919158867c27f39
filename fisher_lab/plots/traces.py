"""Traces of the blocks and of their approximations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fisher_lab.plots.layers import (
    MOST_GROUPS,
    depth_places,
    depth_width,
    name_depth,
    name_height,
    name_layers,
)
from fisher_lab.plots.reading import about, checked, shown
from fisher_lab.plots.scale import drawable
from fisher_lab.plots.style import (
    EXACT,
    OUTLINE,
    draw_legend,
    new_figure,
    room_for,
    styled,
    styles,
)
from fisher_lab.results import ALL, Comparison


class Traces(NamedTuple):
    """tr F and tr F^."""

    exact: float
    approx: float


Found = dict[tuple[str, str], Traces]  # (layer, approximation) -> its traces


@styled
def traces(
    comparison: Comparison,
    *,
    layers: Sequence[str] | None = None,
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Trace of every layer's block and of its approximations, on a log axis.

    Args:
        comparison: a Comparison with its `quantities`.
        layers: names of layers, None for all.
        approximations: labels of approximations, None for all.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure; the black bars are the exact traces.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: if the comparison holds no traces, or not these.

    Example:
        >>> figure = fl.plots.traces(comparison, approximations=["KFAC", "TKFAC"])
    """
    traced = found_traces(checked(comparison))
    if not traced:
        raise ValueError(
            "The comparison holds no traces, expected the result of compare with an undamped error."
        )
    rows = [row for row in comparison.rows if (row.layer, row.approximation) in traced]
    found = shown([comparison], rows, layers, approximations)
    in_groups = len(found.layers) <= MOST_GROUPS
    width = depth_width(len(found.layers))
    if in_groups:
        width = max(6.0, 1.9 + 1.1 * len(found.layers))
    height = 3.6 + name_height(found.layers, in_groups)
    figure = new_figure(width + room_for(found.names.values(), 25), height, columns)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    positive = all(min(pair) > 0 for pair in traced.values())
    axes.set_yscale("log" if positive else "linear")
    places = depth_places(found.layers)
    exact = _exact(traced, found.layers)
    look: dict[str, Any] = {"color": EXACT.color, "linewidth": 1.5, "label": "exact"}
    if in_groups:
        left = [place - 0.44 for place in places]
        right = [place + 0.44 for place in places]
        axes.hlines(exact, left, right, **look)
    else:
        axes.plot(places, exact, **look)
    for index, (label, style) in enumerate(styles(found.labels).items()):
        # the marks of a layer share 0.8 of the room between two layers; lines need none
        offset = 0.0
        if in_groups:
            offset = 0.8 * ((index + 0.5) / len(found.labels) - 0.5)
        x, y = [], []
        for place, layer in zip(places, found.layers, strict=True):
            if (layer, label) in traced:
                x.append(place + offset)
                y.append(traced[layer, label].approx)
        axes.plot(
            x,
            y,
            linestyle="none" if in_groups else style.line,
            marker=style.marker,
            color=style.color,
            label=found.names[label],
            **OUTLINE,
        )
    if in_groups:
        name_layers(axes, comparison, found.layers)
    else:
        name_depth(axes, comparison, found.layers)
    axes.set_ylabel("trace")
    axes.set_title(about(comparison), loc="left")
    draw_legend(figure)
    return figure


def found_traces(comparison: Comparison) -> Found:
    """The traces that can be drawn; each layer and approximation once, though noted per damping."""
    measured = {(row.layer, row.approximation) for row in comparison.rows}
    found: Found = {}
    for entry in comparison.quantities:
        key = (entry["layer"], entry["approximation"])
        if "trace_approx" in entry and entry["layer"] != ALL and key in measured:
            pair = Traces(entry["trace_exact"], entry["trace_approx"])
            if all(map(drawable, pair)):
                found.setdefault(key, pair)
    return found


def _exact(traced: Found, layers: Sequence[str]) -> list[float]:
    """The exact trace of each layer, which its approximations all tell."""
    exact: dict[str, float] = {}
    for (layer, _), pair in traced.items():
        exact.setdefault(layer, pair.exact)
    return [exact[layer] for layer in layers]
