"""Spectral norms of differences by the Lanczos method, in the coordinates and the company that cost least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Extremes, Lanczos, lanczos, start_vector
from fisher_lab.matrices import EigenbasisDiagonal, FactoredRows, FisherMatrix, LowRank
from fisher_lab.statistics import LayerStats, contractions

TOLERANCE = 1e-3  # relative residual at which Lanczos stops
Operator = Callable[[Tensor], Tensor]
BASIS = 32  # Lanczos vectors to reckon with when runs share a memory budget


def extremes(apply: Operator, like: FisherMatrix, tolerance: float = TOLERANCE) -> Extremes:
    """Extreme eigenvalues of an operator on arrays of the shape of W of `like`."""
    return lanczos(lambda v: apply(v.view(like.shape)).flatten(), start_vector(like), tolerance)


def difference_extremes(exact: FisherMatrix, approx: FisherMatrix) -> Extremes:
    """Extreme eigenvalues of F - F^."""
    return extremes(difference_operator(exact, approx), exact)


def difference_operator(exact: FisherMatrix, approx: FisherMatrix) -> Operator:
    """X -> F X - F^ X, up to a rotation of the space where that makes F^ diagonal."""
    if isinstance(exact, LowRank):
        stats = exact.stats
        weight = shared_columns(stats, approx)
        if weight is not None:
            return lambda X: contractions.apply(stats, X, weight)
        if stats.rank_one and isinstance(approx, EigenbasisDiagonal) and len(approx.basis) == 2:
            left, right = approx.basis
            rotated, values = stats.rotated(left, right), approx.values.flatten(0, 1)
            return lambda X: contractions.apply(rotated, X) - values * X
        if stats.rank_one and isinstance(approx, FactoredRows) and _same(approx.a, stats.a):
            return _without_row_blocks(stats, approx.w)
    return lambda X: exact @ X - approx @ X


def shared_columns(stats: LayerStats, approx: FisherMatrix) -> Tensor | None:
    """The weights `[N]` of the columns of F in F - F^, if F^ is made of the first columns of F itself (TENGraD)."""
    if not isinstance(approx, LowRank):
        return None
    part, n = approx.stats, approx.stats.N
    if not (_same(part.a, None if stats.a is None else stats.a[:n]) and _same(part.g, stats.g[:, :n])):
        return None
    weight = stats.g.new_full((stats.N,), 1 / stats.N)
    weight[:n] -= 1 / n
    return weight


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors are the same memory, up to axes of length 1."""
    if x is None or y is None:
        return x is y
    shapes = [[(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (x, y)]
    return x.data_ptr() == y.data_ptr() and shapes[0] == shapes[1]


def _without_row_blocks(stats: LayerStats, w: Tensor) -> Operator:
    """F minus its row blocks: both multiply by the inputs first and last."""
    assert stats.a is not None
    a, g = stats.a[:, 0, 0], stats.g[:, :, 0, 0]

    def apply(X: Tensor) -> Tensor:
        Z = a @ X.T
        s = torch.einsum("rno,no->rn", g, Z) / stats.N
        return (torch.einsum("rn,rno->no", s, g) - w * Z).T @ a

    return apply


def advance_together(exact: FisherMatrix, approximations: Sequence[FisherMatrix], memory: float) -> list[Any]:
    """Extremes of F - F^ for several F^, sharing every pass over the columns of F.

    Pays where products with F are dear: positions are shared, so that P is formed (or read) once for all, or the
    columns are read anew for every product.

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
    weights = [shared_columns(exact.stats, approx) if isinstance(exact, LowRank) else None for approx in approximations]
    while active := [i for i, run in enumerate(runs) if run.found is None]:
        V = torch.stack([runs[i].vector for i in active]).view(-1, *exact.shape)
        Y = _weighted(exact, V, [weights[i] for i in active])
        for i, v, y in zip(active, V, Y, strict=True):
            runs[i].feed((y if weights[i] is not None else y - approximations[i] @ v).flatten())
    return [run.found for run in runs]


def _weighted(exact: FisherMatrix, V: Tensor, weights: list[Tensor | None]) -> Tensor:
    """F times every V, its columns weighted with the examples' weights where there are any."""
    if not isinstance(exact, LowRank):
        return exact @ V
    stats = exact.stats
    equal = stats.g.new_full((stats.N,), 1 / stats.N)
    each = [equal if w is None else w for w in weights]
    return contractions.apply(stats, V, torch.stack(each))
