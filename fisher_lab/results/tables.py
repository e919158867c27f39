"""Comparisons as text tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.memory import readable
from fisher_lab._ground.text import printable
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.rows import Settings, costs_by_pair

if TYPE_CHECKING:
    from rich.table import Table

Column = tuple[str, float | None]  # a measure and its damping


def render(comparison: Measurements, errors: Sequence[str] | None = None, width: int = 110) -> str:
    """The errors of a comparison: one block of lines per layer, then over all layers.

    Args:
        comparison: with rows, costs and settings.
        errors: measures to show, None for all.
        width: characters per line.

    Raises:
        ValueError: for an error that was not measured.
    """
    # here, since rich takes a while to load and most runs print no table
    from rich.console import Console

    columns = _columns(comparison, errors)
    table = _empty_table(columns)
    layers = dict.fromkeys(row.layer for row in comparison.rows)
    for layer in layers:
        _add_layer(table, comparison, layer, columns)
        table.add_section()
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(table)
    heading = _heading(comparison.settings)
    return printable(heading) + out.getvalue()


def _empty_table(columns: Sequence[Column]) -> Table:
    """The table with its titles."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer")
    table.add_column("approximation", no_wrap=True)
    for error, damping in columns:
        title = printable(error).replace("_", " ")
        if damping is not None:
            title = f"{title} {damping:g}"
        # titles are broken between words only
        words = title.split()
        longest_word = max(map(len, words), default=0)
        # as a Text, here and below: in a plain string rich would take brackets for its own markup
        table.add_column(Text(title), justify="right", min_width=longest_word)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    return table


def _add_layer(
    table: Table, comparison: Measurements, layer: str, columns: Sequence[Column]
) -> None:
    """The lines of one layer: one for every approximation that was measured on it."""
    from rich.text import Text

    costs = costs_by_pair(comparison.costs)
    values = {}
    for row in comparison.rows:
        if row.layer == layer:
            values[row.approximation, row.error, row.damping] = row.value
    title = printable(layer_title(comparison, layer))
    for approximation in comparison.approximations:
        found = [values.get((approximation, *column)) for column in columns]
        if all(value is None for value in found):
            continue
        shown = [as_text(value) for value in found]
        cost = costs.get((layer, approximation))
        if cost is None:
            shown += ["", ""]
        else:
            milliseconds = cost.seconds * 1e3
            shown += [f"{milliseconds:.1f} ms", readable(cost.bytes)]
        label = printable(approximation)
        table.add_row(Text(title), Text(label), *shown)
        title = ""  # a layer is named once


def as_text(value: float | None) -> str:
    """A value for people: four digits, small ones in powers of ten."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.1e}"


def _columns(comparison: Measurements, errors: Sequence[str] | None) -> list[Column]:
    """Errors and dampings that are shown."""
    measured = comparison.errors
    wanted = measured
    if errors is not None:
        wanted = names_of("errors", errors)
    for name in wanted:
        if name not in measured:
            known = ", ".join(measured)
            raise ValueError(f"Got error {name!r}, expected one of those measured: {known}.")
    found: dict[Column, None] = {}
    for row in comparison.rows:
        if row.error in wanted:
            found[row.error, row.damping] = None
    return list(found)


def layer_title(comparison: Measurements, layer: str) -> str:
    """A layer's name with the shape of its weight."""
    name = layer or "(model)"
    shape = comparison.settings.about(layer).shape
    if shape is None:
        return name
    rows, columns = shape
    return f"{name}  {rows}x{columns}"


def _heading(settings: Settings) -> str:
    """What was measured, what is missing and why."""
    if not settings:
        return ""
    parts = []
    if settings.problem_name:
        parts.append(settings.problem_name)
    parts.append(f"{settings.fisher} Fisher")
    parts.append(str(settings.likelihood))
    parts.append(f"N = {settings.N}")
    # which the noise floors follow
    if settings.precision:
        parts.append(settings.precision)
    first = "  ".join(parts)
    lines = [f"{first}\n"]
    if settings.complete is False:
        lines.append("Not complete: the run was stopped before all layers were measured.\n")
    left_out = settings.left_out or {}
    for name, reason in left_out.items():
        lines.append(f"Left out: {name}: {reason}\n")
    return "".join(lines)
