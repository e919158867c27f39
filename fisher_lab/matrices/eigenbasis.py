"""A block that is diagonal in a Kronecker product of orthogonal bases.

EKFAC and TEKFAC are, and damped powers of KFAC.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import mode_product, shifted_power
from fisher_lab.matrices.base import AnyStats, FisherMatrix, Operator, Scalar, checked_scalar
from fisher_lab.statistics import LayerStats, as_sums, contractions


@dataclass(frozen=True, eq=False, repr=False)
class EigenbasisDiagonal(FisherMatrix):
    """(B_1 (x) ... (x) B_k) diag(values) (B_1 (x) ... (x) B_k)^T, per group.

    Args:
        basis: orthogonal matrices `[Q, n_i, n_i]`, one per mode; None stands for the identity.
        values: eigenvalues `[Q, n_1, ..., n_k]`.

    Example:
        >>> values = torch.ones(1, 2, 3)
        >>> basis = (torch.eye(2)[None], torch.eye(3)[None])
        >>> fl.matrices.EigenbasisDiagonal(basis, values).trace()
        tensor(6.)
    """

    basis: tuple[Tensor | None, ...]
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: the first mode are the rows, the others the columns."""
        Q, first, *rest = self.values.shape
        return Q * first, math.prod(rest)

    def _apply(self, X: Tensor) -> Tensor:
        by_modes = X.reshape(*X.shape[:-2], *self.values.shape)
        # into the basis, times the eigenvalues, and back
        Y = mode_product(by_modes, self.basis, transpose=True)
        image = mode_product(Y * self.values, self.basis)
        return image.reshape(X.shape)

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

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self> = sum of the values times the squares of the columns in the basis."""
        if len(self.basis) != 2:
            return super().quadratic(stats)
        left, right = self.basis
        sums = as_sums(stats)
        squares = sums.squares((left, right))
        return (self.values * squares).sum()

    def _taken_from(self, stats: LayerStats) -> Operator | None:
        """In the eigenbasis, where this matrix is a product entry by entry."""
        if not stats.rank_one or len(self.basis) != 2:
            return None
        left, right = self.basis
        rotated = stats.rotated(left, right)
        values = self.values.flatten(0, 1)

        def apply(X: Tensor) -> Tensor:
            image = contractions.apply(rotated, X)
            return image - values * X

        return apply

    def scaled(self, c: Scalar) -> EigenbasisDiagonal:
        """c times the values."""
        c = checked_scalar(c, "factor", self)
        return EigenbasisDiagonal(self.basis, self.values * c)

    @property
    def signature(self) -> Hashable:
        """By the shapes of bases and values; the matrices become groups."""
        return self._shapes()

    def rescued(self, p: float, damping: Scalar) -> EigenbasisDiagonal:
        """Eigenvalue by eigenvalue."""
        return self._powered(p, damping)

    def _powered(self, p: float, damping: Scalar) -> EigenbasisDiagonal:
        size = 0  # roundings of all the bases add up
        for vectors in self.basis:
            if vectors is not None:
                size += vectors.shape[-1]
        powers = shifted_power(self.values, p, damping, size)
        return EigenbasisDiagonal(self.basis, powers)
