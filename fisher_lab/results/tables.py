"""Comparisons as text tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.memory import readable
from fisher_lab._ground.text import printable


def render(comparison: Any, errors: Sequence[str] | None = None, width: int = 110) -> str:
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
    for layer in dict.fromkeys(r.layer for r in comparison.rows):
        title = printable(_title(comparison, layer))
        for approximation in comparison.approximations:
            found = [values.get((layer, approximation, error, damping)) for error, damping in columns]
            if all(value is None for value in found):
                continue
            cost = costs.get((layer, approximation))
            tail = ["", ""] if cost is None else [f"{cost.seconds * 1e3:.1f} ms", readable(cost.bytes)]
            table.add_row(Text(title), Text(printable(approximation)), *(number(value) for value in found), *tail)
            title = ""
        table.add_section()
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return printable(_heading(comparison.settings)) + out.getvalue()


def number(value: float | None) -> str:
    """A value for people: four digits, small ones in powers of ten."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _columns(comparison: Any, errors: Sequence[str] | None) -> list[tuple[str, float | None]]:
    wanted = comparison.errors if errors is None else names_of("errors", errors)
    for name in wanted:
        if name not in comparison.errors:
            raise ValueError(f"Got error {name!r}, expected one of those measured: {', '.join(comparison.errors)}.")
    return list(dict.fromkeys((r.error, r.damping) for r in comparison.rows if r.error in wanted))


def _title(comparison: Any, layer: str) -> str:
    about = comparison.settings.get("layers", {}).get(layer)
    return layer or "(model)" if about is None else f"{layer or '(model)'}  {about['shape'][0]}x{about['shape'][1]}"


def _heading(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    parts = [f"{settings.get('fisher')} Fisher", str(settings.get("likelihood")), f"N = {settings.get('N')}"]
    problem = (settings.get("problem") or {}).get("name")
    if problem:
        parts.insert(0, str(problem))
    lines = ["  ".join(parts) + "\n"]
    if not settings.get("complete", True):
        lines.append("Not complete: the run was stopped before all layers were measured.\n")
    left_out = settings.get("left_out") or {}
    lines += [f"Left out: {name}: {reason}\n" for name, reason in left_out.items()]
    return "".join(lines)
