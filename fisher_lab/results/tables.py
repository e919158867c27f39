"""Comparisons as text tables, as wide as the terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fisher_lab._ground.arguments import is_whole
from fisher_lab._ground.arguments import shown as told
from fisher_lab._ground.text import printable
from fisher_lab.results.grid import (
    Column,
    Distance,
    LayerLines,
    Line,
    column_title,
    columns_of,
    cost_texts,
    extremes,
    heading,
    importance,
    layer_lines,
    row_text,
)
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.recommendation import recommend

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

NO_TERMINAL = 110  # characters a line where there is none
NARROWEST = 60
MOST_OF_NAMES = 1 / 4  # share of the width that the longest layer names take, and as much labels
SMALLEST_NAME = 5  # "layer", the title of that column
GAP = 2  # characters between columns: the table's padding and its invisible line
COSTS = ("time", "size")
BEST = "bold green"
WORST = "red"


def terminal_width() -> int:
    """Characters a line: of the terminal, or those of a usual page where there is none."""
    columns, _ = shutil.get_terminal_size((NO_TERMINAL, 24))
    return max(columns, NARROWEST)


def render(
    comparison: Measurements, errors: str | Sequence[str] | None = None, width: int | None = None
) -> str:
    """The errors of a comparison: one block of lines per layer, then over all layers.

    Args:
        comparison: with rows, costs and settings.
        errors: measures to show: all of them, in further tables if they are too many for one. None
            for as many as one table holds; the others are named below it.
        width: characters per line, 60 or more; None for those of the terminal.

    Raises:
        ValueError: for an error that was not measured, or a width that is none.
    """
    if width is not None and not is_whole(width, 1):
        raise ValueError(f"Got width={told(width)}, expected a number of characters, 1 or more.")
    columns = columns_of(comparison, errors)
    groups = layer_lines(comparison, columns)
    view = View(columns, groups, every=errors is not None)
    out = io.StringIO()
    width = width or terminal_width()
    # in a notebook a console would show the table itself, whatever its file is
    console = _console(file=out, width=width, color_system=None, force_jupyter=False)
    for part in _parts(comparison, view, max(width, NARROWEST)):
        console.print(part)
    return out.getvalue()


def show(comparison: Measurements, view: View) -> None:
    """Print a view of a comparison, in colours where the terminal has them."""
    console = _console(width=terminal_width())
    for part in _parts(comparison, view, terminal_width()):
        console.print(part)


@dataclass(frozen=True)
class View:
    """What of a comparison is shown.

    Attributes:
        columns: the errors.
        groups: the lines of each layer.
        every: whether further tables show the errors that do not fit into one; else they are named.
        distance: how far a value is from that of the exact block, by which the best and the worst
            of a layer are marked; None for no marks.
    """

    columns: Sequence[Column]
    groups: Sequence[LayerLines]
    every: bool = False
    distance: Distance | None = None


def _console(**options: Any) -> Any:
    # here, since rich takes a while to load and most runs print no table
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, **options)


def _parts(comparison: Measurements, view: View, width: int) -> Iterator[Any]:
    """What to use, heading, tables, and what they leave out."""
    from rich.text import Text

    if not view.every:
        answer = _answer(comparison, width)
        if answer:
            yield Text(answer)
    for line in heading(comparison):
        yield Text(line)
    if view.every:
        rest = list(view.columns)
        while rest:
            shown = _fitting(view, rest, width)
            yield _table(view, shown, width)
            rest = rest[len(shown) :]
    else:
        by_importance = sorted(view.columns, key=lambda column: importance(column, view.columns))
        shown = _fitting(view, by_importance, width)
        yield _table(view, [column for column in view.columns if column in shown], width)
        rest = [column for column in view.columns if column not in shown]
        if rest:
            yield Text(_not_shown(rest))
    left_out = sum(group.left_out for group in view.groups)
    if left_out:
        yield Text(f"{left_out} more lines are not shown.")


def _answer(comparison: Measurements, width: int) -> str:
    """What to use; nothing where no efficiency was measured."""
    try:
        found = recommend(comparison)
    except ValueError:
        return ""
    return f"{found.text(width)}\n"


def _not_shown(columns: Sequence[Column]) -> str:
    """A sentence with the errors that found no place, each with all its dampings."""
    dampings: dict[str, list[str]] = {}
    for error, damping in columns:
        at = dampings.setdefault(error, [])
        if damping is not None:
            at.append(f"{damping:g}")
    names = []
    for error, at in dampings.items():
        title = column_title((error, None))
        names.append(f"{title} at {', '.join(at)}" if at else title)
    return f"For want of width not shown: {'; '.join(names)}. Name errors to see them."


# -- what fits -------------------------------------------------------------------------------------
def _fitting(view: View, columns: Sequence[Column], width: int) -> list[Column]:
    """As many of the columns, from the first, as fit into the width; one at least."""
    names = _layer_width(view, width) + _label_width(view, width)
    # names, time and size have a gap each, and the table an edge
    left = width - names - sum(_cost_widths(view)) - 4 * GAP - 1
    fitting: list[Column] = []
    for column in columns:
        left -= _column_width(view, column) + GAP
        if left < 0 and fitting:
            break
        fitting.append(column)
    return fitting


def _layer_width(view: View, width: int) -> int:
    """Characters of the column of layers; longer names go on in the next line."""
    longest = max((len(group.title) for group in view.groups), default=0)
    return max(SMALLEST_NAME, min(longest, int(MOST_OF_NAMES * width)))


def _label_width(view: View, width: int) -> int:
    """Characters of the column of approximations."""
    longest = len("approximation")
    for group in view.groups:
        for line in group.lines:
            longest = max(longest, len(line.approximation))
    return min(longest, int(MOST_OF_NAMES * width))


def _column_width(view: View, column: Column) -> int:
    """Characters of the longest value of an error, or of the longest word of its title."""
    longest = max(map(len, column_title(column).split()), default=0)
    for group in view.groups:
        for line in group.lines:
            longest = max(longest, len(row_text(line.rows.get(column))))
    return longest


def _cost_widths(view: View) -> list[int]:
    """Characters of time and of size."""
    longest = list(map(len, COSTS))
    for group in view.groups:
        for line in group.lines:
            for place, text in enumerate(cost_texts(line.cost)):
                longest[place] = max(longest[place], len(text))
    return longest


# -- the table -------------------------------------------------------------------------------------
def _table(view: View, columns: Sequence[Column], width: int) -> Table:
    """Some of the errors, layer by layer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", width=_layer_width(view, width), overflow="fold")
    table.add_column("approximation", width=_label_width(view, width), overflow="fold")
    for column in columns:
        # as a Text, here and below: in a plain string rich would take brackets for its own markup
        title = Text(column_title(column))
        table.add_column(title, justify="right", width=_column_width(view, column))
    for cost, longest in zip(COSTS, _cost_widths(view), strict=True):
        table.add_column(cost, justify="right", width=longest)
    for group in view.groups:
        name = group.title
        ends = {column: _ends(view, group, column) for column in columns}
        for line in group.lines:
            values = [_cell(view, line, column, ends[column]) for column in columns]
            table.add_row(Text(name), Text(_label(line)), *values, *cost_texts(line.cost))
            name = ""  # a layer is named once
        table.add_section()
    return table


def _ends(view: View, group: LayerLines, column: Column) -> tuple[float, float] | None:
    """Distances of the best and the worst value of a layer; None where none are marked."""
    if view.distance is None:
        return None
    return extremes(group, column, view.distance)


def _cell(view: View, line: Line, column: Column, ends: tuple[float, float] | None) -> Text:
    """A value, marked if it is the best or the worst of its layer."""
    from rich.text import Text

    row = line.rows.get(column)
    text = Text(row_text(row))
    if row is None or view.distance is None or ends is None:
        return text
    best, worst = ends
    far = view.distance(row)
    if far == best:
        text.stylize(BEST)
    elif far == worst:
        text.stylize(WORST)
    return text


def _label(line: Line) -> str:
    return printable(line.approximation)
