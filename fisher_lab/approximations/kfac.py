"""KFAC: Martens & Grosse (2015); convolutions, "expand": Grosse & Martens (2016); "reduce":
Eschenhagen et al. (2023).

F ~ G (x) A with, per group,

    expand:  A = 1/(N T) sum_{n,t} a a^T           G = 1/N sum_{r,n,t} g g^T
    reduce:  A = 1/N sum_n abar abar^T             G = 1/N sum_{r,n} (sum_t g)(sum_t g)^T

with abar the mean of a over the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fisher_lab.approximations.base import Approximation, check_choice
from fisher_lab.approximations.moments import Moments
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class KFAC(Approximation):
    """Kronecker product of the input and output-gradient second moments.

    Assumes inputs independent of output gradients. Exact for deep linear networks with squared
    error, and for one example without weight sharing. The trace is that of F minus the covariance
    of |a|^2 and |g|^2.

    Args:
        spatial: "expand" treats positions as examples (losses per position), "reduce" sums over
            them first (pooled losses); the same thing for one position.

    State: d_out^2 + d_in^2. See also: EKFAC, TKFAC, KPSVD.

    Example:
        >>> K = fl.estimate(fl.KFAC(), model, loss, (x, y))["0"]
        >>> [tuple(factor.shape) for factor in K.factors]
        [(1, 6, 6), (1, 9, 9)]
    """

    spatial: Literal["expand", "reduce"] = "expand"
    needs_factors = True

    def __post_init__(self) -> None:
        check_choice("KFAC", "spatial", self.spatial, ("expand", "reduce"))

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """G and A."""
        return rows, math.prod(kernel) + bias

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """A `[Q, d_in, d_in]` and G `[Q, d_out, d_out]`."""
        self.check_factors(sums)
        A, G = sums.factors(self.spatial)
        return {"A": A, "G": G}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """G (x) A."""
        return Kronecker((moments["G"], moments["A"]))
