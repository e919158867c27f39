"""How far the values of rows are from those of the exact block, and which are nearest."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fisher_lab.errors.measures import exact_value
from fisher_lab.results import Row

TIE = 1e-6  # relative difference below which two errors are called equal


def distance(row: Row) -> float:
    """How far the value is from that of the exact block.

    0 within the rounding noise, infinite where nobody knows.
    """
    exact = exact_value(row.error)
    if exact is None or math.isnan(row.value):
        return math.inf
    far = abs(row.value - exact)
    if far <= row.noise:
        return 0.0
    return far


def finite(rows: Iterable[Row]) -> list[Row]:
    """The rows of which it is known how far they are."""
    return [row for row in rows if math.isfinite(distance(row))]


def best(rows: Iterable[Row]) -> list[Row]:
    """The rows nearest to exact, ties included; none where no value is finite."""
    known = finite(rows)
    if not known:
        return []
    limit = min(map(distance, known)) * (1 + TIE)
    return [row for row in known if distance(row) <= limit]
