"""The exact block itself: F = 1/N sum vec(P) vec(P)^T, held densely or as its columns, whichever is smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fisher_lab.approximations import columns
from fisher_lab.approximations.base import Approximation, Moments
from fisher_lab.matrices import Dense, FisherMatrix, LowRank
from fisher_lab.statistics import LayerStats

DENSE_DIM = 600  # up to this d a dense block is cheaper than anything else


@dataclass(frozen=True)
class Exact(Approximation):
    """The full block of a layer, no approximation.

    State: d^2 numbers, or the columns (R N d_out + N d_in) where these are fewer.
    See also: TENGraD, the block of a sub-sample.
    """

    keeps_examples = math.inf
    listed = False

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """The block where it is small, otherwise the columns."""
        if is_dense(stats):
            return _shaped(stats.dense(), stats.shape)
        kept = columns.keep(stats)
        return {"g": stats.gradients()} if stats.R * stats.N * stats.dim < columns.size(kept) else kept

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """Dense or LowRank."""
        if "block" in moments:
            block = moments["block"]
            return Dense(block.flatten(2).flatten(0, 1), (block.shape[0], block.shape[1]))
        return LowRank(columns.to_stats(moments))

    def average(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """Linear mix of blocks, or weighted concatenation of columns until the block is smaller."""
        if "block" not in old and "block" not in new:
            mixed = columns.mix(old, new, weight)
            if columns.size(mixed) < columns.to_stats(new).dim ** 2:
                return mixed
        return super().average(_block(old), _block(new), weight)


def is_dense(stats: LayerStats) -> bool:
    """Whether the block itself is small, or smaller than its columns."""
    return stats.dim <= DENSE_DIM or stats.dim**2 <= min(
        columns.size(columns.keep(stats)), stats.R * stats.N * stats.dim
    )


def _shaped(block: Tensor, shape: tuple[int, int]) -> Moments:
    """A block `[d, d]` as `[d_out, d_in, d_out, d_in]`, which remembers the shape of W."""
    return {"block": block.view(*shape, *shape)}


def _block(moments: Moments) -> Moments:
    if "block" in moments:
        return moments
    stats = columns.to_stats(moments)
    return _shaped(stats.dense(), stats.shape)
