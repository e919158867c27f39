"""The answer in a sentence per layer: which approximation is best, by which measure, and at what price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisher_lab._ground.memory import readable
from fisher_lab.results.comparison import ALL, Comparison, Row
from fisher_lab.results.tables import number

WITHIN = 1.1  # "cheapest within 10 %": errors up to this factor above the smallest
TIE = 1e-6  # relative difference below which two errors are called equal
EXACT_AT_ONE = ("trace_ratio", "cosine", "damped_cosine", "damped_efficiency")


@dataclass(frozen=True)
class Answer:
    """What to take for one layer.

    Attributes:
        layer: its name, "(all)" for all layers together.
        sentence: the answer.
    """

    layer: str
    sentence: str


def answers(comparison: Comparison) -> list[Answer]:
    """One sentence per layer, all layers together first where they were measured."""
    names = ([ALL] if any(row.layer == ALL for row in comparison.rows) else []) + comparison.layers
    return [Answer(name, _sentence(comparison, name)) for name in names]


def best(rows: list[Row]) -> tuple[list[str], float]:
    """The approximations nearest to exact, ties included, and their value."""
    distances = [distance(row) for row in rows]
    least = min(distances)
    tied = [row for row, far in zip(rows, distances, strict=True) if far <= least * (1 + TIE)]
    return [row.approximation for row in tied], tied[0].value


def distance(row: Row) -> float:
    """How far the value is from that of the exact block; 0 within the rounding noise."""
    far = abs(row.value - (1.0 if row.error in EXACT_AT_ONE else 0.0))
    return math.inf if math.isnan(far) else 0.0 if far <= row.noise else far


def _sentence(comparison: Comparison, layer: str) -> str:
    rows = [row for row in comparison.rows if row.layer == layer]
    main = next((e for e in ("frobenius", "frobenius_rescaled", "spectral") if any(r.error == e for r in rows)), None)
    main = main or rows[0].error
    measured = [row for row in rows if row.error == main and row.damping == _middle(rows, main)]
    parts = [f"best by {_word(main)}: {_named(measured)}"]
    direction = next((e for e in ("damped_cosine", "cosine") if any(r.error == e for r in rows) and e != main), None)
    if direction is not None:
        damping = _middle(rows, direction)
        at = "" if damping is None else f" at damping {damping:g}"
        word = "by direction" if direction == "damped_cosine" else "by cosine"
        parts.append(word + at + ": " + _named([r for r in rows if r.error == direction and r.damping == damping]))
    cheap = _cheapest(comparison, layer, measured)
    text = "; ".join(parts + ([cheap] if cheap else [])) + "."
    return text[0].upper() + text[1:]


def _middle(rows: list[Row], error: str) -> float | None:
    """The middle one of the dampings measured."""
    dampings = sorted({row.damping for row in rows if row.error == error and row.damping is not None})
    return dampings[len(dampings) // 2] if dampings else None


def _word(error: str) -> str:
    return {"frobenius": "Frobenius", "spectral": "spectral norm"}.get(error, error)


def _named(rows: list[Row]) -> str:
    labels, value = best(rows)
    return f"{' and '.join(labels)} ({'exact' if distance_of(rows, labels[0]) == 0 else number(value)})"


def distance_of(rows: list[Row], label: str) -> float:
    """The distance of one approximation."""
    return next(distance(row) for row in rows if row.approximation == label)


def _cheapest(comparison: Comparison, layer: str, rows: list[Row]) -> str | None:
    """The approximation with fewest bytes among those near the best."""
    known = {(cost.layer, cost.approximation): cost.bytes for cost in comparison.costs}
    parts = comparison.layers if layer == ALL else [layer]
    complete = [row.approximation for row in rows if all((part, row.approximation) in known for part in parts)]
    held = {label: sum(known[part, label] for part in parts) for label in complete}
    limit = min(map(distance, rows)) * WITHIN
    near = [row.approximation for row in rows if distance(row) <= limit and row.approximation in held]
    if not near:
        return None
    label = min(near, key=lambda name: held[name])
    return f"cheapest within 10 %: {label} ({readable(held[label])})"
