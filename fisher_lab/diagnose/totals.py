"""Errors over all layers: those of the block-diagonal matrix, from the numbers behind the layers' errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fisher_lab.diagnose.layer import Asked, LayerResult, floor_inside
from fisher_lab.diagnose.off_block import OFF_BLOCK, off_block
from fisher_lab.diagnose.plan import STREAMED
from fisher_lab.errors import Measured, Total
from fisher_lab.results import ALL, Row


def over_layers(asked: Asked, results: Sequence[LayerResult]) -> list[Row]:
    """Rows of the block-diagonal matrix of all layers, without approximations that a layer lacks."""
    rows: list[Row] = []
    checked = worst_check(results)
    streamed = any(result.about.route == STREAMED for result in results)
    dampings = dict.fromkeys(row.damping for result in results for row in result.rows)
    for damping in dampings:
        if damping is not None and streamed:
            continue  # some layers have no damped errors
        totals = _totals(asked, results, damping)
        stderr = {}
        if asked.standard_errors is not None and damping is None:
            stderr = asked.standard_errors.total([result.layer for result in results], totals)
        for label, total in totals.items():
            for m in asked.undamped if damping is None else asked.damped:
                if not m.layered:
                    continue
                value, noise = m.formula(total)
                noise = max(noise, floor_inside(asked.source, total, damping is not None))
                error = stderr.get((label, m.name))
                rows.append(Row(ALL, label, m.name, value, noise, damping, checked, asked.source.fisher, error))
    return rows


def _totals(asked: Asked, results: Sequence[LayerResult], damping: float | None) -> dict[str, Total]:
    """The sums over layers of every approximation that all layers have."""
    left_out: set[str] = set()
    for result in results:
        left_out.update(result.about.left_out or ())
    totals = {}
    for label in asked.candidates:
        if label in left_out:
            continue
        parts = []
        for result in results:
            for numbers in result.quantities:
                if numbers["approximation"] == label and numbers["damping"] == damping:
                    parts.append(_thawed(numbers))
        if parts:
            totals[label] = Total(parts)
    return totals


def _thawed(numbers: Mapping[str, Any]) -> SimpleNamespace:
    """Numbers as the measures read them; those of a file have lost their type."""
    found = {}
    for key, value in numbers.items():
        found[key] = Measured(*value) if isinstance(value, list | tuple) else value
    return SimpleNamespace(**found)


def between_layers(asked: Asked, results: Sequence[LayerResult]) -> Row:
    """How much of the whole network's Fisher lies outside the blocks."""
    value, noise = off_block(asked.source)
    return Row(ALL, "Exact", OFF_BLOCK, value, noise, None, worst_check(results), asked.source.fisher)


def worst_check(results: Sequence[LayerResult]) -> float | None:
    """The largest deviation of a captured block from torch.func."""
    found = [result.about.checked for result in results if result.about.checked is not None]
    return max(found, default=None)
