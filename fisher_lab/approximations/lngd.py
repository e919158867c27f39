"""LNGD: Liu et al. (2024), layer-wise natural gradient: F ~ diag(U1) (x) U2 / t, with U1, U2, t as
in TKFAC.

The paper samples gradients at the layer; measured here is its structure, from the layer's true
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Moments
from fisher_lab.approximations.tkfac import unit_trace
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class LNGD(Approximation):
    """TKFAC with the output factor cut to its diagonal; keeps the trace of F.

    State: d_out + d_in^2. See also: TKFAC, MiniBlock (its blocks contain LNGD's).

    Example:
        >>> K = fl.estimate(fl.LNGD(), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """A alone: the other factor is a diagonal."""
        return (math.prod(kernel) + bias,)

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """diag U1 `[Q, d_out]` and U2 `[Q, d_in, d_in]`."""
        diagonal = sums.squares()
        u1 = diagonal.sum(-1)
        U2 = sums.right()
        return {"u1": u1, "U2": U2}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """diag(U1) (x) U2 / t."""
        u1 = moments["u1"]
        U2 = moments["U2"]
        return Kronecker((u1, unit_trace(U2)))
