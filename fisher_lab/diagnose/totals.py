"""Errors over all layers: those of the block-diagonal matrix, from the numbers behind the layers'
errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisher_lab.diagnose.inside import floor_inside, precision_inside
from fisher_lab.diagnose.layer import Asked, LayerResult
from fisher_lab.diagnose.standard_errors import Found
from fisher_lab.errors import DampedQuantities, Quantities, total
from fisher_lab.results import ALL, Row


def over_layers(asked: Asked, results: Sequence[LayerResult]) -> list[Row]:
    """Rows of the block-diagonal matrix of all layers, without approximations that a
    layer lacks.
    """
    rows: list[Row] = []
    lacking = any(f"damped errors of layer {r.layer!r}" in r.left_out for r in results)
    dampings: dict[float | None, None] = {}  # in the order of the rows
    for result in results:
        for row in result.rows:
            dampings[row.damping] = None
    for damping in dampings:
        if damping is not None and lacking:
            continue  # some layers have no damped errors
        rows += _of_damping(asked, results, damping)
    return rows


def _of_damping(asked: Asked, results: Sequence[LayerResult], damping: float | None) -> list[Row]:
    """Rows of one damping, or of the undamped errors."""
    damped = damping is not None
    parts = _parts(asked, results, damping)
    checked = worst_check(results)
    stderr: Found = {}
    if asked.standard_errors is not None and not damped:
        layers = [result.layer for result in results]
        stderr = asked.standard_errors.total(layers, parts)
    measures = asked.damped if damped else asked.undamped
    rows = []
    for label in parts:
        together = total(parts[label])
        inside = floor_inside(asked.source, together, damped)
        for m in measures:
            if not m.layered:
                continue
            value, noise = m.formula(together)
            noise = max(noise, inside)
            row = Row(
                layer=ALL,
                approximation=label,
                error=m.name,
                value=value,
                noise=noise,
                damping=damping,
                checked=checked,
                fisher=asked.source.fisher,
                stderr=stderr.get((label, m.name)),
                precision=precision_inside(asked.source),
            )
            rows.append(row)
    return rows


def _parts(
    asked: Asked, results: Sequence[LayerResult], damping: float | None
) -> dict[str, list[Any]]:
    """The quantities of every layer, by approximation, of those that all layers have."""
    kind = Quantities if damping is None else DampedQuantities
    # the sum over all layers lacks what one of them lacks
    left_out: set[str] = set()
    for result in results:
        left_out.update(result.about.left_out or ())
    found = {}
    for label in asked.candidates:
        if label in left_out:
            continue
        parts = []
        for result in results:
            for numbers in result.quantities:
                if numbers["approximation"] == label and numbers["damping"] == damping:
                    parts.append(kind.of(numbers))
        if parts:
            found[label] = parts
    return found


def worst_check(results: Sequence[LayerResult]) -> float | None:
    """The largest deviation of a captured block from torch.func."""
    found = []
    for result in results:
        checked = result.about.checked
        if checked is not None:
            found.append(checked)
    return max(found, default=None)
