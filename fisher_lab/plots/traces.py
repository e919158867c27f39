"""Traces of the blocks and of their approximations."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.plots.bars import name_layers
from fisher_lab.plots.reading import about, checked, plain
from fisher_lab.plots.style import EXACT, OUTLINE, new_figure, styled, styles
from fisher_lab.results import ALL, Comparison


class Traces(NamedTuple):
    """tr F and tr F^."""

    exact: float
    approx: float


Found = dict[tuple[str, str], Traces]  # (layer, approximation) -> its traces


@styled
def traces(comparison: Comparison) -> Figure:
    """Trace of every layer's block and of its approximations, on a log axis.

    Args:
        comparison: a Comparison with its `quantities`.

    Returns:
        A matplotlib Figure; the black bars are the exact traces.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: if the comparison holds no traces.
    """
    found = _found(checked(comparison))
    if not found:
        raise ValueError(
            "The comparison holds no traces, expected the result of compare with an undamped error."
        )
    layers = list(dict.fromkeys(layer for layer, _ in found))
    labels = list(dict.fromkeys(label for _, label in found))
    figure = new_figure(max(6.0, 1.9 + 1.1 * len(layers)), 3.6)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    positive = all(min(pair) > 0 for pair in found.values())
    axes.set_yscale("log" if positive else "linear")
    _draw_exact(axes, found, layers)
    for index, (label, style) in enumerate(styles(labels).items()):
        # the marks of a layer share 0.8 of the room between two layers
        offset = 0.8 * ((index + 0.5) / len(labels) - 0.5)
        x, y = [], []
        for place, layer in enumerate(layers):
            if (layer, label) in found:
                x.append(place + offset)
                y.append(found[layer, label].approx)
        axes.plot(
            x,
            y,
            style.marker,
            color=style.color,
            label=plain(label),
            **OUTLINE,
        )
    name_layers(axes, comparison, layers)
    axes.set_ylabel("trace")
    axes.set_title(about(comparison), loc="left")
    figure.legend(loc="outside right upper")
    return figure


def _found(comparison: Comparison) -> Found:
    """The traces that were noted; each layer and approximation once, though noted for each damping."""
    found: Found = {}
    for entry in comparison.quantities:
        if "trace_approx" in entry and entry["layer"] != ALL:
            key = (entry["layer"], entry["approximation"])
            found.setdefault(key, Traces(entry["trace_exact"], entry["trace_approx"]))
    return found


def _draw_exact(axes: Axes, found: Found, layers: list[str]) -> None:
    """A black line across each layer."""
    exact: dict[str, float] = {}
    for (layer, _), pair in found.items():
        exact.setdefault(layer, pair.exact)
    heights = [exact[layer] for layer in layers]
    left = [place - 0.44 for place in range(len(layers))]
    right = [place + 0.44 for place in range(len(layers))]
    axes.hlines(heights, left, right, color=EXACT.color, linewidth=1.5, label="exact")
