"""Comparisons and budgets as tables of a notebook, whose columns sort at a click."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fisher_lab._ground.notebook import Cell, html_table
from fisher_lab.results.grid import (
    Line,
    column_title,
    columns_of,
    cost_texts,
    heading,
    layer_lines,
    row_text,
)
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.rows import Row

if TYPE_CHECKING:
    from fisher_lab.results.budget import StepBudget


def comparison_table(comparison: Measurements) -> str:
    """Every error of a comparison, a line for each layer and approximation."""
    columns = columns_of(comparison, None)
    titles = ["layer", "approximation"]
    titles += [column_title(column) for column in columns]
    titles += ["time", "size"]
    by_name = sorted(comparison.approximations)
    lines = []
    for place, group in enumerate(layer_lines(comparison, columns)):
        for line in group.lines:
            label = line.approximation
            cells = [Cell(group.title, place), Cell(label, by_name.index(label))]
            for column in columns:
                cells.append(_value(line.rows.get(column)))
            cells += _cost(line)
            lines.append(cells)
    return html_table(titles, lines, heading(comparison), names=2)


def budget_table(budget: StepBudget) -> str:
    """The stages of a step, and what each loses."""
    lost = dict(budget.losses())
    lines = []
    for place, stage in enumerate((*budget.stages, budget.gradient)):
        share = Cell("")
        if stage in lost:
            share = Cell(f"{-100 * lost[stage]:+.1f} %", -lost[stage])
        efficiency = Cell(f"{stage.efficiency:.4f}", stage.efficiency)
        lines.append([Cell(stage.name, place), Cell(stage.about), efficiency, share])
    above = [
        f"{budget.approximation}, damping {budget.damping:g} tr F / d, {budget.likelihood}, "
        f"N = {budget.N}",
        f"Mend first: {budget.largest_loss.name}.",
    ]
    titles = ["stage", "what was done", "share of the best decrease", "change"]
    return html_table(titles, lines, above, names=2)


def _value(row: Row | None) -> Cell:
    if row is None or math.isnan(row.value):
        return Cell(row_text(row))
    return Cell(row_text(row), row.value)


def _cost(line: Line) -> list[Cell]:
    if line.cost is None:
        return [Cell(""), Cell("")]
    time, size = cost_texts(line.cost)
    return [Cell(time, line.cost.seconds), Cell(size, line.cost.bytes)]
