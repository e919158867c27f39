"""KFAC: Martens & Grosse (2015); convolutions, "expand": Grosse & Martens (2016); "reduce": Eschenhagen et al. (2023).

F ~ G (x) A with, per group,

    expand:  A = 1/(N T) sum_{n,t} a a^T           G = 1/N sum_{r,n,t} g g^T
    reduce:  A = 1/N sum_n abar abar^T             G = 1/N sum_{r,n} (sum_t g)(sum_t g)^T

with abar the mean of a over the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisher_lab.approximations.base import Approximation, Moments, check_choice
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats
from fisher_lab.statistics.contractions import second_moment


@dataclass(frozen=True)
class KFAC(Approximation):
    """Kronecker product of the input and output-gradient second moments.

    Assumes inputs independent of output gradients. Exact for deep linear networks with squared error, and for one
    example without weight sharing. The trace is that of F minus the covariance of |a|^2 and |g|^2.

    Args:
        spatial: "expand" treats positions as examples (losses per position), "reduce" sums over them first (pooled
            losses); the same thing for one position.

    State: d_out^2 + d_in^2. See also: EKFAC, TKFAC, KPSVD.
    """

    spatial: Literal["expand", "reduce"] = "expand"
    needs_factors = True

    def __post_init__(self) -> None:
        check_choice("KFAC", "spatial", self.spatial, ("expand", "reduce"))

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """A `[Q, d_in, d_in]` and G `[Q, d_out, d_out]`."""
        self.check_factors(stats)
        return dict(stats.shared(f"KFAC {self.spatial}", lambda: self._factors(stats)))

    def _factors(self, stats: LayerStats) -> Moments:
        a, g = self.check_factors(stats), stats.g
        if self.spatial == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        return {"A": second_moment(a, a.shape[0] * a.shape[1]), "G": second_moment(g, stats.N)}

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """G (x) A."""
        return Kronecker((moments["G"], moments["A"]))
