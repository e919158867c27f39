"""TENGraD: Soori et al. (2022): the exact block F_B of one batch, inverted by Woodbury's identity.

As a measure, its error is what sub-sampling the examples costs. In a trainer, examples that are not
kept leave directions in which only the damping bounds a step; it warns where there are any.

For shared weights the authors' "reduce_sum" replaces inputs and gradients by their sums over
positions, which is T^2 too large where inputs are equal; "reduce_mean" takes the mean of the
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisher_lab._ground.arguments import is_whole
from fisher_lab.approximations.base import Approximation, check_choice
from fisher_lab.approximations.moments import Columns, Moments
from fisher_lab.matrices import FisherMatrix, LowRank
from fisher_lab.statistics import LayerStats, Sums


@dataclass(frozen=True)
class TENGraD(Approximation):
    """The block of the first `batch` examples, kept as its columns.

    Exact on its own batch (spatial="exact"), of rank at most R * batch.

    Args:
        batch: most examples kept: the first of a running mean; of a moving average drawn in
            proportion to their weights, so that the block is right in expectation.
        spatial: "exact", "reduce_sum" (the authors' option) or "reduce_mean".

    Raises:
        ValueError: if batch < 1.

    State: R batch d_out + batch d_in. See also: Exact.

    Example:
        >>> K = fl.estimate(fl.TENGraD(batch=10), model, loss, (x, y))["0"]
        >>> K.shape
        (6, 9)
    """

    batch: int = 128
    spatial: Literal["exact", "reduce_sum", "reduce_mean"] = "exact"

    def __post_init__(self) -> None:
        check_choice("TENGraD", "spatial", self.spatial, ("exact", "reduce_sum", "reduce_mean"))
        if not is_whole(self.batch, 1):
            raise ValueError(
                f"TENGraD got batch={self.batch!r}, expected a whole number of examples, 1 or more."
            )

    def is_exact_of(self, N: int) -> bool:
        """Of no more than it keeps."""
        return self.spatial == "exact" and self.batch >= N

    def moments(self, sums: Sums) -> Columns:
        """The columns of the first examples."""
        stats = sums.stats.examples(slice(0, self.batch))
        if self.spatial != "exact" and not stats.rank_one and stats.a is not None:
            stats = self._over_positions(stats)
        return Columns(stats, most=self.batch)

    def _over_positions(self, stats: LayerStats) -> LayerStats:
        """One position: the sum of the gradients, and the sum or the mean of the inputs."""
        a, g = stats.factors()
        if self.spatial == "reduce_sum":
            a = a.sum(1, keepdim=True)
        else:
            a = a.mean(1, keepdim=True)
        return stats.like(a, g.sum(2, keepdim=True))

    def assemble(self, moments: Moments) -> FisherMatrix:
        """The columns as a matrix."""
        assert isinstance(moments, Columns)
        return LowRank(Sums(moments.weighted()))
