"""Spectral norms of differences by the Lanczos method, several side by side where that costs less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fisher_lab._ground.linalg import Extremes, Lanczos, lanczos, start_vector
from fisher_lab.matrices import FisherMatrix, Operator

TOLERANCE = 1e-3  # relative residual at which Lanczos stops
BASIS = 32  # Lanczos vectors to reckon with when runs share a memory budget


def extremes(apply: Operator, like: FisherMatrix, tolerance: float = TOLERANCE) -> Extremes:
    """Extreme eigenvalues of an operator on arrays of the shape of W of `like`."""
    return lanczos(lambda v: apply(v.view(like.shape)).flatten(), start_vector(like), tolerance)


def advance_together(
    exact: FisherMatrix, approximations: Sequence[FisherMatrix], memory: float
) -> list[Any]:
    """Extremes of F - F^ for several F^, sharing every product with F.

    Pays where F says that it shares products: its columns are formed, or read, once for all.

    Args:
        exact: the block F.
        approximations: several F^.
        memory: bytes for the Lanczos vectors of the runs that go together.
    """
    size = max(1, int(memory // (BASIS * exact.dim * 8)))
    found: list[Any] = []
    for begin in range(0, len(approximations), size):
        found += _together(exact, approximations[begin : begin + size])
    return found


def _together(exact: FisherMatrix, approximations: Sequence[FisherMatrix]) -> list[Any]:
    runs = [Lanczos(start_vector(exact), TOLERANCE) for _ in approximations]
    while True:
        active = [i for i, run in enumerate(runs) if run.found is None]
        if not active:
            return [run.found for run in runs]
        vectors = torch.stack([runs[i].vector for i in active])
        V = vectors.view(-1, *exact.shape)
        products = exact.differences([approximations[i] for i in active], V)
        for i, product in zip(active, products, strict=True):
            runs[i].feed(product.flatten())
