"""The answer in a sentence per layer: which approximation is best, by which measure, at
what price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fisher_lab._ground.arguments import check_kind
from fisher_lab._ground.memory import readable
from fisher_lab.errors.judging import best, distance, finite
from fisher_lab.errors.measures import MEASURES, exact_value, judging
from fisher_lab.results import ALL, Comparison, Row
from fisher_lab.results.grid import as_text

WITHIN = 1.1  # "cheapest within 10 %": errors up to this factor above the smallest
NOTHING = "Nothing that was measured says which approximation is best."


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
    """One sentence per layer, all layers together first where they were measured.

    Raises:
        TypeError: for anything but a comparison.

    Example:
        >>> [answer.layer for answer in fl.report.answers(comparison)]
        ['(all)', '0', '2']
    """
    check_kind("comparison", comparison, Comparison, "what fl.compare returned")
    names = comparison.layers
    if any(row.layer == ALL for row in comparison.rows):
        names = [ALL, *names]
    return [Answer(name, _sentence(comparison, name)) for name in names]


def _cheapest(comparison: Comparison, layer: str, rows: Iterable[Row]) -> str | None:
    """The approximation with fewest bytes among those near the best, in words."""
    known = finite(rows)
    if not known:
        return None
    held = _bytes_held(comparison, layer)
    limit = min(map(distance, known)) * WITHIN
    near = {}
    for row in known:
        label = row.approximation
        if distance(row) <= limit and label in held:
            near[label] = held[label]
    if not near:
        return None
    cheapest = min(near, key=lambda label: near[label])
    return f"cheapest within 10 %: {cheapest} ({readable(near[cheapest])})"


def _bytes_held(comparison: Comparison, layer: str) -> dict[str, int]:
    """The bytes of each approximation, where they are known of every part of the layer."""
    parts = [layer]
    if layer == ALL:
        parts = comparison.layers
    sizes: dict[str, list[int]] = {}
    for cost in comparison.costs:
        if cost.layer in parts:
            sizes.setdefault(cost.approximation, []).append(cost.bytes)
    held = {}
    for label, known in sizes.items():
        if len(known) == len(parts):
            held[label] = sum(known)
    return held


# -- the measures to judge by ----------------------------------------------------------------------
def _main(rows: Iterable[Row]) -> str | None:
    """The error to judge by: how far the whole matrix is, else the first that has a best value."""
    known = _judging_errors(rows)
    return next(iter(judging("matrix", known) + known), None)


def _direction(rows: Iterable[Row]) -> str | None:
    """The error of the direction: of the damped steps if it was measured, else of the matrix."""
    known = judging("direction", _judging_errors(rows))
    damped = [error for error in known if MEASURES[error].damped]
    return next(iter(damped + known), None)


def _judging_errors(rows: Iterable[Row]) -> list[str]:
    """The errors that have a best value, in order."""
    names = dict.fromkeys(row.error for row in rows)
    return [name for name in names if exact_value(name) is not None]


def _middle(rows: Iterable[Row]) -> float | None:
    """The middle one of the dampings measured."""
    found = set()
    for row in rows:
        if row.damping is not None:
            found.add(row.damping)
    if not found:
        return None
    dampings = sorted(found)
    return dampings[len(dampings) // 2]


# -- the sentence ----------------------------------------------------------------------------------
def _sentence(comparison: Comparison, layer: str) -> str:
    rows = _of_candidates(comparison, layer)
    main = _main(rows)
    if main is None:
        return NOTHING
    judged = _of_error(rows, main)
    name = _title(main)
    if finite(judged):
        parts = [f"best by {name}: {_named(judged)}"]
    else:
        parts = [f"by {name} none is near: no value is finite"]
    direction = _direction(rows)
    if direction is not None and direction != main:
        parts.append(_by_direction(rows, direction))
    cheap = _cheapest(comparison, layer, judged)
    if cheap is not None:
        parts.append(cheap)
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _of_candidates(comparison: Comparison, layer: str) -> list[Row]:
    """A layer's rows of the approximations.

    The exact blocks and the gradient may have rows beside them: yardsticks of the whole network's
    step, which nobody is advised to use.
    """
    candidates = comparison.settings.approximations
    if not isinstance(candidates, list):  # files of before do not tell
        candidates = comparison.approximations
    rows = []
    for row in comparison.rows:
        if row.layer == layer and row.approximation in candidates:
            rows.append(row)
    return rows


def _of_error(rows: Iterable[Row], error: str) -> list[Row]:
    """The rows of one error, those at the middle damping if it is a damped one."""
    found = [row for row in rows if row.error == error]
    damping = _middle(found)
    return [row for row in found if row.damping == damping]


def _by_direction(rows: Iterable[Row], error: str) -> str:
    """The best by an error of the direction."""
    judged = _of_error(rows, error)
    name = _title(error)
    damping = judged[0].damping
    if damping is not None:
        name = f"{name} at damping {damping:g}"
    return f"by {name}: {_named(judged)}"


def _title(error: str) -> str:
    """What the error is called in a sentence."""
    measure = MEASURES.get(error)
    return error if measure is None else measure.title


def _named(rows: Sequence[Row]) -> str:
    """The labels of the best and their value."""
    nearest = best(rows)
    if not nearest:
        return "no value is finite"
    labels = " and ".join(row.approximation for row in nearest)
    first = nearest[0]
    said = as_text(first.value)
    if distance(first) == 0:
        said = "exact"
    return f"{labels} ({said})"
