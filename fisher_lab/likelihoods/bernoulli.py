"""Bernoulli likelihood: independent binary outputs with logits z. Root: sqrt(p (1 - p)) e_c."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fisher_lab.likelihoods.base import Likelihood, diagonal_factors


class Bernoulli(Likelihood):
    """Labels y in [0, 1] (grey levels allowed), one per output, with probability sigmoid(z)."""

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
