"""The answer in a sentence per layer: which approximation is best, by which measure, and at what
price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisher_lab._ground.memory import readable
from fisher_lab.errors.measures import MEASURES, exact_value, judging
from fisher_lab.results import ALL, Comparison, Row
from fisher_lab.results.tables import as_text

WITHIN = 1.1  # "cheapest within 10 %": errors up to this factor above the smallest
TIE = 1e-6  # relative difference below which two errors are called equal


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
    """How far the value is from that of the exact block; 0 within the rounding noise, infinite
    where nobody knows.
    """
    exact = exact_value(row.error)
    if exact is None or math.isnan(row.value):
        return math.inf
    far = abs(row.value - exact)
    if far <= row.noise:
        return 0.0
    return far


def _sentence(comparison: Comparison, layer: str) -> str:
    # the exact blocks and the gradient may have rows beside the approximations: yardsticks of the
    # whole network's step, which nobody is advised to use
    judged = comparison.settings.approximations or comparison.approximations
    rows = []
    for row in comparison.rows:
        if row.layer == layer and row.approximation in judged:
            rows.append(row)
    main = _main(rows)
    if main is None:
        return "Nothing that was measured says which approximation is best."
    measured = [row for row in rows if row.error == main and row.damping == _middle(rows, main)]
    parts = [f"best by {_title(main)}: {_named(measured)}"]
    direction = _direction(rows)
    if direction is not None and direction != main:
        damping = _middle(rows, direction)
        at = "" if damping is None else f" at damping {damping:g}"
        at_damping = [row for row in rows if row.error == direction and row.damping == damping]
        parts.append(f"by {_title(direction)}{at}: {_named(at_damping)}")
    cheap = _cheapest(comparison, layer, measured)
    if cheap is not None:
        parts.append(cheap)
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _main(rows: list[Row]) -> str | None:
    """The error to judge by: how far the whole matrix is, else the first one that has a best value."""
    known = [row.error for row in rows if exact_value(row.error) is not None]
    return next(iter(judging("matrix", known) + known), None)


def _direction(rows: list[Row]) -> str | None:
    """The error of the direction: of the damped steps if it was measured, else of the matrix."""
    known = judging("direction", [row.error for row in rows if exact_value(row.error) is not None])
    damped = [error for error in known if MEASURES[error].damped]
    return next(iter(damped + known), None)


def _middle(rows: list[Row], error: str) -> float | None:
    """The middle one of the dampings measured."""
    dampings = sorted(
        {row.damping for row in rows if row.error == error and row.damping is not None}
    )
    return dampings[len(dampings) // 2] if dampings else None


def _title(error: str) -> str:
    """What the error is called in a sentence."""
    return MEASURES[error].title if error in MEASURES else error


def _named(rows: list[Row]) -> str:
    labels, value = best(rows)
    nearest = next(row for row in rows if row.approximation == labels[0])
    said = "exact" if distance(nearest) == 0 else as_text(value)
    return f"{' and '.join(labels)} ({said})"


def _cheapest(comparison: Comparison, layer: str, rows: list[Row]) -> str | None:
    """The approximation with fewest bytes among those near the best."""
    of_one = {(cost.layer, cost.approximation): cost.bytes for cost in comparison.costs}
    parts = comparison.layers if layer == ALL else [layer]
    held = {}
    for row in rows:
        bytes_of_parts = [of_one.get((part, row.approximation)) for part in parts]
        if None not in bytes_of_parts:
            held[row.approximation] = sum(size for size in bytes_of_parts if size is not None)
    limit = min(map(distance, rows)) * WITHIN
    near = [
        row.approximation for row in rows if distance(row) <= limit and row.approximation in held
    ]
    if not near:
        return None
    label = min(near, key=lambda name: held[name])
    return f"cheapest within 10 %: {label} ({readable(held[label])})"
