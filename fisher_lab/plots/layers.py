"""The axis of layers, for any number of them: groups of bars, or lines along the depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from fisher_lab.plots.reading import layer_titles
from fisher_lab.plots.style import WIDTHS, room_for
from fisher_lab.results import ALL, Comparison

UPRIGHT = 10  # characters of a layer's name that still fit under its bars
WIDEST = 11.0  # inches of a figure along the depth, however many layers there are
THINNEST = 0.03  # inches of a bar
MOST_GROUPS = 8  # layers as groups of bars; more are easier to read as lines
TICK = 0.2  # inches between two names


def fits_bars(layers: int, labels: int, columns: int | None) -> bool:
    """Whether so many layers and approximations can be told apart as groups of bars."""
    if layers > MOST_GROUPS:
        return False
    if columns is None:
        return True
    room = 0.75 * WIDTHS[columns]  # the rest is the vertical axis
    return room / (layers * labels) >= THINNEST


def depth_width(layers: int) -> float:
    """Inches of a figure along the depth."""
    return min(WIDEST, max(6.0, 2.6 + 0.2 * layers))


def depth_places(layers: Sequence[str]) -> list[float]:
    """Where each layer stands along the depth: one behind the other, all of them together apart."""
    places = []
    for place, layer in enumerate(layers):
        # far enough to be no further layer, however many there are
        apart = max(0.5, 0.04 * len(layers)) if layer == ALL else 0.0
        places.append(place + apart)
    return places


def name_height(layers: Sequence[str], in_groups: bool) -> float:
    """Inches that the names take below the axes, beyond those of short ones."""
    if in_groups:
        return 0.5 * room_for(layers, 20)
    return 0.7 * room_for(layers, 5)


def name_layers(axes: Axes, comparison: Comparison, layers: Sequence[str]) -> None:
    """One tick for each group of bars; long names stand aslant."""
    lengths = [len(name) for name in layers if name != ALL]
    places = range(len(layers))
    if max(lengths, default=0) <= UPRIGHT and len(layers) <= MOST_GROUPS:
        axes.set_xticks(places, layer_titles(comparison, layers))
    else:
        names = layer_titles(comparison, layers, "  ")
        axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")


def name_depth(axes: Axes, comparison: Comparison, layers: Sequence[str]) -> None:
    """Names along the depth: all that fit, evenly spaced, and that of all layers together."""
    places = depth_places(layers)
    figure = axes.get_figure(root=True)
    assert figure is not None
    step = every(len(layers), figure.get_figwidth() - 1.5)
    named = list(range(0, len(layers), step))
    last = len(layers) - 1
    if layers[last] == ALL and last not in named:
        # its neighbour would touch it
        if last - named[-1] < step:
            named.pop()
        named.append(last)
    names = layer_titles(comparison, [layers[index] for index in named], "  ")
    axes.set_xticks(
        [places[index] for index in named],
        names,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.5, places[-1] + 0.5)


def every(count: int, inches: float) -> int:
    """Which part of so many names fits: every one, every second, ..."""
    most = max(1, math.floor(inches / TICK))
    return math.ceil(count / most)
