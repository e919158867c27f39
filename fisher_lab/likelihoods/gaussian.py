"""Gaussian likelihood with fixed variance: -log p = |z - y|^2 / (2 variance) + constant.

The Hessian in z is I / variance, its root has the columns e_c / sqrt(variance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisher_lab._ground.arguments import number
from fisher_lab.likelihoods.base import Likelihood, diagonal_factors


class Gaussian(Likelihood):
    """Labels y = z + noise, independent outputs of the given variance.

    Args:
        variance: variance of the noise, > 0.

    Raises:
        ValueError: if the variance is not positive and finite.
    """

    def __init__(self, variance: float = 1.0) -> None:
        if not 0 < number(variance) < math.inf:
            raise ValueError(
                f"Gaussian got variance={variance!r}, expected a positive finite number."
            )
        self.variance = float(variance)

    def factor(self, z: Tensor) -> Tensor:
        """S `[K, N, *output]`, K outputs per example."""
        root = torch.full_like(z, self.variance**-0.5)
        return diagonal_factors(root)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z + N(0, variance) `[N, *output]`."""
        deviation = math.sqrt(self.variance)
        noise = torch.empty_like(z).normal_(0.0, deviation, generator=generator)
        return z + noise

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Log density `[N]` of y `[N, *output]`."""
        residual = (z - y).flatten(1)
        K = residual.shape[1]
        constant = K * math.log(2 * math.pi * self.variance)
        squares = residual.square().sum(1)
        return -0.5 * (squares / self.variance + constant)

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance:g})"
