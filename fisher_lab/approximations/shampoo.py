"""Shampoo: Gupta, Koren & Singer (2018): F ~ c (x)_i U_i^(1/k), preconditioner F^(-1/2); U_i as in TN.

With c = 1 the trace is too large (equal only for rank-one factors); c = t / prod_i tr U_i^(1/k) matches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisher_lab._ground.linalg import eigh, shifted_power
from fisher_lab.approximations.base import Approximation, Moments
from fisher_lab.approximations.tn import covariances, mode_covariances, with_bias
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats


@dataclass(frozen=True)
class Shampoo(Approximation):
    """The matrix whose inverse square root Shampoo applies.

    Not exact even where F is a Kronecker product. Its trace-matched square is TN with two modes.

    Args:
        match_trace: scale to the trace of F (default) or leave c = 1, as the optimizer has it.

    State: sum of n_i^2. See also: TN, TKFAC.
    """

    match_trace: bool = True
    exponent = -0.5

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """Mode covariances, as TN's."""
        return mode_covariances(stats)

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """Product of the k-th roots of the mode covariances."""
        modes = covariances(moments)
        pairs = [(shifted_power(values, 1 / len(modes)), vectors) for values, vectors in map(eigh, modes)]
        if self.match_trace:
            t = _trace(modes[0])
            product = torch.stack([roots.sum(-1) for roots, _ in pairs]).prod(0)
            c = torch.where(product > 0, t / torch.where(product > 0, product, 1.0), torch.zeros_like(t))
            pairs[0] = pairs[0][0] * c[:, None], pairs[0][1]
        return with_bias(Kronecker.of_eigenpairs(pairs), moments)


def _trace(U: torch.Tensor) -> torch.Tensor:
    return U.diagonal(dim1=-2, dim2=-1).sum(-1)
