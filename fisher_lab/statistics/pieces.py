"""Large sums in pieces: how much memory one piece takes, and which examples it holds.

The three sizes are read where they are used, so that a test (or a user with little memory) changes
one number here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # factors of products are formed in pieces of this size
# passing tensors in pieces of this one: memory that the allocator has at hand
STREAM_BYTES = 8 * 2**20
KEPT_BYTES = 256 * 2**20  # sums worth keeping may take this much


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
        chunk_bytes = CHUNK_BYTES
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
