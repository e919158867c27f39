"""Errors and traces of every layer: bars, a table in colours, traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from fisher_lab.plots.reading import (
    ALL,
    Scale,
    about,
    chosen_layers,
    layer_title,
    layers_of,
    pick,
    plain,
    title_of,
    whisker,
)  # fmt: skip
from fisher_lab.plots.style import EXACT, new_figure, styled, styles


@styled
def errors(
    comparison: Any,
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
        ValueError: for an error, damping or layer that was not measured.

    See Also:
        heatmap, which shows the same as a table.
    """
    rows = pick(comparison, error, damping)
    shown = chosen_layers(rows.values(), layers)
    labels = list(dict.fromkeys(label for _, label in rows))
    scale = Scale.of(error, [row.value for row in rows.values() if row.layer in shown])
    figure = new_figure(max(6.0, 1.6 + 0.105 * max(len(labels), 6) * len(shown)), 3.6)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    scale.apply(axes)
    width = 0.84 / len(labels)
    bottom = scale.base if scale.base is not None else scale.low
    for index, (label, style) in enumerate(styles(labels).items()):
        found = [
            (place, rows[name, label]) for place, name in enumerate(shown) if (name, label) in rows
        ]
        x = [place + (index - (len(labels) - 1) / 2) * width for place, _ in found]
        tops = [scale.place(row.value) for _, row in found]
        axes.bar(
            x, [top - bottom for top in tops], width * 0.92, bottom=bottom, color=style.color, hatch=style.hatch,
            edgecolor="0.15", linewidth=0.4, label=plain(label),
        )  # fmt: skip
        _whiskers(axes, x, tops, [whisker(row, scale) for _, row in found])
        exact = [
            (a, b)
            for a, b, (_, row) in zip(x, tops, found, strict=True)
            if row.value == scale.exact
        ]
        axes.plot(*zip(*exact, strict=True), "o", color="black", markersize=2.5) if exact else None
    _name_layers(axes, comparison, shown)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylabel(title_of(error, damping))
    axes.set_title(about(comparison), loc="left")
    figure.legend(loc="outside right upper")
    return figure


def _name_layers(axes: Any, comparison: Any, layers: list[str]) -> None:
    """One tick a layer; long names stand aslant."""
    if max(len(name) for name in layers if name != ALL or len(layers) == 1) <= 10:
        axes.set_xticks(range(len(layers)), [layer_title(comparison, name) for name in layers])
    else:
        names = [layer_title(comparison, name, "  ") for name in layers]
        axes.set_xticks(range(len(layers)), names, rotation=30, ha="right", rotation_mode="anchor")


def _whiskers(
    axes: Any, x: list[float], y: list[float], lengths: list[tuple[float, float]]
) -> None:
    if any(up for _, up in lengths):
        axes.errorbar(
            x,
            y,
            list(zip(*lengths, strict=True)),
            fmt="none",
            ecolor="black",
            elinewidth=0.9,
            capsize=1.5,
        )


@styled
def heatmap(comparison: Any, error: str = "frobenius", *, damping: float | None = None) -> Figure:
    """Table in colours: layers down, approximations across, every value written in its cell.

    Args:
        comparison: a Comparison.
        error: which measure.
        damping: for damped measures, which one.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: for an error or damping that was not measured.
    """
    rows = pick(comparison, error, damping)
    layers, labels = layers_of(rows.values()), list(dict.fromkeys(label for _, label in rows))
    table = [
        [rows[name, label].value if (name, label) in rows else math.nan for label in labels]
        for name in layers
    ]
    finite = [value for line in table for value in line if math.isfinite(value)]
    scale = Scale.of(error, finite)
    positive = [value for value in finite if value > 0]
    norm = (
        LogNorm(min(positive), max(positive)) if scale.log else Normalize(min(finite), max(finite))
    )
    title = about(comparison)
    figure = new_figure(
        max(2.4 + 0.68 * len(labels), 1.0 + 0.09 * len(title)), 1.5 + 0.36 * len(layers)
    )
    axes = figure.add_subplot()
    axes.grid(visible=False)
    image = axes.imshow(table, norm=norm, aspect="auto")
    if scale.log:  # zeros have no logarithm: the colour of the smallest
        axes.set_facecolor(image.cmap(0.0))
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            level = (
                0.0
                if scale.log and value <= 0
                else float(norm(value))
                if math.isfinite(value)
                else 0.0
            )
            text = _cell(value, scale.exact)
            axes.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if level > 0.55 else "white",
            )
    axes.set_xticks(
        range(len(labels)),
        [plain(label) for label in labels],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(layers)), [layer_title(comparison, name, "  ") for name in layers])
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes, label=title_of(error, damping), pad=0.01)
    return figure


def _cell(value: float, exact: float | None) -> str:
    if math.isnan(value):
        return ""
    if value == exact:
        return "exact"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 or math.isinf(value) else f"{value:.0e}"


@styled
def traces(comparison: Any) -> Figure:
    """Trace of every layer's block and of its approximations, on a log axis.

    Args:
        comparison: a Comparison with its `quantities`.

    Returns:
        A matplotlib Figure; the black bars are the exact traces.

    Raises:
        ValueError: if the comparison holds no traces.
    """
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for entry in comparison.quantities:
        if "trace_approx" in entry and entry["layer"] != ALL:
            found.setdefault(
                (entry["layer"], entry["approximation"]),
                (entry["trace_exact"], entry["trace_approx"]),
            )
    if not found:
        raise ValueError(
            "The comparison holds no traces, expected the result of compare with an undamped error."
        )
    layers = list(dict.fromkeys(layer for layer, _ in found))
    labels = list(dict.fromkeys(label for _, label in found))
    figure = new_figure(max(6.0, 1.9 + 1.1 * len(layers)), 3.6)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="x")
    axes.set_yscale("log" if all(min(pair) > 0 for pair in found.values()) else "linear")
    exact = [
        next(pair[0] for (name, _), pair in found.items() if name == layer) for layer in layers
    ]
    places = range(len(layers))
    axes.hlines(
        exact,
        [p - 0.44 for p in places],
        [p + 0.44 for p in places],
        color=EXACT.color,
        linewidth=1.5,
        label="exact",
    )
    for index, (label, style) in enumerate(styles(labels).items()):
        x = [
            p + 0.8 * ((index + 0.5) / len(labels) - 0.5)
            for p in places
            if (layers[p], label) in found
        ]
        y = [found[layer, label][1] for layer in layers if (layer, label) in found]
        axes.plot(
            x, y, style.marker, color=style.color, markeredgecolor="0.15", markeredgewidth=0.5, label=plain(label)
        )  # fmt: skip
    _name_layers(axes, comparison, layers)
    axes.set_ylabel("trace")
    axes.set_title(about(comparison), loc="left")
    figure.legend(loc="outside right upper")
    return figure
