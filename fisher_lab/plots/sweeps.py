"""Errors against something that was varied: training steps, damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    Scale,
    about,
    chosen_layers,
    layer_title,
    pick,
    plain,
    title_of,
    whisker,
)
from fisher_lab.plots.style import new_figure, styled, styles

Points = dict[tuple[str, str], list[tuple[float, Any]]]  # (layer, approximation) -> [(x, row)]


@styled
def training(
    comparisons: Mapping[int, Any],
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
        ValueError: for no comparison, or an error that was not measured.
    """
    if not comparisons:
        raise ValueError("Got no comparisons, expected {step: Comparison} with at least one.")
    points: Points = {}
    for step in sorted(comparisons):
        for key, row in pick(comparisons[step], error, damping).items():
            points.setdefault(key, []).append((float(step), row))
    first = comparisons[min(comparisons)]

    def horizontal(axes: Any) -> None:
        steps = sorted(comparisons)
        positive = [step for step in steps if step > 0]
        if positive and max(positive) / min(positive) > 20:
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_xticks(
            steps, [f"{step:g}" for step in steps], rotation=45 if len(steps) > 4 else 0
        )
        axes.minorticks_off()
        axes.set_xlabel("training step")

    return _panels(first, points, error, damping, layers, horizontal)


@styled
def damping(
    comparison: Any, error: str = "damped_cosine", *, layers: Sequence[str] | None = None
) -> Figure:
    """A damped error against the damping, one panel per layer.

    Args:
        comparison: a Comparison with damped rows, such as `compare(..., errors="all")` gives.
        error: which damped measure.
        layers: names of layers, None for all.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: if the error was not measured, or is not a damped one.
    """
    rows = [row for row in comparison.rows if row.error == error and row.damping is not None]
    if not rows:
        known = (
            ", ".join(
                dict.fromkeys(row.error for row in comparison.rows if row.damping is not None)
            )
            or "none"
        )
        raise ValueError(
            f"The comparison holds no {error!r} at any damping, expected a damped error that was "
            f"measured ({known}); "
            'compare with errors="all".'
        )
    points: Points = {}
    for row in sorted(rows, key=lambda row: row.damping):
        points.setdefault((row.layer, row.approximation), []).append((row.damping, row))

    def horizontal(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_xlabel(r"damping $\lambda\;/\;(\mathrm{tr}\,F\,/\,d)$")

    return _panels(comparison, points, error, None, layers, horizontal)


def _panels(
    comparison: Any,
    points: Points,
    error: str,
    damping: float | None,
    layers: Sequence[str] | None,
    horizontal: Callable[[Any], None],
) -> Figure:
    """One panel per layer, one line per approximation, one vertical axis for all."""
    rows = [row for line in points.values() for _, row in line]
    shown = chosen_layers(rows, layers)
    scale = Scale.of(error, [row.value for row in rows if row.layer in shown])
    looks = styles(dict.fromkeys(label for _, label in points))
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(1.9 + 2.35 * columns, (0.5 if lines > 1 else 1.1) + 2.5 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, layer in zip(grid, shown, strict=False):
        for label, style in looks.items():
            line = points.get((layer, label), [])
            x, y = [place for place, _ in line], [scale.place(row.value) for _, row in line]
            lengths = [whisker(row, scale) for _, row in line]
            axes.plot(
                x, y, style.line, color=style.color, marker=style.marker, label=plain(label),
                markeredgecolor="0.15", markeredgewidth=0.5,
            )  # fmt: skip
            if any(up for _, up in lengths):
                bars = list(zip(*lengths, strict=True))
                axes.errorbar(x, y, bars, fmt="none", ecolor=style.color, elinewidth=0.9, capsize=2)
        axes.set_title(layer_title(comparison, layer, "  "))
        horizontal(axes)
        scale.apply(axes)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.supylabel(title_of(error, damping), fontsize=9)
    figure.suptitle(about(comparison), x=0.01, ha="left", fontsize=10)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    return figure
