"""Poisson likelihood of counts: -log p = rate - y log(rate) + log y!.

With z = log(rate) the Hessian in z is the rate. With z the rate itself it is y / rate^2, whose
expectation over counts is 1 / rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_lab.likelihoods.base import Likelihood, diagonal_factors


class Poisson(Likelihood):
    """Counts y, one per output, with rate exp(z), or with rate z + eps.

    Args:
        log_rate: whether z is the logarithm of the rate.
        eps: added to the rate where it is not.

    Example:
        >>> likelihood = fl.likelihoods.Poisson()
        >>> z, y = torch.randn(5, 3), torch.ones(5, 3)
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(self, log_rate: bool = True, eps: float = 0.0) -> None:
        self.log_rate = log_rate
        self.eps = eps

    def rate(self, z: Tensor) -> Tensor:
        """Expected counts `[N, *output]`."""
        if self.log_rate:
            return z.exp()
        return z + self.eps

    def factor(self, z: Tensor) -> Tensor:
        """S `[K, N, *output]`, K outputs per example."""
        if self.log_rate:
            root = (z / 2).exp()  # of the rate, which itself may overflow
        else:
            root = self.rate(z).rsqrt()
        return diagonal_factors(root)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts `[N, *output]`, in the type of z."""
        return torch.poisson(self.rate(z), generator=generator)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p `[N]` of y `[N, *output]`, summed over the outputs."""
        rate = self.rate(z)
        log_rate = z
        if not self.log_rate:
            log_rate = rate.log()
        log_factorial = torch.lgamma(y + 1)
        terms = y * log_rate - rate - log_factorial
        return terms.flatten(1).sum(1)

    def check_values(self, z: Tensor) -> None:
        """Rates are not negative."""
        if not self.log_rate and bool((z < 0).any()):
            raise ValueError(
                f"{self.name} got rates down to {float(z.detach().min()):g}, expected >= 0; end "
                "the model with a softplus or exp, or let its output be the logarithm of the rate."
            )

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Same shape as z, not negative."""
        super().check_labels(z, y)
        if bool((y < 0).any()):
            raise ValueError(
                f"{self.name} got labels down to {float(y.min()):g}, expected counts >= 0; check "
                "the labels."
            )

    def __repr__(self) -> str:
        return f"Poisson(log_rate={self.log_rate})"
