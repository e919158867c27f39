"""Gaussian likelihood with fixed variance: -log p = |z - y|^2 / (2 variance) + constant.

The Hessian in z is I / variance, its root has the columns e_c / sqrt(variance). Where the model
gives the variance v too, -log p = ((m - y)^2 / v + log v) / 2 + constant; the expectation of its
Hessian over labels is 1 / v in the mean m, 1 / (2 v^2) in v, and 0 between them.
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

    Example:
        >>> likelihood = fl.Gaussian(variance=2.0)
        >>> z, y = torch.randn(5, 3), torch.randn(5, 3)
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
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


class GaussianVariance(Likelihood):
    """Labels y = mean + noise, whose variance is an output too.

    The outputs are z `[N, 2, *label]`, the means z[:, 0] and the variances z[:, 1].

    Args:
        eps: smallest variance; the derivative is handed through, as torch does.

    Example:
        >>> z = torch.stack([torch.zeros(5), torch.ones(5)], dim=1)  # means, variances
        >>> fl.likelihoods.GaussianVariance().log_prob(z, torch.zeros(5)).shape
        torch.Size([5])
    """

    def __init__(self, eps: float = 1e-6) -> None:
        self.eps = eps

    def factor(self, z: Tensor) -> Tensor:
        """S `[2 K, N, 2, *label]`, K labels per example."""
        _, v = self._parts(z)
        # roots of 1 / v and of 1 / (2 v^2)
        of_mean = v.rsqrt()
        of_variance = math.sqrt(0.5) / v
        root = torch.stack([of_mean, of_variance], 1)
        return diagonal_factors(root)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """mean + N(0, variance) `[N, *label]`."""
        mean, v = self._parts(z)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + v.sqrt() * noise

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Log density `[N]` of y `[N, *label]`, or `[N, 1, *label]`."""
        mean, v = self._parts(z)
        residual = mean - y.reshape(mean.shape)
        squares = residual.square() / v
        constant = math.log(2 * math.pi)
        terms = squares + v.log() + constant
        terms = terms.reshape(len(z), -1)
        return -0.5 * terms.sum(1)

    def check_output(self, z: Tensor) -> None:
        """Two outputs, one behind the other in dimension 1."""
        if isinstance(z, tuple | list):
            raise TypeError(
                f"The model returned {len(z)} outputs, but {self.name} expects one tensor "
                "[N, 2, *label], means and variances; pass output=lambda z: torch.stack(z, 1), or "
                "let the model stack them."
            )
        super().check_output(z)
        if z.shape[1] != 2:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)}, but {self.name} expects "
                "[N, 2, *label], means z[:, 0] and variances z[:, 1]; stack them in dimension 1."
            )

    def check_values(self, z: Tensor) -> None:
        """Variances are not negative."""
        least = float(z[:, 1].detach().min())
        if not least >= 0:
            raise ValueError(
                f"{self.name} got variances down to {least:g}, expected >= 0; end that output of "
                "the model with a softplus or exp."
            )

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """One per pair of mean and variance, finite."""
        mean = z[:, 0]
        if tuple(y.shape) == (len(z), 1, *mean.shape[1:]):
            mean = z[:, :1]
        super().check_labels(mean, y)

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances `[N, *label]`, the variances at least eps."""
        mean = z[:, 0]
        v = z[:, 1]
        fixed = v.detach()
        # a number without a derivative, so that what is raised keeps that of v
        raised = fixed.clamp_min(self.eps) - fixed
        return mean, v + raised
