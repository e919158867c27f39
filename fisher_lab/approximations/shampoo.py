"""Shampoo: Gupta, Koren & Singer (2018): F ~ c (x)_i U_i^(1/k), preconditioner F^(-1/2); U_i as in
TN.

With c = 1 the trace is too large (equal only for rank-one factors); c = t / prod_i tr U_i^(1/k)
matches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power
from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Moments
from fisher_lab.approximations.tkfac import traces
from fisher_lab.approximations.tn import covariances, mode_covariances, with_bias
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


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

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """Mode covariances, as TN's."""
        return mode_covariances(sums)

    def assemble(self, moments: Moments) -> FisherMatrix:
        """Product of the k-th roots of the mode covariances."""
        modes = covariances(moments)
        pairs = []
        for U in modes:
            values, vectors = eigh(U)
            roots = shifted_power(values, 1 / len(modes))
            pairs.append((roots, vectors))
        if self.match_trace:
            of_roots = torch.stack([roots.sum(-1) for roots, _ in pairs])  # [k, Q]
            c = _ratio(traces(modes[0]), of_roots.prod(0))
            roots, vectors = pairs[0]
            pairs[0] = (roots * c[:, None], vectors)
        return with_bias(Kronecker.of_eigenpairs(pairs), moments)


def _ratio(t: Tensor, product: Tensor) -> Tensor:
    """t / product, zero where the product is."""
    safe = torch.where(product > 0, product, 1.0)
    ratio = t / safe
    return torch.where(product > 0, ratio, torch.zeros_like(t))
