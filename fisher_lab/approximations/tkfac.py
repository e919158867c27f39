"""TKFAC: Gao et al. (2020), Theorem 4.1 and eqs. 4.4-4.9; for shared weights the surrogate under
their Assumption 4.1.

F ~ U1 (x) U2 / t: the Kronecker product with the same two partial traces as F (t = tr U1 = tr U2),
per group.

    full:    U1 = 1/N sum P P^T               U2 = 1/N sum P^T P
    expand:  U1 = 1/N sum_t |a|^2 g g^T       U2 = 1/N sum_t |g|^2 a a^T

"expand" takes positions as uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fisher_lab.approximations.base import Approximation, check_choice
from fisher_lab.approximations.moments import Moments
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class TKFAC(Approximation):
    """Trace-restricted KFAC.

    Exact wherever F is a Kronecker product. On a plain Linear layer it equals TN with two modes and
    keeps the trace.

    Args:
        spatial: for weights shared over positions. "expand" (the paper's) takes positions as
            uncorrelated and keeps the trace of that surrogate; "full" keeps the trace of F.

    State: d_out^2 + d_in^2. See also: TEKFAC, TN, KFAC.

    Example:
        >>> K = fl.estimate(fl.TKFAC(), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    spatial: Literal["expand", "full"] = "expand"

    def __post_init__(self) -> None:
        check_choice("TKFAC", "spatial", self.spatial, ("expand", "full"))

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """G and A."""
        return rows, math.prod(kernel) + bias

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """Partial traces U1 `[Q, d_out, d_out]` and U2 `[Q, d_in, d_in]`."""
        if self.spatial == "full" or sums.T == 1:
            U1 = sums.left()
            U2 = sums.right()
        else:
            U1, U2 = sums.uncorrelated()
        return {"U1": U1, "U2": U2}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """U1 (x) U2 / t."""
        U1 = moments["U1"]
        U2 = moments["U2"]
        # either factor may carry the trace; the inputs' gets trace 1
        return Kronecker((U1, unit_trace(U2)))


def unit_trace(M: Tensor) -> Tensor:
    """M / tr M for PSD matrices `[Q, n, n]`, or diagonals `[Q, n]`; zero where M is zero."""
    t = traces(M)
    t = t.view(-1, *[1] * (M.ndim - 1))
    one = torch.ones_like(t)
    safe = torch.where(t > 0, t, one)
    return M / safe


def traces(M: Tensor) -> Tensor:
    """Traces `[Q]` of `[Q, n, n]`, or of diagonals `[Q, n]`."""
    if M.ndim == 2:
        return M.sum(-1)
    diagonals = M.diagonal(dim1=-2, dim2=-1)
    return diagonals.sum(-1)
