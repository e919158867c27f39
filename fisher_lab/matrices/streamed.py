"""A block whose columns are never all in memory: pieces of the data are read anew each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.matrices.base import AnyStats, FisherMatrix, Scalar, checked_scalar
from fisher_lab.matrices.in_passes import InPasses
from fisher_lab.statistics import LayerStats, as_sums, contractions


@dataclass(frozen=True, eq=False, repr=False)
class Streamed(InPasses):
    """U U^T / N for columns U that come piece by piece.

    A product (with one or many X) is one pass over the pieces, the Frobenius norm one pass for each
    piece. Powers are those of the dense block, where that fits.

    Args:
        pieces: begins a pass; gives the layer's LayerStats over some examples at a time.
        N: number of examples in a pass.
        weight_shape: shape `(d_out, d_in)` of W.
        factor: what F is multiplied with, a scalar; pieces are brought to its type and device.

    Example:
        >>> stats = fl.LayerStats(a=torch.ones(10, 1, 1, 3), g=torch.ones(1, 10, 1, 1, 2))
        >>> F = fl.matrices.Streamed(lambda: iter([stats]), 10, (2, 3), torch.tensor(1.0))
        >>> F.shape
        (2, 3)
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
            share = piece.N / self.N
            yield self._brought(piece), self.factor * share

    def _brought(self, piece: LayerStats) -> LayerStats:
        """A piece in the type and on the device of this matrix."""
        here = self.factor
        if piece.g.dtype == here.dtype and piece.g.device == here.device:
            return piece
        a = piece.a
        if a is not None:
            a = a.to(here)
        g = piece.g.to(here)
        return piece.like(a, g)

    def _apply(self, X: Tensor) -> Tensor:
        total = torch.zeros_like(X)
        for piece, weight in self.parts():
            image = contractions.apply(piece, X)
            total += weight * image
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
                if j < i:  # counted already
                    continue
                if j == i:
                    theirs = mine
                times = 1 if j == i else 2  # the pair across the diagonal is the same
                product = contractions.overlap(mine, theirs)
                total = total + times * weight * other * product
        return total.sqrt()

    def quadratic(self, stats: AnyStats) -> Tensor:
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
        terms = []
        for piece, weight in self.parts():
            terms.append(weight * of_piece(piece))
        return torch.stack(terms).sum()

    def scaled(self, c: Scalar) -> Streamed:
        """c times the factor."""
        c = checked_scalar(c, "factor", self)
        return replace(self, factor=self.factor * c)

    def _dense(self) -> Tensor:
        total = self.factor.new_zeros(self.dim, self.dim)
        for piece, weight in self.parts():
            block = contractions.dense(piece)
            total += weight * block
        return total
