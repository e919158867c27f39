"""Shampoo: Gupta, Koren & Singer (2018): F ~ c (x)_i U_i^(1/k), with U_i as in TN.

The preconditioner is F^(-1/2). With c = 1 the trace is too large (equal only for
rank-one factors); c = t / prod_i tr U_i^(1/k) matches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power
from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Moments
from fisher_lab.approximations.tkfac import traces
from fisher_lab.approximations.tn import covariances, mode_covariances, mode_sizes, with_bias
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class Shampoo(Approximation):
    """The matrix whose inverse square root Shampoo applies.

    Not exact even where F is a Kronecker product. Its trace-matched square is TN with two modes.

    Args:
        match_trace: scale to the trace of F (default) or leave c = 1, as the optimizer has it.

    State: sum of n_i^2. See also: TN, TKFAC.

    Example:
        >>> K = fl.estimate(fl.Shampoo(), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    match_trace: bool = True
    exponent = -0.5

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """One of every mode, and the block of the bias where it is apart."""
        return mode_sizes(rows, kernel, bias)

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """Mode covariances, as TN's."""
        return mode_covariances(sums)

    def assemble(self, moments: Moments) -> FisherMatrix:
        """Product of the k-th roots of the mode covariances."""
        modes = covariances(moments)
        exponent = 1 / len(modes)
        pairs = []
        for U in modes:
            values, vectors = eigh(U)
            n = values.shape[-1]
            roots = shifted_power(values, exponent, size=n)
            pairs.append((roots, vectors))
        if self.match_trace:
            t = traces(modes[0])
            c = _trace_scale(t, pairs)
            # one factor carries the scale of all
            roots, vectors = pairs[0]
            pairs[0] = (roots * c[:, None], vectors)
        product = Kronecker.of_eigenpairs(pairs, root=len(modes))
        return with_bias(product, moments)


def _trace_scale(t: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """c = t / prod_i tr U_i^(1/k) `[Q]`, zero where the product is.

    Args:
        t: traces `[Q]` of F.
        pairs: eigenvalues `[Q, n_i]` and eigenvectors of every root.
    """
    traces_of_roots = []
    for roots, _ in pairs:
        traces_of_roots.append(roots.sum(-1))
    product = torch.stack(traces_of_roots).prod(0)
    positive = product > 0
    safe = torch.where(positive, product, 1.0)
    zero = torch.zeros_like(t)
    return torch.where(positive, t / safe, zero)
