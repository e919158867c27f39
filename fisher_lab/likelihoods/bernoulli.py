"""Bernoulli likelihood: independent binary outputs, given by their logits or probabilities.

With logits the Hessian in z is p (1 - p), its root sqrt(p (1 - p)) e_c. With probabilities it is
y / p^2 + (1 - y) / (1 - p)^2, whose expectation over labels is 1 / (p (1 - p)).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from fisher_lab.likelihoods.base import Likelihood, diagonal_factors

# torch divides by no less in the derivative of its binary cross-entropy
LEAST_VARIANCE = 1e-12


class Bernoulli(Likelihood):
    """Labels y in [0, 1] (grey levels allowed), one per output, with probability sigmoid(z).

    Example:
        >>> likelihood = fl.Bernoulli()
        >>> z, y = torch.randn(5, 3), torch.ones(5, 3)
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def factor(self, z: Tensor) -> Tensor:
        """S `[K, N, *output]`, K outputs per example."""
        p = z.sigmoid()
        variance = p * (1 - p)
        return diagonal_factors(variance.sqrt())

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones `[N, *output]`."""
        # in bfloat16 uniform numbers would be multiples of 1/256
        wide = torch.promote_types(z.dtype, torch.float32)
        uniform = torch.rand(z.shape, generator=generator, dtype=wide, device=z.device)
        p = z.to(wide).sigmoid()
        # a third of the time of torch.bernoulli
        ones = uniform < p
        return ones.to(z.dtype)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p `[N]` of y `[N, *output]`, summed over the outputs."""
        terms = binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")
        return -terms.flatten(1).sum(1)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Same shape as z, values in [0, 1]."""
        super().check_labels(z, y)
        if y.numel() == 0:  # which has no least and no largest label to name
            return
        inside = (y >= 0) & (y <= 1)
        if not bool(inside.all()):
            raise ValueError(
                f"{self.name} got labels from {float(y.min()):g} to {float(y.max()):g}, expected "
                "values in [0, 1]; rescale the labels."
            )


class BernoulliProbability(Bernoulli):
    """Labels y in [0, 1], one per output, with probability z: the model ends with its own
    sigmoid.

    Example:
        >>> likelihood = fl.likelihoods.BernoulliProbability()
        >>> z, y = torch.rand(5, 3), torch.ones(5, 3)
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def factor(self, z: Tensor) -> Tensor:
        """S `[K, N, *output]`, K outputs per example."""
        variance = z * (1 - z)
        # 1 / sqrt(variance), and 0 where the model is sure: its sigmoid's derivative is 0 there
        root = variance.sqrt() / variance.clamp_min(LEAST_VARIANCE)
        return diagonal_factors(root)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones `[N, *output]`."""
        wide = torch.promote_types(z.dtype, torch.float32)
        uniform = torch.rand(z.shape, generator=generator, dtype=wide, device=z.device)
        ones = uniform < z.to(wide)
        return ones.to(z.dtype)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p `[N]` of y `[N, *output]`, summed over the outputs."""
        terms = binary_cross_entropy(z, y.to(z.dtype), reduction="none")
        return -terms.flatten(1).sum(1)

    def check_values(self, z: Tensor) -> None:
        """Probabilities."""
        low, high = z.detach().aminmax()
        inside = (low >= 0) & (high <= 1)  # not with NaN
        if not bool(inside):
            raise ValueError(
                f"{self.name} got outputs from {float(low):g} to {float(high):g}, expected "
                "probabilities in [0, 1]; end the model with a sigmoid, or use BCEWithLogitsLoss."
            )
