"""The likelihood behind Huber's loss (Huber, 1964): Gaussian in the middle, exponential tails.

With r = y - z, precision s and threshold delta,

    -log p = s r^2 / 2                          + log Z   where |r| < delta
             s delta (|r| - delta / 2)          + log Z   elsewhere,
    Z      = sqrt(2 pi / s) erf(delta sqrt(s / 2)) + 2 / (s delta) exp(-s delta^2 / 2).

The Hessian in z is s in the middle and 0 in the tails; its expectation over labels is s P with
P the probability of the middle, the first term of Z over Z. It does not depend on z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.arguments import number
from fisher_lab.likelihoods.base import Likelihood, diagonal_factors


class Huber(Likelihood):
    """Labels y = z + noise, independent outputs, whose noise is Gaussian up to a threshold.

    Args:
        delta: the threshold, > 0.
        precision: second derivative of -log p in the middle, > 0.

    Raises:
        ValueError: for other numbers.

    Example:
        >>> likelihood = fl.likelihoods.Huber(delta=0.5)
        >>> z, y = torch.randn(5, 3), torch.randn(5, 3)
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(self, delta: float = 1.0, precision: float = 1.0) -> None:
        for name, value in (("delta", delta), ("precision", precision)):
            if not 0 < number(value) < math.inf:
                raise ValueError(f"Got {name}={value!r}, expected a finite number > 0.")
        self.delta = delta
        self.precision = precision
        s = precision
        # how much of a Gaussian of variance 1 / s lies in the middle
        self._inside = math.erf(delta * math.sqrt(s / 2))
        middle = math.sqrt(2 * math.pi / s) * self._inside
        height = math.exp(-s * delta**2 / 2)  # of the density where the tails begin
        tails = 2 / (s * delta) * height
        Z = middle + tails
        self._log_normaliser = math.log(Z)
        self.middle = middle / Z

    def factor(self, z: Tensor) -> Tensor:
        """S `[K, N, *output]`, K outputs per example."""
        second_derivative = self.precision * self.middle
        root = torch.full_like(z, math.sqrt(second_derivative))
        return diagonal_factors(root)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z + noise `[N, *output]`."""
        s = self.precision
        like: Any = {"dtype": z.dtype, "device": z.device}
        choice = torch.rand(z.shape, generator=generator, **like)
        place = torch.rand(z.shape, generator=generator, **like)
        signed = 2 * place - 1
        # the middle by the inverse of its distribution function
        scale = math.sqrt(2 / s)
        middle = scale * torch.erfinv(signed * self._inside)
        # a tail begins at delta and falls as exp(-s delta |r|); the sign is that of the place
        length = torch.empty_like(z).exponential_(generator=generator)
        distance = self.delta + length / (s * self.delta)
        tail = signed.sign() * distance
        noise = torch.where(choice < self.middle, middle, tail)
        return z + noise

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Log density `[N]` of y `[N, *output]`."""
        distance = (y - z).abs()
        square = 0.5 * distance.square()
        linear = self.delta * (distance - 0.5 * self.delta)
        in_middle = distance < self.delta
        loss = torch.where(in_middle, square, linear)
        terms = -self.precision * loss - self._log_normaliser
        return terms.flatten(1).sum(1)

    def __repr__(self) -> str:
        return f"Huber(delta={self.delta:g}, precision={self.precision:g})"
