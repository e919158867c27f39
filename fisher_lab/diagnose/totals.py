"""Errors over all layers: those of the block-diagonal matrix, from the numbers behind the layers'
errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisher_lab.diagnose.layer import Asked, LayerResult, floor_inside
from fisher_lab.diagnose.plan import STREAMED
from fisher_lab.errors import DampedQuantities, Quantities, total
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
        parts = _parts(asked, results, damping)
        stderr = {}
        if asked.standard_errors is not None and damping is None:
            stderr = asked.standard_errors.total([result.layer for result in results], parts)
        for label in parts:
            together = total(parts[label])
            for m in asked.undamped if damping is None else asked.damped:
                if not m.layered:
                    continue
                value, noise = m.formula(together)
                noise = max(noise, floor_inside(asked.source, together, damping is not None))
                error = stderr.get((label, m.name))
                rows.append(
                    Row(
                        ALL,
                        label,
                        m.name,
                        value,
                        noise,
                        damping,
                        checked,
                        asked.source.fisher,
                        error,
                    )
                )
    return rows


def _parts(
    asked: Asked, results: Sequence[LayerResult], damping: float | None
) -> dict[str, list[Any]]:
    """The quantities of every layer, by approximation, of those that all layers have."""
    kind = Quantities if damping is None else DampedQuantities
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
    found = [result.about.checked for result in results if result.about.checked is not None]
    return max(found, default=None)
