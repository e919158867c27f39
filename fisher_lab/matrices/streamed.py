"""A block whose columns are never all in memory: F = 1/N sum over pieces of the data, read anew for
every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.matrices.base import FisherMatrix
from fisher_lab.matrices.dense import Dense
from fisher_lab.statistics import LayerStats, Sums, as_sums, contractions


@dataclass(frozen=True, eq=False)
class Streamed(FisherMatrix):
    """U U^T / N for columns U that come piece by piece.

    A product (with one or many X) is one pass over the pieces, the Frobenius norm one pass for each
    piece. Powers are those of the dense block, where that fits.

    Args:
        pieces: begins a pass; gives the layer's LayerStats over some examples at a time.
        N: number of examples in a pass.
        weight_shape: shape `(d_out, d_in)` of W.
        factor: what F is multiplied with, a scalar; pieces are brought to its type and device.
    """

    pieces: Callable[[], Iterator[LayerStats]]
    N: int
    weight_shape: tuple[int, int]
    factor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.weight_shape

    def parts(self) -> Iterator[tuple[LayerStats, Tensor]]:
        """One pass: pieces, and what the block of each is multiplied with in the sum that is F."""
        for piece in self.pieces():
            if piece.g.dtype != self.factor.dtype or piece.g.device != self.factor.device:
                a = None if piece.a is None else piece.a.to(self.factor)
                piece = piece.like(a, piece.g.to(self.factor))
            yield piece, self.factor * (piece.N / self.N)

    def _apply(self, X: Tensor) -> Tensor:
        total = torch.zeros_like(X)
        for piece, weight in self.parts():
            total += weight * contractions.apply(piece, X)
        return total

    def trace(self) -> Tensor:
        """Mean squared norm of the columns."""
        return self._sum(lambda piece: contractions.squares(piece).sum())

    def frobenius_norm(self) -> Tensor:
        """From the inner products of all pairs of pieces, once."""
        return self._norm

    @cached_property
    def _norm(self) -> Tensor:
        total = self.factor.new_zeros(())
        for i, (mine, weight) in enumerate(self.parts()):
            for j, (theirs, other) in enumerate(self.parts()):
                if j == i:
                    total = total + weight * other * contractions.overlap(mine, mine)
                elif j > i:  # for the pair across the diagonal, too
                    total = total + 2 * weight * other * contractions.overlap(mine, theirs)
        return total.sqrt()

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """<F, self>, in one pass."""
        columns = as_sums(stats).stats
        return self._sum(lambda piece: contractions.overlap(piece, columns))

    @property
    def shares_products(self) -> bool:
        """Every product is a pass over the pieces."""
        return True

    def _inner_by_columns(self, other: FisherMatrix) -> Tensor:
        """In one pass."""
        return self._sum(other.quadratic)

    def _sum(self, of_piece: Callable[[LayerStats], Tensor]) -> Tensor:
        """The weighted sum of a scalar of every piece."""
        return torch.stack([weight * of_piece(piece) for piece, weight in self.parts()]).sum()

    def scaled(self, c: float | Tensor) -> Streamed:
        """c times the factor."""
        return replace(self, factor=self.factor * c)

    @property
    def signature(self) -> None:
        """It stays alone: its columns are its own."""
        return None

    def rescued(self, p: float, damping: float | Tensor) -> FisherMatrix:
        """Of the dense matrix."""
        return Dense(self.dense(), self.shape).rescued(p, damping)

    def _dense(self) -> Tensor:
        total = self.factor.new_zeros(self.dim, self.dim)
        for piece, weight in self.parts():
            total += weight * contractions.dense(piece)
        return total

    def _powered(self, p: float, damping: float | Tensor) -> FisherMatrix:
        return Dense(self.dense(), self.shape)._powered(p, damping)
