"""Large sums in pieces: how much memory one piece takes, and which examples it holds.

The three sizes are read where they are used, so that a test changes one number here; within a small
budget they are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # factors of products are formed in pieces of this size
# passing tensors in pieces of this one: memory that the allocator has at hand
STREAM_BYTES = 8 * 2**20
KEPT_BYTES = 256 * 2**20  # sums worth keeping may take this much


# the budget of the question that is being answered
_BUDGET: ContextVar[float] = ContextVar("budget", default=math.inf)


@contextmanager
def within(budget: float) -> Iterator[None]:
    """Pieces that are small beside a budget of so many bytes, until the block ends."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def chunk() -> float:
    """Of a piece in which factors of products are formed: a 16th, as several are at work."""
    return min(CHUNK_BYTES, _BUDGET.get() / 16)


def stream() -> float:
    """Of a piece of a tensor that passes."""
    return min(STREAM_BYTES, _BUDGET.get() / 64)


def kept() -> float:
    """Of a sum that is worth keeping: an eighth, beside columns and factors."""
    return min(KEPT_BYTES, _BUDGET.get() / 8)


def slices(
    count: int,
    bytes_each: float,
    chunk_bytes: float | None = None,
    start: int = 0,
) -> Iterator[slice]:
    """Pieces of the examples `start` to `count` that take at most `chunk_bytes` (or one example).

    Args:
        count: number of examples.
        bytes_each: memory of one.
        chunk_bytes: None for CHUNK_BYTES.
        start: the first example.
    """
    if chunk_bytes is None:
        chunk_bytes = chunk()
    fitting = chunk_bytes // max(1, bytes_each)
    step = max(1, int(fitting))
    for begin in range(start, count, step):
        end = min(count, begin + step)
        yield slice(begin, end)


def accumulated(parts: Iterator[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total
