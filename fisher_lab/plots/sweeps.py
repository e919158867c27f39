"""Errors against something that was varied: training steps, damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    about,
    checked,
    chosen_layers,
    errors_of,
    layer_title,
    pick,
    plain,
    title_of,
    values_at,
)
from fisher_lab.plots.scale import Scale, Series
from fisher_lab.plots.style import OUTLINE, Style, new_figure, styled, styles
from fisher_lab.results import Comparison, Row

COLUMNS = 4  # panels beside each other
WIDE = 20  # a ratio of largest to smallest step above which a log axis reads better


class Point(NamedTuple):
    """A row, and what was varied when it was measured."""

    x: float
    row: Row


Lines = dict[tuple[str, str], list[Point]]  # (layer, approximation) -> its points


@styled
def training(
    comparisons: Mapping[int, Comparison],
    error: str = "frobenius",
    *,
    damping: float | None = None,
    layers: Sequence[str] | None = None,
) -> Figure:
    """An error against the training step, one panel per layer.

    Args:
        comparisons: `{step: Comparison}` of one model along its training.
        error: which measure.
        damping: for damped measures, which one.
        layers: names of layers, None for all.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but comparisons.
        ValueError: for no comparison, or an error that was not measured.
    """
    if not isinstance(comparisons, Mapping):
        raise TypeError(
            f"Got {type(comparisons).__name__}, expected {{step: Comparison}}, a Comparison for "
            "each training step."
        )
    if not comparisons:
        raise ValueError("Got no comparisons, expected {step: Comparison} with at least one.")
    steps = sorted(comparisons)
    lines: Lines = {}
    for step in steps:
        rows = pick(comparisons[step], error, damping)
        for key, row in rows.items():
            point = Point(float(step), row)
            lines.setdefault(key, []).append(point)

    def horizontal(axes: Axes) -> None:
        _step_axis(axes, steps)

    title = title_of(error, damping)
    return _panels(comparisons[steps[0]], lines, error, title, layers, horizontal)


def _step_axis(axes: Axes, steps: list[int]) -> None:
    positive = [step for step in steps if step > 0]
    if positive and max(positive) / min(positive) > WIDE:
        # step 0 belongs to most trainings: linear up to the first step after it
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    names = [f"{step:g}" for step in steps]
    crowded = len(steps) > 4
    axes.set_xticks(steps, names, rotation=45 if crowded else 0)
    axes.minorticks_off()
    axes.set_xlabel("training step")


@styled
def damping(
    comparison: Comparison, error: str = "damped_cosine", *, layers: Sequence[str] | None = None
) -> Figure:
    """A damped error against the damping, one panel per layer.

    Args:
        comparison: a Comparison with damped rows, such as `compare(..., errors="all")` gives.
        error: which damped measure.
        layers: names of layers, None for all.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: if the error was not measured, or is not a damped one.
    """
    damped = []
    points = []
    for row in checked(comparison).rows:
        if row.damping is not None:
            damped.append(row)
            if row.error == error:
                points.append(Point(row.damping, row))
    if not points:
        known = ", ".join(errors_of(damped)) or "none"
        raise ValueError(
            f"The comparison holds no {error!r} at any damping, expected a damped error that was "
            f'measured ({known}); compare with errors="all".'
        )
    lines: Lines = {}
    for point in sorted(points, key=lambda point: point.x):
        key = (point.row.layer, point.row.approximation)
        lines.setdefault(key, []).append(point)
    return _panels(comparison, lines, error, title_of(error), layers, _damping_axis)


def _damping_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(r"damping $\lambda\;/\;(\mathrm{tr}\,F\,/\,d)$")


# -- panels ----------------------------------------------------------------------------------------
def _panels(
    comparison: Comparison,
    lines: Lines,
    error: str,
    title: str,
    layers: Sequence[str] | None,
    horizontal: Callable[[Axes], None],
) -> Figure:
    """One panel per layer, one line per approximation, one vertical axis for all."""
    rows = [point.row for line in lines.values() for point in line]
    shown = chosen_layers(rows, layers)
    scale = Scale.of(error, values_at(rows, shown))
    looks = styles(dict.fromkeys(label for _, label in lines))
    across = min(len(shown), COLUMNS)
    down = math.ceil(len(shown) / across)
    # the legend stands beside the panels; a single line of them needs more room for the titles
    height = (0.5 if down > 1 else 1.1) + 2.5 * down
    figure = new_figure(1.9 + 2.35 * across, height)
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, layer in zip(grid, shown, strict=False):
        for label, style in looks.items():
            _draw_line(axes, lines.get((layer, label), []), label, style, scale)
        axes.set_title(layer_title(comparison, layer, "  "))
        horizontal(axes)
        scale.apply(axes)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.supylabel(title, fontsize=9)
    figure.suptitle(about(comparison), x=0.01, ha="left", fontsize=10)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    return figure


def _draw_line(axes: Axes, line: list[Point], label: str, style: Style, scale: Scale) -> None:
    series = Series(scale)
    for point in line:
        series.add(point.x, point.row)
    axes.plot(
        series.x,
        series.y,
        style.line,
        color=style.color,
        marker=style.marker,
        label=plain(label),
        **OUTLINE,
    )
    series.draw_whiskers(axes, style.color, capsize=2)
