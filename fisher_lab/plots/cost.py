"""Error against cost, and which approximations nothing else beats in both."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from fisher_lab.plots.reading import ALL, Scale, about, layer_title, pick, plain, title_of, whisker
from fisher_lab.plots.style import new_figure, styled, styles

UNITS = {"bytes": "bytes held", "seconds": "seconds to build"}


@styled
def cost(
    comparison: Any,
    error: str = "frobenius",
    *,
    layer: str | None = None,
    damping: float | None = None,
) -> Figure:
    """An error against bytes held and seconds to build; the line is the Pareto front, for errors
    with a best value.

    Args:
        comparison: a Comparison.
        error: which measure.
        layer: one layer; None for all together (their costs added up).
        damping: for damped measures, which one.

    Returns:
        A matplotlib Figure. Matrices that were handed in ready have no seconds and are left out of
        that panel.

    Raises:
        ValueError: for an error or layer that was not measured.
    """
    rows = pick(comparison, error, damping)
    known = list(dict.fromkeys(name for name, _ in rows))
    layer = (ALL if ALL in known else known[0]) if layer is None else layer
    if layer not in known:
        raise ValueError(f"Got layer {layer!r}, expected one of {', '.join(map(repr, known))}.")
    found = {label: row for (name, label), row in rows.items() if name == layer}
    scale = Scale.of(error, [row.value for row in found.values()])
    figure = new_figure(9.0, 3.7)
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), UNITS, strict=True):
        points = {}
        for label, style in styles(found).items():
            price = _total(comparison, layer, label, unit)
            if not price > 0:
                continue
            height = scale.place(found[label].value)
            if scale.exact is not None:  # else nothing says which values are better
                points[label] = (price, height, abs(found[label].value - scale.exact))
            down, up = whisker(found[label], scale)
            axes.errorbar(
                [price], [height], [[down], [up]] if up else None, fmt=style.marker, color=style.color,
                markeredgecolor="0.15", markeredgewidth=0.5, markersize=8, ecolor="black", label=plain(label),
            )  # fmt: skip
        best = [
            points[label]
            for label in front({label: (p, badness) for label, (p, _, badness) in points.items()})
        ]
        axes.plot(
            [x for x, _, _ in best],
            [y for _, y, _ in best],
            color="0.35",
            linewidth=1.2,
            zorder=1.2,
        )
        axes.set_xscale("log")
        axes.set_xlabel(UNITS[unit])
        scale.apply(axes)
    first = figure.axes[0]
    first.set_ylabel(title_of(error))
    title = f"{about(comparison)}, {layer_title(comparison, layer, ' ')}"
    if scale.exact is not None:
        title = f"{title}; line: Pareto front"
    first.set_title(title, loc="left")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    return figure


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Labels of the points (price, error) that no other beats in one without losing in the other,
    cheapest first.
    """
    best, kept = math.inf, []
    for label, (_, value) in sorted(points.items(), key=lambda item: item[1]):
        if value < best:
            kept.append(label)
            best = value
    return kept


def _total(comparison: Any, layer: str, label: str, unit: str) -> float:
    costs = [c for c in comparison.costs if c.approximation == label and layer in (c.layer, ALL)]
    return float(sum(getattr(c, unit) for c in costs))
