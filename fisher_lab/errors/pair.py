"""An exact block and one approximation of it: the quantities that the undamped measures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Extremes
from fisher_lab.errors.centred import centring_flops, kronecker_difference
from fisher_lab.errors.quantities import Measured
from fisher_lab.errors.spectral import advance_together, difference_extremes, shared_columns
from fisher_lab.matrices import FisherMatrix, Kronecker, LowRank, Streamed

DENSE_DIM = 600  # dense differences up to this d, expansions and Lanczos above
DIRECT_FLOPS = 4e12  # most work spent on evaluating a tiny difference entry by entry
CANCELLED = 1e-8  # relative squared error below which the expansion has lost half of its digits


class Pair:
    """An exact block and an approximation of it, their shared quantities computed once.

    Args:
        exact: the block F.
        approx: the approximation F^ over the same W.

    Raises:
        ValueError: if the two are over weights of different shape.
    """

    def __init__(self, exact: FisherMatrix, approx: FisherMatrix) -> None:
        if tuple(exact.shape) != tuple(approx.shape):
            raise ValueError(
                f"Got an exact block over {tuple(exact.shape)} and an approximation over {tuple(approx.shape)}, "
                "expected the same weight; compare matrices of the same layer."
            )
        self.exact, self.approx = exact, approx
        self.eps = torch.finfo(exact.dtype).eps
        self.small = exact.dim <= DENSE_DIM
        self.extremes: Extremes | None = None  # of F - F^, where several pairs advanced together

    @cached_property
    def trace_exact(self) -> float:
        """tr F."""
        return float(self.exact.trace())

    @cached_property
    def trace_approx(self) -> float:
        """tr F^."""
        return float(self.approx.trace())

    @cached_property
    def square_exact(self) -> float:
        """|F|_F^2."""
        return float(self.exact.frobenius_norm()) ** 2

    @cached_property
    def square_approx(self) -> float:
        """|F^|_F^2."""
        if self._shared is not None:
            return float(self._shared[1])
        return float(self.approx.frobenius_norm()) ** 2

    @cached_property
    def _shared(self) -> tuple[Tensor, Tensor] | None:
        """<F, F^> and |F^|_F^2 where F^ is made of the first columns of F, from the Gram matrix behind |F|_F."""
        if not isinstance(self.exact, LowRank) or shared_columns(self.exact.stats, self.approx) is None:
            return None
        assert isinstance(self.approx, LowRank)
        K, n = self.exact.sums.squared_gram(), self.approx.stats.N
        return K[:, :n].mean(), K[:n, :n].mean()

    @cached_property
    def inner(self) -> float:
        """<F, F^>_F without a dense matrix."""
        if self.small:
            return float((self.exact.dense() * self.approx.dense()).sum())
        if self._shared is not None:
            return float(self._shared[0])
        if isinstance(self.exact, LowRank):
            return float(self.approx.quadratic(self.exact.sums))
        if isinstance(self.exact, Streamed):
            return float(self.exact.inner(self.approx))
        if isinstance(self.approx, LowRank):
            return float(self.exact.quadratic(self.approx.sums))
        return sum(float(((self.exact @ E) * (self.approx @ E)).sum()) for E in self.exact.identity_chunks())

    @cached_property
    def _difference(self) -> Tensor:
        return self.exact.dense() - self.approx.dense()

    @cached_property
    def square_difference(self) -> Measured:
        """|F - F^|_F^2: entry by entry for small blocks, else expanded, and entry by entry again where that cancels."""
        scale = self.square_exact + self.square_approx
        rounding = (16 * self.eps) ** 2 * scale  # of a sum of squares of rounded differences
        if self.small:
            return Measured(float(self._difference.square().sum()), rounding)
        expanded = self.square_exact - 2 * self.inner + self.square_approx
        if expanded > CANCELLED * scale:
            return Measured(expanded, 8 * self.eps * scale)
        direct = self._without_cancellation()
        return Measured(max(expanded, 0.0), 8 * self.eps * scale) if direct is None else Measured(direct, rounding)

    def _without_cancellation(self) -> float | None:
        """|F - F^|_F^2 entry by entry or from centred features, None where that would take too long."""
        if isinstance(self.exact, LowRank) and isinstance(self.approx, Kronecker) and len(self.approx.factors) == 2:
            stats, (G, A) = self.exact.stats, self.approx.factors
            if stats.rank_one and stats.Q == 1 and 2 * centring_flops(stats) <= DIRECT_FLOPS:
                return max(0.0, kronecker_difference(stats, *(f[0] if f.ndim == 3 else f[0].diag() for f in (G, A))))
        columns = self.exact.stats.N * self.exact.stats.T if isinstance(self.exact, LowRank) else self.exact.dim
        if 4.0 * columns * self.exact.dim**2 > DIRECT_FLOPS:
            return None
        return sum(float((self.exact @ E - self.approx @ E).square().sum()) for E in self.exact.identity_chunks())

    @cached_property
    def top_exact(self) -> float:
        """|F|_2."""
        return float(self.exact.spectral_norm())

    @cached_property
    def top_difference(self) -> Measured:
        """|F - F^|_2, from all eigenvalues for small blocks and by Lanczos above."""
        scale = max(self.top_exact, (self.square_approx / self.exact.dim) ** 0.5)
        rounding = 16 * self.eps * scale
        if self.small:
            return Measured(float(torch.linalg.eigvalsh(self._difference).abs().max()), rounding)
        found = difference_extremes(self.exact, self.approx) if self.extremes is None else self.extremes
        return Measured(found.norm, max(found.residual, rounding))

    @cached_property
    def spectrum_difference(self) -> float:
        """Sum of squared differences of the sorted eigenvalues."""
        return float((self.exact.eigenvalues() - self.approx.eigenvalues()).square().sum())


def pairs(exact: FisherMatrix, approximations: Mapping[str, FisherMatrix]) -> dict[str, Pair]:
    """A Pair for every approximation; equal matrices (TKFAC and TN on a Linear layer) share one."""
    found: dict[str, Pair] = {}
    for label, matrix in approximations.items():
        twin = next((pair for pair in found.values() if _equal(pair.approx, matrix)), None)
        found[label] = Pair(exact, matrix) if twin is None else twin
    return found


def _equal(x: FisherMatrix, y: FisherMatrix) -> bool:
    if type(x) is not type(y):
        return False
    mine, theirs = x.tensors(), y.tensors()
    if getattr(x, "groups", None) != getattr(y, "groups", None) or tuple(x.shape) != tuple(y.shape):
        return False
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def advance(several: Iterable[Pair], memory: float) -> None:
    """Run the Lanczos method for several pairs of one exact block side by side where that pays.

    Args:
        several: pairs of the same exact block.
        memory: bytes for the Lanczos vectors.
    """
    todo = list({id(pair): pair for pair in several if not pair.small}.values())
    exact = todo[0].exact if todo else None
    if not isinstance(exact, LowRank | Streamed) or (isinstance(exact, LowRank) and exact.stats.rank_one):
        return
    for pair, found in zip(todo, advance_together(exact, [pair.approx for pair in todo], memory), strict=True):
        pair.extremes = found
