"""The exact block itself: F = 1/N sum vec(P) vec(P)^T, held densely or as its columns.

Whichever is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Columns, Means, Moments
from fisher_lab.matrices import Dense, FisherMatrix, LowRank
from fisher_lab.statistics import LayerStats, Sums

DENSE_DIM = 600  # up to this d a dense block is cheaper than anything else


@dataclass(frozen=True, eq=False)
class Block(Means):
    """The `block` `[d, d]` in place of the columns of all examples."""

    @property
    def examples_held(self) -> float:
        """All: it is formed where it is smaller than they are, and fits where they fit."""
        return math.inf


@dataclass(frozen=True, eq=False)
class ColumnsOrBlock(Columns):
    """Columns that turn into their block once that is smaller."""

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """All examples while they are smaller than the block."""
        if isinstance(new, Columns):
            mixed = super().mix(new, weight)
            d_out, d_in = self.shape
            in_block = (d_out * d_in) ** 2
            if _numbers(mixed) < in_block:
                return mixed
        return self.as_means().mix(new, weight)


@dataclass(frozen=True)
class Exact(Approximation):
    """The full block of a layer, no approximation.

    State: d^2 numbers, or the columns (R N d_out + N d_in) where these are fewer.
    See also: TENGraD, the block of a sub-sample.

    Example:
        >>> K = fl.estimate(fl.Exact(), model, loss, (x, y))["0"]
        >>> fl.errors.frobenius(exact, K) < 1e-7
        True
    """

    listed = False

    def is_exact_of(self, N: int) -> bool:
        """Of all."""
        return True

    def moments(self, sums: Sums) -> Block | ColumnsOrBlock:
        """`block` `[d, d]` where it is small, otherwise the columns, as factors or as gradients."""
        stats = sums.stats
        if is_dense(stats):
            block = sums.dense()
            return Block({"block": block}, sums.shape)
        columns = ColumnsOrBlock(stats)
        if _gradient_numbers(stats) < _numbers(columns):  # many positions of a small weight
            P = stats.gradients()
            explicit = LayerStats.of_gradients(P, stats.kernel, stats.bias)
            return ColumnsOrBlock(explicit)
        return columns

    def assemble(self, moments: Moments) -> FisherMatrix:
        """Dense or LowRank."""
        if isinstance(moments, Columns):
            columns = Sums(moments.weighted())
            return LowRank(columns)
        return Dense(moments["block"], moments.shape)


def is_dense(stats: LayerStats) -> bool:
    """Whether the block itself is small, or smaller than its columns."""
    if stats.dim <= DENSE_DIM:
        return True
    in_block = stats.dim**2
    in_factors = _numbers(Columns(stats))
    in_gradients = _gradient_numbers(stats)
    return in_block <= min(in_factors, in_gradients)


def _numbers(moments: Moments) -> int:
    """Numbers held."""
    total = 0
    for x in moments.tensors().values():
        total += x.numel()
    return total


def _gradient_numbers(stats: LayerStats) -> int:
    """Numbers in the per-example gradients."""
    return stats.R * stats.N * stats.dim
