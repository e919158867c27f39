"""TENGraD: Soori et al. (2022): the exact block F_B of one batch, inverted by Woodbury's identity.

As a measure, its error is what sub-sampling the examples costs. For shared weights the authors' "reduce_sum" replaces
inputs and gradients by their sums over positions, which is T^2 too large where inputs are equal; "reduce_mean" takes
the mean of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fisher_lab._ground.arguments import is_whole
from fisher_lab.approximations import columns
from fisher_lab.approximations.base import Approximation, Moments, check_choice
from fisher_lab.matrices import FisherMatrix, LowRank
from fisher_lab.statistics import LayerStats


@dataclass(frozen=True)
class TENGraD(Approximation):
    """The block of the first `batch` examples, kept as its columns.

    Exact on its own batch (spatial="exact"), of rank at most R * batch.

    Args:
        batch: most examples kept; the first of a running mean, the newest of a moving average.
        spatial: "exact", "reduce_sum" (the authors' option) or "reduce_mean".

    Raises:
        ValueError: if batch < 1.

    State: R batch d_out + batch d_in. See also: Exact.
    """

    batch: int = 128
    spatial: Literal["exact", "reduce_sum", "reduce_mean"] = "exact"

    def __post_init__(self) -> None:
        check_choice("TENGraD", "spatial", self.spatial, ("exact", "reduce_sum", "reduce_mean"))
        if not is_whole(self.batch, 1):
            raise ValueError(f"TENGraD got batch={self.batch!r}, expected a whole number of examples, 1 or more.")

    @property
    def keeps_examples(self) -> float:  # type: ignore[override]
        """The first ones; their sums or means over positions are small."""
        return self.batch if self.spatial == "exact" else 0

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """The columns of the first examples."""
        stats = stats.examples(slice(0, self.batch))
        if self.spatial != "exact" and stats.a is not None and stats.T > 1:
            a = stats.a.sum(1, keepdim=True) if self.spatial == "reduce_sum" else stats.a.mean(1, keepdim=True)
            stats = stats.like(a, stats.g.sum(2, keepdim=True))
        return columns.keep(stats)

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """The columns as a matrix."""
        return LowRank(columns.to_stats(moments))

    def average(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """Weighted concatenation, capped at `batch` examples."""
        return columns.trim(columns.mix(old, new, weight), self.batch)

    def follow(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """The newest `batch` examples: heavier than every new one, older ones would else stay for ever."""
        return columns.trim(columns.mix(old, new, weight), self.batch, newest=True)
