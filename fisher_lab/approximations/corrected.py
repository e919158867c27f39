"""Eigenvalue correction of a Kronecker approximation: George et al. (2018), Theorems 2 and 3 there.

In the eigenbasis B_1 (x) B_2 of a Kronecker approximation the optimal diagonal is s = 1/N sum (B_1^T P B_2)^2
(elementwise, positions summed first), so |F - corrected|_F <= |F - base|_F and the trace is that of F.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisher_lab._ground.linalg import without_noise
from fisher_lab.approximations.base import Approximation, Moments, check_approximation
from fisher_lab.matrices import EigenbasisDiagonal, FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats


class EigenvalueCorrected(Approximation, register=False):
    """A Kronecker approximation with its eigenvalues re-estimated in its own basis (second sweep)."""

    base: Approximation

    @property
    def sweeps(self) -> int:  # type: ignore[override]
        """One more than the base."""
        return self.base.sweeps + 1

    @property
    def needs_factors(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base.needs_factors

    @property
    def keeps_examples(self) -> float:  # type: ignore[override]
        """As the base."""
        return self.base.keeps_examples

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """The base's moments, and the squares `s` `[Q, d_out, d_in]` in the basis of `matrix`."""
        moments = self.base.moments(stats)
        if isinstance(matrix, EigenbasisDiagonal):
            moments["s"] = stats.squares((matrix.basis[0], matrix.basis[1]))
        return moments

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """The base's eigenbasis with `s` carried over from the basis of `matrix`; without s its own eigenvalues."""
        base = self.base.assemble(moments)
        if not isinstance(base, Kronecker) or len(base.factors) != 2:
            raise TypeError(
                f"{self.label} got a base that assembles {type(base).__name__}, expected a Kronecker product of 2."
            )
        fresh = base.eigenbasis
        if "s" not in moments or not isinstance(matrix, EigenbasisDiagonal):
            return fresh
        return EigenbasisDiagonal(fresh.basis, carried(moments["s"], matrix.basis, fresh.basis))

    def reassemble(self, moments: Moments, matrix: FisherMatrix) -> FisherMatrix:
        """The squares in the basis of `matrix`, which the same data would only give again."""
        if isinstance(matrix, EigenbasisDiagonal) and "s" in moments:
            return EigenbasisDiagonal(matrix.basis, moments["s"])
        return self.assemble(moments, matrix)

    def average(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """Linear mix; the first `s` is taken as it is."""
        return super().average({**new, **old}, new, weight)

    def carry(self, moments: Moments, matrix: FisherMatrix) -> Moments:
        """`s` in the basis of the new matrix."""
        assert isinstance(matrix, EigenbasisDiagonal)
        return {**moments, "s": matrix.values} if "s" in moments else moments


def carried(s: Tensor, old: tuple[Tensor | None, ...], new: tuple[Tensor | None, ...]) -> Tensor:
    """Diagonal in the new basis of a matrix that is diag(s) in the old: (N_1^T O_1)^o2 s ((N_2^T O_2)^o2)^T.

    Exact, and the trace is kept, because the squares of an orthogonal matrix are doubly stochastic.
    """
    for mode, (before, after) in enumerate(zip(old, new, strict=True)):
        if before is None or after is None:
            continue
        weights = without_noise(after.transpose(-1, -2) @ before).square()
        s = weights @ s if mode == 0 else s @ weights.transpose(-1, -2)
    return s


@dataclass(frozen=True)
class Corrected(EigenvalueCorrected):
    """Eigenvalue correction of any approximation that is a Kronecker product of two factors.

    Args:
        base: the Kronecker approximation.
    """

    base: Approximation
    listed = False

    def __post_init__(self) -> None:
        check_approximation(self.base)
