"""What a table of a comparison shows: which errors, layer by layer, in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from fisher_lab._ground.arguments import check_kind, names_of
from fisher_lab._ground.memory import readable
from fisher_lab._ground.text import did_you_mean, printable
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.rows import Cost, Row, costs_by_pair

Column = tuple[str, float | None]  # a measure and its damping
ROUNDING = 1e-9  # standard errors below it are of values that do not vary, as traces that are kept
Distance = Callable[[Row], float]  # from the value of the exact block; infinite if none is known


@dataclass(frozen=True)
class Line:
    """One approximation on one layer."""

    approximation: str
    rows: dict[Column, Row]
    cost: Cost | None


@dataclass(frozen=True)
class LayerLines:
    """The lines of one layer, or of all layers together.

    Attributes:
        title: its name with the shape of its weight.
        lines: one for every approximation shown.
        left_out: how many others were measured.
    """

    title: str
    lines: tuple[Line, ...]
    left_out: int = 0


def columns_of(comparison: Measurements, errors: str | Sequence[str] | None) -> list[Column]:
    """Errors with their dampings, in the order of measuring.

    Raises:
        ValueError: for an error that was not measured.
    """
    wanted = _measured_names("errors", comparison, errors)
    found: dict[Column, None] = {}
    for row in comparison.rows:
        if row.error in wanted:
            found[row.error, row.damping] = None
    return list(found)


def importance(column: Column, columns: Sequence[Column]) -> int:
    """The place of a column among those that compete for the width, 0 the first.

    First come measures without a damping, then those at a single one; then what says the same as
    another measure in other units (trace_ratio beside trace), then curves over many dampings.
    """
    error, damping = column
    names = {name for name, _ in columns}
    if damping is not None:
        dampings = [at for name, at in columns if name == error]
        return 1 if len(dampings) == 1 else 3
    for name in names:
        if error.startswith(f"{name}_"):
            return 2
    return 0


def layer_lines(comparison: Measurements, columns: Sequence[Column]) -> list[LayerLines]:
    """What was measured of some errors, in the order of measuring; layers without them are not
    named.
    """
    costs = costs_by_pair(comparison.costs)
    by_pair: dict[tuple[str, str], dict[Column, Row]] = {}
    layers: dict[str, list[Line]] = {}
    for row in comparison.rows:
        column = (row.error, row.damping)
        if column not in columns:
            continue
        pair = (row.layer, row.approximation)
        if pair not in by_pair:
            by_pair[pair] = {}
            line = Line(row.approximation, by_pair[pair], costs.get(pair))
            layers.setdefault(row.layer, []).append(line)
        by_pair[pair][column] = row
    found = []
    for layer, lines in layers.items():
        title = printable(layer_title(comparison, layer))
        found.append(LayerLines(title, tuple(lines)))
    return found


def ordered(
    comparison: Measurements,
    groups: Sequence[LayerLines],
    distance: Distance,
    sort: str | None = None,
    top: int | None = None,
) -> list[LayerLines]:
    """The lines of each layer with the nearest to exact first, and no more than so many of them.

    Args:
        comparison: what the lines are of.
        groups: the lines of each layer.
        distance: of a value from that of the exact block.
        sort: the measure to sort by, a damped one at its first damping; None to keep the order.
        top: lines of each layer, None for all.

    Raises:
        ValueError: for an error that was not measured, or no line at all.
    """
    check_top(top)
    column = None
    if sort is not None:
        column = columns_of(comparison, [sort])[0]
    found = []
    for group in groups:
        lines = list(group.lines)
        if column is not None:
            lines.sort(key=lambda line: _distance_at(line, column, distance))
        kept = lines[:top]
        found.append(LayerLines(group.title, tuple(kept), len(lines) - len(kept)))
    return found


def check_top(top: int | None) -> None:
    """Raise ValueError where no line of a layer would be left."""
    if top is not None and top < 1:
        raise ValueError(f"Got {top} lines per layer, expected 1 or more.")


def extremes(group: LayerLines, column: Column, distance: Distance) -> tuple[float, float] | None:
    """Distances of the best and the worst value of a layer; None where there is no difference."""
    distances = []
    for line in group.lines:
        far = _distance_at(line, column, distance)
        if math.isfinite(far):
            distances.append(far)
    if not distances or min(distances) == max(distances):
        return None
    return min(distances), max(distances)


def _distance_at(line: Line, column: Column, distance: Distance) -> float:
    row = line.rows.get(column)
    if row is None:
        return math.inf
    return distance(row)


def _measured_names(
    argument: str, comparison: Measurements, names: str | Sequence[str] | None
) -> list[str]:
    """Names of errors that were all measured; None for all of them."""
    measured = comparison.errors
    if names is None:
        return measured
    wanted = names_of(argument, names)
    for name in wanted:
        check_kind(argument, name, str, "names")
    check_measured(wanted, measured)
    return wanted


def check_measured(names: Iterable[str], measured: Collection[str]) -> None:
    """Raise ValueError for an error that is none of those measured."""
    for name in names:
        if name not in measured:
            known = ", ".join(measured)
            guess = did_you_mean(name, measured)
            raise ValueError(f"Got error {name!r}{guess}, expected one of those measured: {known}.")


# -- texts -----------------------------------------------------------------------------------------
def column_title(column: Column) -> str:
    """A measure in words, with its damping."""
    error, damping = column
    title = printable(error).replace("_", " ")
    if damping is None:
        return title
    return f"{title} {damping:g}"


def layer_title(comparison: Measurements, layer: str) -> str:
    """A layer's name with the shape of its weight."""
    name = layer or "(model)"
    shape = comparison.settings.about(layer).shape
    if shape is None:
        return name
    rows, columns = shape
    return f"{name}  {rows}x{columns}"


def as_text(value: float | None) -> str:
    """A value for people: four digits, small ones in powers of ten."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.1e}"


def row_text(row: Row | None) -> str:
    """The value of a row, with its standard error where there is one."""
    if row is None:
        return as_text(None)
    if row.stderr is None or row.stderr <= max(row.noise, ROUNDING):
        return as_text(row.value)
    return f"{as_text(row.value)} ± {row.stderr:.2g}"


def cost_texts(cost: Cost | None) -> tuple[str, str]:
    """Time and size of a line; empty over all layers, which cost nothing of their own."""
    if cost is None:
        return "", ""
    milliseconds = cost.seconds * 1e3
    return f"{milliseconds:.1f} ms", readable(cost.bytes)


def heading(comparison: Measurements) -> list[str]:
    """Lines that say what was measured, what is missing and why."""
    settings = comparison.settings
    if not settings:
        return []
    parts = []
    if settings.problem_name:
        parts.append(settings.problem_name)
    parts.append(f"{settings.fisher} Fisher")
    parts.append(str(settings.likelihood))
    parts.append(f"N = {settings.N}")
    # which the noise floors follow
    if settings.precision:
        parts.append(settings.precision)
    lines = ["  ".join(parts)]
    if settings.complete is False:
        lines.append("Not complete: the run was stopped before all layers were measured.")
    left_out = settings.left_out or {}
    for name, reason in left_out.items():
        lines.append(f"Left out: {name}: {reason}")
    return [printable(line) for line in lines]
