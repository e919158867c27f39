"""A block held as its columns: F = 1/N sum vec(P) vec(P)^T (the exact Fisher, TENGraD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, lanczos, shifted_power, start_vector
from fisher_lab.matrices.base import (
    AnyStats,
    FisherMatrix,
    Operator,
    Scalar,
    check_beside,
    checked_scalar,
    same_memory,
)
from fisher_lab.matrices.dense import Dense
from fisher_lab.statistics import LayerStats, Sums, as_sums, contractions


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(FisherMatrix):
    """U U^T / N for the columns U of a LayerStats, never formed.

    Args:
        sums: inputs and output gradients of the layer, with what was computed of them already.
            LayerStats are taken, too.

    Example:
        >>> stats = fl.LayerStats(a=torch.ones(10, 1, 1, 3), g=torch.ones(1, 10, 1, 1, 2))
        >>> fl.matrices.LowRank(stats).trace()
        tensor(6.)
    """

    sums: Sums

    def __post_init__(self) -> None:
        if isinstance(self.sums, LayerStats):
            object.__setattr__(self, "sums", Sums(self.sums))

    @property
    def stats(self) -> LayerStats:
        """The columns U."""
        return self.sums.stats

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.sums.shape

    def _apply(self, X: Tensor) -> Tensor:
        return contractions.apply(self.stats, X)

    def trace(self) -> Tensor:
        """Mean squared norm of the columns."""
        return self.sums.squares().sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the Gram matrix."""
        return self._norm

    @cached_property
    def _norm(self) -> Tensor:
        return self.sums.square().sqrt()

    @cached_property
    def _top(self) -> Tensor:
        """Of the Gram matrix, where products with it cost less."""
        if not contractions.gram_pays(self.stats):
            return super()._top
        start = start_vector(self, self.columns)
        gram = self.gram
        found = lanczos(lambda v: gram @ v, start, tolerance=1e-6)
        return torch.tensor(found.high, dtype=self.dtype, device=self.device)

    @cached_property
    def gram(self) -> Tensor:
        """K = U^T U / N `[R * N, R * N]`, whose eigenvalues are those of F besides zeros."""
        return self.sums.gram() / self.sums.N

    @cached_property
    def _gram_eigh(self) -> tuple[Tensor, Tensor]:
        return eigh(self.gram)

    @property
    def examples(self) -> int:
        """Those of the columns."""
        return self.stats.N

    @property
    def columns(self) -> int:
        """Number of columns R * N."""
        return self.sums.R * self.sums.N

    def eigenvalues(self) -> Tensor:
        """Those of the Gram matrix, padded with zeros or cut."""
        return self._eigenvalues

    @cached_property
    def _eigenvalues(self) -> Tensor:
        if self.dim <= self.columns:
            return super().eigenvalues()
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0)
        zeros = values.new_zeros(self.dim - self.columns)
        return torch.cat([zeros, values])

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self> = squared norm of the cross Gram matrix."""
        columns = as_sums(stats).stats
        return contractions.overlap(columns, self.stats)

    def weights_beside(self, other: FisherMatrix) -> Tensor | None:
        """The weights `[N]` of the own columns in self - other, if that is made of them (TENGraD).

        Args:
            other: made of the first of the own columns, or any matrix: then None.
        """
        if not isinstance(other, LowRank):
            return None
        n = other.stats.N
        first_a = self.stats.a
        if first_a is not None:
            first_a = first_a[:n]
        first_g = self.stats.g[:, :n]
        if not same_memory(other.stats.a, first_a) or not same_memory(other.stats.g, first_g):
            return None
        weight = self.stats.g.new_full((self.stats.N,), 1 / self.stats.N)
        weight[:n] -= 1 / n
        return weight

    def _inner_by_columns(self, other: FisherMatrix) -> Tensor:
        if not isinstance(other, LowRank) or self.weights_beside(other) is None:
            return other.quadratic(self.sums)
        n = other.stats.N
        squares = self.sums.squared_gram()  # what |F|_F is made of
        return squares[:, :n].mean()

    def known_square(self, other: FisherMatrix) -> Tensor | None:
        """From the Gram matrix behind the own norm, if other is made of the first columns."""
        if not isinstance(other, LowRank) or self.weights_beside(other) is None:
            return None
        n = other.stats.N
        squares = self.sums.squared_gram()
        return squares[:n, :n].mean()

    def minus(self, other: FisherMatrix) -> Operator:
        """From the columns alone, in the other's coordinates, or as two products: what
        costs least.
        """
        check_beside(self, other)
        weight = self.weights_beside(other)
        if weight is not None:
            return lambda X: contractions.apply(self.stats, X, weight)
        operator = other._taken_from(self.stats)
        if operator is None:
            return super().minus(other)
        return operator

    def differences(self, others: Sequence[FisherMatrix], V: Tensor) -> list[Tensor]:
        """In one pass over the columns, which are weighted for those that are made of them."""
        N = self.stats.N
        equal = self.stats.g.new_full((N,), 1 / N)
        each = []
        left: list[FisherMatrix | None] = []  # what is still to be taken off
        for other in others:
            weight = self.weights_beside(other)
            if weight is None:
                each.append(equal)
                left.append(other)
            else:
                each.append(weight)
                left.append(None)
        Y = contractions.apply(self.stats, V, torch.stack(each))
        found = []
        for rest, v, y in zip(left, V, Y, strict=True):
            difference = y if rest is None else y - rest @ v
            found.append(difference)
        return found

    @property
    def shares_products(self) -> bool:
        """Where positions are shared, P is formed (or read) once for all."""
        return not self.stats.rank_one

    @property
    def product_flops(self) -> float:
        """Two products with the columns."""
        return float(self.stats.N * self.stats.T) * self.dim

    def square_distance(self, other: FisherMatrix, most_flops: float) -> float | None:
        """From the Gram matrix if other is made of the first columns, else by the other's own route
        or entry by entry.
        """
        weight = self.weights_beside(other)
        if weight is not None and most_flops >= self.stats.N**2:  # the norm was made of it
            squares = self.sums.squared_gram()
            return float(weight @ squares @ weight)
        found = other._square_distance_to(self.stats, most_flops)
        if found is None:
            return super().square_distance(other, most_flops)
        return found

    def scaled(self, c: Scalar) -> LowRank:
        """Columns times sqrt(c)."""
        c = checked_scalar(c, "factor", self)
        stats = self.stats
        g = stats.g * c**0.5
        return LowRank(Sums(stats.like(stats.a, g)))

    @property
    def signature(self) -> None:
        """It stays alone: its columns are its own."""
        return None

    def rescued(self, p: float, damping: Scalar) -> FisherMatrix:
        """By eigendecompositions as every power of it."""
        return self._powered(p, damping)

    def _dense(self) -> Tensor:
        return contractions.dense(self.stats)

    def _powered(self, p: float, damping: Scalar) -> FisherMatrix:
        """Woodbury: (lambda I + U U^T/N)^p = lambda^p I + U V diag(((k + lambda)^p - lambda^p) / k)
        V^T U^T / N.
        """
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        if self.dim <= self.columns:
            # a tensor, because a trainer's refresh must not wait for Dense to look whether Cholesky
            # succeeded
            if isinstance(damping, float):
                damping = zero + damping
            return Dense(self.dense(), self.shape)._powered(p, damping)
        values, vectors = self._gram_eigh
        shift = shifted_power(zero, p, damping)
        weights = _power_weights(values, p, damping)
        core = (vectors * weights) @ vectors.T
        return ShiftedLowRank(self.sums, core, shift)


def _power_weights(values: Tensor, p: float, damping: Scalar) -> Tensor:
    """((k + lambda)^p - lambda^p) / k for the eigenvalues k of a Gram matrix `[n]`.

    Undamped, this is k^(p - 1), and 0 where an eigenvalue is zero up to rounding.
    """
    if p == 0:
        return torch.zeros_like(values)
    undamped = shifted_power(values, p - 1, 0.0, len(values))
    if not isinstance(damping, Tensor):
        damping = values.new_tensor(damping)
    return torch.where(damping > 0, _damped_weights(values, p, damping), undamped)


def _damped_weights(values: Tensor, p: float, damping: Tensor) -> Tensor:
    """The same for lambda > 0, where no eigenvalue has to be dropped.

    The weights are a smooth function of k, finite at 0. Directions in the null space of K carry no
    column, so that a finite weight does no harm to them. Subtracted as they stand, two nearly equal
    powers would be divided by a k of the size of rounding.
    """
    shift = damping**p
    if p == -1:
        return -shift / (values + damping)
    u = values / damping
    difference = shift * torch.expm1(p * torch.log1p(u))
    at_zero = p * damping ** (p - 1)
    zero = values <= 0
    safe = torch.where(zero, 1.0, values)
    return torch.where(zero, at_zero, difference / safe)


@dataclass(frozen=True, eq=False, repr=False)
class ShiftedLowRank(FisherMatrix):
    """shift I + U core U^T / N: a damped power of a low-rank block.

    Args:
        sums: the columns U.
        core: symmetric `[R * N, R * N]`.
        shift: scalar, >= 0.

    Example:
        >>> stats = fl.LayerStats(a=torch.randn(4, 1, 1, 3), g=torch.randn(1, 4, 1, 1, 2))
        >>> inverse = fl.matrices.LowRank(stats).powered(-1.0, 0.1)
        >>> type(inverse).__name__
        'ShiftedLowRank'
    """

    sums: Sums
    core: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.sums, LayerStats):
            object.__setattr__(self, "sums", Sums(self.sums))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.sums.shape

    def _apply(self, X: Tensor) -> Tensor:
        stats = self.sums.stats
        s = contractions.project(stats, X)  # [..., R, N]
        of_columns = s.flatten(-2) @ self.core
        weights = of_columns.view(s.shape)
        image = contractions.combine(stats, weights / stats.N)
        return torch.addcmul(image, X, self.shift)

    def trace(self) -> Tensor:
        """From the Gram matrix."""
        products = self.core * self.sums.gram()
        return self.shift * self.dim + products.sum() / self.sums.N

    def frobenius_norm(self) -> Tensor:
        """From the Gram matrix."""
        gram = self.sums.gram()
        M = self.core @ gram / self.sums.N
        of_shift = self.shift**2 * self.dim
        cross = 2 * self.shift * M.diagonal().sum()
        of_columns = (M * M.T).sum()
        square = of_shift + cross + of_columns
        return square.clamp(min=0).sqrt()

    def scaled(self, c: Scalar) -> ShiftedLowRank:
        """c times both parts."""
        c = checked_scalar(c, "factor", self)
        return ShiftedLowRank(self.sums, self.core * c, self.shift * c)

    @property
    def signature(self) -> None:
        """It stays alone: its columns are its own."""
        return None

    def rescued(self, p: float, damping: Scalar) -> FisherMatrix:
        """Of the dense matrix."""
        return self._formed().rescued(p, damping)

    def _powered(self, p: float, damping: Scalar) -> FisherMatrix:
        return self._formed()._powered(p, damping)

    def _formed(self) -> Dense:
        """The dense matrix."""
        return Dense(self.dense(), self.shape)
