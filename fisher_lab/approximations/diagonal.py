"""Diagonal: the diagonal of F, s = 1/N sum P^2 (elementwise)."""

from __future__ import annotations

from dataclasses import dataclass

from fisher_lab.approximations.base import Approximation, Moments
from fisher_lab.matrices import DiagonalMatrix, FisherMatrix
from fisher_lab.statistics import LayerStats


@dataclass(frozen=True)
class Diagonal(Approximation):
    """Keeps the diagonal, and so the trace, of F.

    State: d_out d_in. See also: MiniBlock, LNGD.
    """

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """The diagonal in the shape of W."""
        return {"squares": stats.squares().flatten(0, 1)}

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """The diagonal as a matrix."""
        return DiagonalMatrix(moments["squares"])
