"""A block stored as it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power, spd_inverse
from fisher_lab.matrices.base import FisherMatrix, Scalar, check_beside, checked_scalar


@dataclass(frozen=True, eq=False, repr=False)
class Dense(FisherMatrix):
    """Any PSD matrix.

    Args:
        matrix: `[d, d]`.
        weight_shape: shape `(d_out, d_in)` of W.

    Example:
        >>> fl.matrices.Dense(2 * torch.eye(6), (2, 3)) @ torch.ones(2, 3)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """

    matrix: Tensor
    weight_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.weight_shape

    def _apply(self, X: Tensor) -> Tensor:
        image = X.flatten(-2) @ self.matrix
        return image.view(X.shape)

    def trace(self) -> Tensor:
        """Sum of the diagonal."""
        return self.matrix.diagonal().sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the entries."""
        return torch.linalg.norm(self.matrix)

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue, by the dense route up to d = 2000 and by Lanczos above."""
        if self.dim > 2000:
            return super().spectral_norm()
        return self.eigenvalues()[-1]

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, ascending."""
        return self._eigenvalues

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.matrix)

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return eigh(self.matrix)

    def inner(self, other: FisherMatrix) -> Tensor:
        """Row by row, unless the other one is held as columns."""
        check_beside(self, other)
        found = other._inner_by_columns(self)
        if found is not None:
            return found
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        start = 0
        for E in self.identity_chunks():
            rows = self.matrix[start : start + len(E)]
            mine = rows.view(E.shape)
            theirs = other @ E
            total = total + (mine * theirs).sum()
            start += len(E)
        return total

    def scaled(self, c: Scalar) -> Dense:
        """c times the entries."""
        c = checked_scalar(c, "factor", self)
        return Dense(self.matrix * c, self.weight_shape)

    def _powered(self, p: float, damping: Scalar) -> Dense:
        # a damping in a tensor is that of a trainer's refresh, which must not wait for the look
        # whether Cholesky succeeded
        looks = not isinstance(damping, Tensor) and damping > 0
        if p != -1 or not looks or self.remembers("_eigh"):
            return self.rescued(p, damping)
        shifted = self.matrix.clone()
        shifted.diagonal().add_(damping)
        inverse = spd_inverse(shifted)  # a tenth of an eigendecomposition
        if not bool(torch.isfinite(inverse).all()):
            return self.rescued(p, damping)
        return Dense(inverse, self.weight_shape)

    @property
    def signature(self) -> None:
        """It stays alone: joined ones would be a larger dense matrix."""
        return None

    def rescued(self, p: float, damping: Scalar) -> Dense:
        """From all eigenvalues, clamped at zero."""
        values, vectors = self._eigh
        powers = shifted_power(values, p, damping, self.dim)
        matrix = (vectors * powers) @ vectors.T
        return Dense(matrix, self.weight_shape)

    def _dense(self) -> Tensor:
        return self.matrix


FisherMatrix._as_dense = Dense
