"""Eigenvalue correction of a Kronecker approximation: George et al. (2018), Theorems 2 and 3 there.

In the eigenbasis B_1 (x) B_2 of a Kronecker approximation the optimal diagonal is s = 1/N sum
(B_1^T P B_2)^2 (elementwise, positions summed first), so |F - corrected|_F <= |F - base|_F and the
trace is that of F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from fisher_lab._ground.linalg import without_noise
from fisher_lab.approximations.base import (
    Approximation,
    Iterated,
    assembled,
    check_approximation,
    observed,
)
from fisher_lab.approximations.moments import Moments, mixture
from fisher_lab.matrices import EigenbasisDiagonal, FisherMatrix, Kronecker
from fisher_lab.statistics import Sums

BASE = "base."  # before the names of the base's tensors


@dataclass(frozen=True, eq=False)
class WithSquares(Moments):
    """A base's moments, and the squares in the eigenbasis of the matrix assembled last.

    They have no derivative in the examples' weights (and the approximation no standard errors): the
    eigenbasis turns by (sampling error) / (gap of eigenvalues), and most gaps are smaller than
    that, so that the first order says nothing (it gives up to 8 times a bootstrap's standard error
    on the digits).

    Args:
        base: of the approximation that is corrected.
        s: 1/N sum (B_1^T P B_2)^2 `[Q, d_out, d_in]`; None before there is a basis.
    """

    base: Moments
    s: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.base.shape

    @property
    def examples_held(self) -> float:
        """As the base."""
        return self.base.examples_held

    def tensors(self) -> dict[str, Tensor]:
        """`s`, and those of the base as `base.A`, ..."""
        found = {}
        for name, x in self.base.tensors().items():
            found[BASE + name] = x
        if self.s is not None:
            found["s"] = self.s
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Others of the same names."""
        of_base = {}
        for name in self.base.tensors():
            of_base[name] = tensors[BASE + name]
        base = self.base.with_tensors(of_base)
        s = tensors.get("s")
        return replace(self, base=base, s=s)

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """The base's mixed as it does; the first `s` is taken as it is."""
        assert isinstance(new, WithSquares)
        base = self.base.mix(new.base, weight)
        s = self._mixed(new.s, weight)
        return replace(new, base=base, s=s)

    def follow(self, new: Moments, weight: float | Tensor) -> Moments:
        """As the base does, too."""
        assert isinstance(new, WithSquares)
        base = self.base.follow(new.base, weight)
        s = self._mixed(new.s, weight)
        return replace(new, base=base, s=s)

    def _mixed(self, new: Tensor | None, weight: float | Tensor) -> Tensor | None:
        """The squares of both."""
        if self.s is None or new is None:
            return new
        return mixture(self.s, new, weight)


class EigenvalueCorrected(Iterated, register=False):
    """A Kronecker approximation, its eigenvalues estimated anew in its own basis (second sweep)."""

    base: Approximation

    @property
    def sweeps(self) -> int:  # type: ignore[override]
        """One more than the base."""
        return self.base.sweeps + 1

    @property
    def needs_factors(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base.needs_factors

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """Those of the basis."""
        return self.base.factor_sizes(rows, kernel, bias)

    def moments(self, sums: Sums) -> WithSquares:
        """The base's moments."""
        return WithSquares(observed(self.base, sums, None))

    def moments_at(self, sums: Sums, matrix: FisherMatrix) -> WithSquares:
        """The base's moments, and the squares `s` `[Q, d_out, d_in]` in the basis of `matrix`."""
        base = observed(self.base, sums, None)
        if not isinstance(matrix, EigenbasisDiagonal):
            return WithSquares(base)
        left, right = matrix.basis
        s = sums.squares((left, right))
        return WithSquares(base, s)

    def assemble(self, moments: Moments) -> EigenbasisDiagonal:
        """The base in its eigenbasis, with its own eigenvalues."""
        assert isinstance(moments, WithSquares)
        base = assembled(self.base, moments.base, None)
        if not isinstance(base, Kronecker) or len(base.factors) != 2:
            raise TypeError(
                f"{self.label} got a base that assembles {type(base).__name__}, expected a "
                "Kronecker product of 2."
            )
        return base.eigenbasis

    def assemble_at(self, moments: Moments, matrix: FisherMatrix) -> EigenbasisDiagonal:
        """The base's eigenbasis with `s` carried over from the basis of `matrix`."""
        assert isinstance(moments, WithSquares)
        fresh = self.assemble(moments)
        if moments.s is None or not isinstance(matrix, EigenbasisDiagonal):
            return fresh
        values = in_new_basis(moments.s, matrix.basis, fresh.basis)
        return EigenbasisDiagonal(fresh.basis, values)

    def reassemble(self, moments: Moments, matrix: FisherMatrix) -> FisherMatrix:
        """The squares in the basis of `matrix`, which the same data would only give again."""
        assert isinstance(moments, WithSquares)
        if moments.s is None or not isinstance(matrix, EigenbasisDiagonal):
            return self.assemble_at(moments, matrix)
        return EigenbasisDiagonal(matrix.basis, moments.s)

    def carry(self, moments: Moments, matrix: FisherMatrix) -> Moments:
        """`s` in the basis of the new matrix."""
        assert isinstance(moments, WithSquares)
        assert isinstance(matrix, EigenbasisDiagonal)
        if moments.s is None:
            return moments
        return replace(moments, s=matrix.values)


def in_new_basis(
    s: Tensor,
    old: tuple[Tensor | None, ...],
    new: tuple[Tensor | None, ...],
) -> Tensor:
    """Diagonal in the new basis N of a matrix that is diag(s) in the old basis O.

    It is (N_1^T O_1)^o2 s ((N_2^T O_2)^o2)^T, with elementwise squares. Exact, and the trace is
    kept, because the squares of an orthogonal matrix are doubly stochastic.
    """
    for mode, (before, after) in enumerate(zip(old, new, strict=True)):
        if before is None or after is None:
            continue
        turn = after.mT @ before
        weights = without_noise(turn).square()
        if mode == 0:
            s = weights @ s
        else:
            s = s @ weights.mT
    return s


@dataclass(frozen=True)
class Corrected(EigenvalueCorrected):
    """Eigenvalue correction of any approximation that is a Kronecker product of two factors.

    Args:
        base: the Kronecker approximation.

    Example:
        >>> K = fl.estimate(fl.Corrected(fl.Shampoo()), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    base: Approximation
    listed = False

    def __post_init__(self) -> None:
        check_approximation(self.base)
