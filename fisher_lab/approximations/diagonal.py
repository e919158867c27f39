"""Diagonal: Becker & LeCun (1988), the diagonal of the Gauss-Newton matrix, here of F:
s = 1/N sum P^2 (elementwise).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Moments
from fisher_lab.matrices import DiagonalMatrix, FisherMatrix
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class Diagonal(Approximation):
    """Keeps the diagonal, and so the trace, of F.

    State: d_out d_in. See also: MiniBlock, LNGD.

    Example:
        >>> K = fl.estimate(fl.Diagonal(), model, loss, (x, y))["0"]
        >>> torch.allclose(K.values.flatten(), exact.dense().diag())
        True
    """

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """The diagonal in the shape of W."""
        return {"squares": sums.squares().flatten(0, 1)}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """The diagonal as a matrix."""
        return DiagonalMatrix(moments["squares"])
