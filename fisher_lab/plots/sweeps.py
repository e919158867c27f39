"""Errors against something that was varied: training steps, damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab._ground.arguments import is_whole
from fisher_lab.plots.reading import (
    Shown,
    about,
    checked,
    errors_of,
    layer_title,
    layers_of,
    pick,
    shown,
    title_of,
)
from fisher_lab.plots.scale import Scale, Series
from fisher_lab.plots.style import OUTLINE, Style, draw_legend, new_figure, room_for, styled, styles
from fisher_lab.results import Comparison, Row

COLUMNS = 4  # panels beside each other
MOST_PANELS = 12
PANEL = {None: 2.5, 1: 1.5, 2: 1.8}  # inches of the height of a panel, by the columns of a paper
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
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """An error against the training step, one panel per layer.

    Args:
        comparisons: `{step: Comparison}` of one model along its training.
        error: which measure.
        damping: for damped measures, which one.
        layers: names of layers; None for all, or of many, for some evenly spaced in depth, which
            the title says.
        approximations: labels of approximations, None for all.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but comparisons.
        ValueError: for no comparison, or an error that was not measured.

    Example:
        >>> figure = fl.plots.training({0: comparison, 100: comparison}, "frobenius")
    """
    if not isinstance(comparisons, Mapping):
        raise TypeError(
            f"Got {type(comparisons).__name__}, expected {{step: Comparison}}, a Comparison for "
            "each training step."
        )
    if not comparisons:
        raise ValueError("Got no comparisons, expected {step: Comparison} with at least one.")
    for step in comparisons:
        if not is_whole(step, 0):
            raise TypeError(f"Got step {step!r}, expected training steps as whole numbers.")
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
    drawn = [point.row for line in lines.values() for point in line]
    along = [comparisons[step] for step in steps]
    found = shown(along, drawn, layers, approximations)
    if layers is None:
        found = some_layers(found)
    return _panels(along[0], lines, found, error, title, horizontal, columns)


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
    comparison: Comparison,
    error: str = "damped_cosine",
    *,
    layers: Sequence[str] | None = None,
    approximations: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """A damped error against the damping, one panel per layer.

    Args:
        comparison: a Comparison with damped rows, such as `compare(..., errors="all")` gives.
        error: which damped measure.
        layers: names of layers; None for all, or of many, for some evenly spaced in depth, which
            the title says.
        approximations: labels of approximations, None for all.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: if the error was not measured, or is not a damped one.

    Example:
        >>> wanted = {"errors": ["damped_cosine"], "progress": False}
        >>> found = fl.compare(model, loss, (x, y), [fl.KFAC()], **wanted)
        >>> figure = fl.plots.damping(found)
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
    drawn = [point.row for point in points]
    found = shown([comparison], drawn, layers, approximations)
    if layers is None:
        found = some_layers(found)
    return _panels(comparison, lines, found, error, title_of(error), _damping_axis, columns)


def _damping_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(r"damping $\lambda\;/\;(\mathrm{tr}\,F\,/\,d)$")


def some_layers(found: Shown) -> Shown:
    """The first layer, the last, and others evenly between them where there are too many."""
    count = len(found.layers)
    if count <= MOST_PANELS:
        return found
    layers = []
    for index in range(MOST_PANELS):
        place = round(index * (count - 1) / (MOST_PANELS - 1))
        layers.append(found.layers[place])
    return Shown(layers, found.names)


# -- panels ----------------------------------------------------------------------------------------
def _panels(
    comparison: Comparison,
    lines: Lines,
    found: Shown,
    error: str,
    title: str,
    horizontal: Callable[[Axes], None],
    columns: int | None,
) -> Figure:
    """One panel per layer, one line per approximation, one vertical axis for all."""
    drawn = []
    for (layer, label), line in lines.items():
        if layer in found.layers and label in found.names:
            drawn += line
    scale = Scale.of(error, [point.row.value for point in drawn])
    looks = styles(found.labels)
    across = min(len(found.layers), 2 if columns == 1 else COLUMNS)
    down = math.ceil(len(found.layers) / across)
    # the legend stands beside the panels; a single line of them needs more room for the titles
    height = (0.5 if down > 1 else 1.1) + PANEL[columns] * down
    width = 1.9 + 2.35 * across + room_for(found.names.values(), 25)
    figure = new_figure(width, height, columns)
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, layer in zip(grid, found.layers, strict=False):
        for label, style in looks.items():
            _draw_line(axes, lines.get((layer, label), []), found.names[label], style, scale)
        axes.set_title(layer_title(comparison, layer, "  "))
        horizontal(axes)
        scale.apply(axes)
    for axes in grid[len(found.layers) :]:
        axes.set_visible(False)
    figure.supylabel(title, fontsize="medium")
    measured = len(layers_of([line[0].row for line in lines.values()]))
    heading = about(comparison)
    if len(found.layers) < measured:
        heading = f"{heading}; {len(found.layers)} of {measured} layers"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=matplotlib.rcParams["axes.titlesize"])
    draw_legend(figure)
    return figure


def _draw_line(axes: Axes, line: list[Point], name: str, style: Style, scale: Scale) -> None:
    series = Series(scale)
    for point in line:
        series.add(point.x, point.row)
    axes.plot(
        series.x,
        series.y,
        style.line,
        color=style.color,
        marker=style.marker,
        label=name,
        **OUTLINE,
    )
    series.draw_whiskers(axes, style.color, capsize=2)
