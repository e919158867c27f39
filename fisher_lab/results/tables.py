"""Comparisons as text tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.memory import readable
from fisher_lab._ground.text import printable
from fisher_lab.results.rows import Settings

if TYPE_CHECKING:
    from fisher_lab.results.comparison import Comparison


def render(comparison: Comparison, errors: Sequence[str] | None = None, width: int = 110) -> str:
    """The errors of a comparison: one block of lines per layer, then over all layers.

    Args:
        comparison: with rows, costs and settings.
        errors: measures to show, None for all.
        width: characters per line.

    Raises:
        ValueError: for an error that was not measured.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = _columns(comparison, errors)
    values = {(r.layer, r.approximation, r.error, r.damping): r.value for r in comparison.rows}
    costs = {(c.layer, c.approximation): c for c in comparison.costs}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer")
    table.add_column("approximation", no_wrap=True)
    for error, damping in columns:
        title = printable(error).replace("_", " ")
        if damping is not None:
            title = f"{title} {damping:g}"
        longest_word = max(map(len, title.split()), default=0)
        # As a Text, here and below: in a plain string rich would take brackets for its own markup.
        table.add_column(Text(title), justify="right", min_width=longest_word)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for layer in dict.fromkeys(row.layer for row in comparison.rows):
        title = printable(layer_title(comparison, layer))
        for approximation in comparison.approximations:
            found = [
                values.get((layer, approximation, error, damping)) for error, damping in columns
            ]
            if all(value is None for value in found):
                continue
            shown = [as_text(value) for value in found]
            cost = costs.get((layer, approximation))
            if cost is None:
                shown += ["", ""]
            else:
                shown += [f"{cost.seconds * 1e3:.1f} ms", readable(cost.bytes)]
            table.add_row(Text(title), Text(printable(approximation)), *shown)
            title = ""  # a layer is named once
        table.add_section()
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return printable(_heading(comparison.settings)) + out.getvalue()


def as_text(value: float | None) -> str:
    """A value for people: four digits, small ones in powers of ten."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.1e}"


def _columns(
    comparison: Comparison, errors: Sequence[str] | None
) -> list[tuple[str, float | None]]:
    """Errors and dampings that are shown."""
    wanted = comparison.errors if errors is None else names_of("errors", errors)
    for name in wanted:
        if name not in comparison.errors:
            known = ", ".join(comparison.errors)
            raise ValueError(f"Got error {name!r}, expected one of those measured: {known}.")
    shown = [(row.error, row.damping) for row in comparison.rows if row.error in wanted]
    return list(dict.fromkeys(shown))


def layer_title(comparison: Comparison, layer: str) -> str:
    """A layer's name with the shape of its weight."""
    name = layer or "(model)"
    shape = comparison.settings.about(layer).shape
    if shape is None:
        return name
    return f"{name}  {shape[0]}x{shape[1]}"


def _heading(settings: Settings) -> str:
    """What was measured, what is missing and why."""
    if not settings:
        return ""
    parts = [f"{settings.fisher} Fisher", str(settings.likelihood), f"N = {settings.N}"]
    if settings.problem_name:
        parts.insert(0, settings.problem_name)
    lines = ["  ".join(parts) + "\n"]
    if settings.complete is False:
        lines.append("Not complete: the run was stopped before all layers were measured.\n")
    for name, reason in (settings.left_out or {}).items():
        lines.append(f"Left out: {name}: {reason}\n")
    return "".join(lines)
