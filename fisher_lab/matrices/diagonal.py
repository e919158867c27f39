"""A diagonal block."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import shifted_power
from fisher_lab.matrices.base import AnyStats, FisherMatrix, Scalar, checked_scalar
from fisher_lab.statistics import as_sums


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalMatrix(FisherMatrix):
    """One number per parameter.

    Args:
        values: the diagonal in the shape of W `[d_out, d_in]`.

    Example:
        >>> fl.matrices.DiagonalMatrix(torch.ones(2, 3)).solve(torch.ones(2, 3), damping=1.0)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.values.shape[0], self.values.shape[1]

    def _apply(self, X: Tensor) -> Tensor:
        return X * self.values

    def trace(self) -> Tensor:
        """Sum of the diagonal."""
        return self.values.sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the diagonal."""
        return torch.linalg.norm(self.values)

    def spectral_norm(self) -> Tensor:
        """Largest entry."""
        return self.values.max()

    def eigenvalues(self) -> Tensor:
        """The diagonal, sorted."""
        values = self.values.flatten()
        return values.sort().values

    def quadratic(self, stats: AnyStats) -> Tensor:
        """Only the diagonal of F counts."""
        sums = as_sums(stats)
        squares = sums.squares().flatten(0, 1)  # the groups one below the other
        return (self.values * squares).sum()

    def scaled(self, c: Scalar) -> DiagonalMatrix:
        """c times the diagonal."""
        c = checked_scalar(c, "factor", self)
        return DiagonalMatrix(self.values * c)

    @property
    def signature(self) -> Hashable:
        """By shape."""
        return self._shapes()

    def rescued(self, p: float, damping: Scalar) -> DiagonalMatrix:
        """Entry by entry."""
        return self._powered(p, damping)

    def _powered(self, p: float, damping: Scalar) -> DiagonalMatrix:
        powers = shifted_power(self.values, p, damping)
        return DiagonalMatrix(powers)
