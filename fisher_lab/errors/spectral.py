"""Spectral norms of differences by the Lanczos method, several side by side where that
costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Extremes, Lanczos, lanczos, start_vector
from fisher_lab.matrices import FisherMatrix, Operator

TOLERANCE = 1e-3  # relative residual at which Lanczos stops
BASIS = 32  # Lanczos vectors to reckon with when runs share a memory budget


def extremes(apply: Operator, like: FisherMatrix, tolerance: float = TOLERANCE) -> Extremes:
    """Extreme eigenvalues of an operator on arrays of the shape of W of `like`."""

    def flat(v: Tensor) -> Tensor:
        X = v.view(like.shape)
        return apply(X).flatten()

    return lanczos(flat, start_vector(like), tolerance)


def advance_together(
    exact: FisherMatrix, approximations: Sequence[FisherMatrix], memory: float
) -> list[Extremes]:
    """Extremes of F - F^ for several F^, sharing every product with F.

    Pays where F says that it shares products: its columns are formed, or read, once for all.

    Args:
        exact: the block F.
        approximations: several F^.
        memory: bytes for the Lanczos vectors of the runs that go together.
    """
    one_run = BASIS * exact.dim * 8  # bytes
    size = max(1, int(memory // one_run))
    found: list[Extremes] = []
    for begin in range(0, len(approximations), size):
        some = approximations[begin : begin + size]
        found += _together(exact, some)
    return found


def _together(exact: FisherMatrix, approximations: Sequence[FisherMatrix]) -> list[Extremes]:
    """Extremes of F - F^ for several F^, whose runs take every step together."""
    runs = []
    for _ in approximations:
        runs.append(Lanczos(start_vector(exact), TOLERANCE))
    while True:
        vectors = []
        others = []
        active = []
        for run, other in zip(runs, approximations, strict=True):
            if run.found is None:
                active.append(run)
                others.append(other)
                vectors.append(run.vector)
        if not active:
            break
        V = torch.stack(vectors).view(-1, *exact.shape)
        products = exact.differences(others, V)
        for run, product in zip(active, products, strict=True):
            run.feed(product.flatten())
    found: list[Extremes] = []
    for run in runs:
        assert run.found is not None
        found.append(run.found)
    return found
