"""A block that is diagonal in a Kronecker product of orthogonal bases (EKFAC, TEKFAC, damped
inverses of KFAC).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import mode_product, shifted_power
from fisher_lab.matrices.base import FisherMatrix, Operator
from fisher_lab.statistics import LayerStats, Sums, as_sums, contractions


@dataclass(frozen=True, eq=False)
class EigenbasisDiagonal(FisherMatrix):
    """(B_1 (x) ... (x) B_k) diag(values) (B_1 (x) ... (x) B_k)^T, per group.

    Args:
        basis: orthogonal matrices `[Q, n_i, n_i]`, one per mode; None stands for the identity.
        values: eigenvalues `[Q, n_1, ..., n_k]`.
    """

    basis: tuple[Tensor | None, ...]
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: the first mode are the rows, the others the columns."""
        Q, first, *rest = self.values.shape
        return Q * first, math.prod(rest)

    def _apply(self, X: Tensor) -> Tensor:
        Y = mode_product(X.reshape(*X.shape[:-2], *self.values.shape), self.basis, transpose=True)
        return mode_product(Y * self.values, self.basis).reshape(X.shape)

    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        return self.values.sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the eigenvalues."""
        return torch.linalg.norm(self.values)

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue."""
        return self.values.abs().max()

    def eigenvalues(self) -> Tensor:
        """The values, sorted."""
        return self.values.flatten().sort().values

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """<F, self> = sum of the values times the squares of the columns in the basis."""
        if len(self.basis) != 2:
            return super().quadratic(stats)
        squares = as_sums(stats).squares((self.basis[0], self.basis[1]))
        return (self.values * squares).sum()

    def _taken_from(self, stats: LayerStats) -> Operator | None:
        """In the eigenbasis, where this matrix is a product entry by entry."""
        if not stats.rank_one or len(self.basis) != 2:
            return None
        left, right = self.basis
        rotated = stats.rotated(left, right)
        values = self.values.flatten(0, 1)
        return lambda X: contractions.apply(rotated, X) - values * X

    def scaled(self, c: float | Tensor) -> EigenbasisDiagonal:
        """c times the values."""
        return EigenbasisDiagonal(self.basis, self.values * c)

    @property
    def signature(self) -> Hashable:
        """By the shapes of bases and values; the matrices become groups."""
        return self._shapes()

    def rescued(self, p: float, damping: float | Tensor) -> EigenbasisDiagonal:
        """Eigenvalue by eigenvalue."""
        return self._powered(p, damping)

    def _powered(self, p: float, damping: float | Tensor) -> EigenbasisDiagonal:
        return EigenbasisDiagonal(self.basis, shifted_power(self.values, p, damping))
