"""Averages of moments: the mean over examples, and the moving average over observations of unequal size.

After observations of n_1, ..., n_k examples (mean size m = (n_1 + ... + n_k) / k) the newest weighs

    1 - min(1 - n_k / (n_1 + ... + n_k),  rho^(n_k / m))

All examples count alike at first; later an observation of mean size leaves rho of what was there, and one of twice that
size as much as two of them. For equal sizes this is the rule of George et al. (2018) and Martens & Grosse (2015), whose
k-th observation weighs 1 - min(1 - 1/k, rho).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisher_lab.approximations import Approximation

Moments = Any


@dataclass
class Mean:
    """The mean of moments over all examples seen.

    Attributes:
        moments: None before the first examples.
        examples: how many; a 0-d tensor where only finite ones count.
    """

    moments: Moments | None = None
    examples: float | Tensor = 0

    def add(self, approximation: Approximation, new: Moments, examples: float | Tensor) -> None:
        """Add the mean over some more examples.

        Args:
            approximation: whose moments these are.
            new: their mean.
            examples: how many.
        """
        self.examples = self.examples + examples
        if self.moments is None:
            self.moments = new
            return
        total = self.examples
        if isinstance(total, Tensor):
            total = total.clamp(min=1)  # none was finite so far
        self.moments = approximation.average(self.moments, new, examples / total)


@dataclass
class Average:
    """The moving average of moments over observations, each the mean over its examples; nothing waits for the device.

    Attributes:
        moments: None before the first observation.
        count: observations with finite examples, a 0-d tensor; None before the first.
        size: mean number of examples of these, a 0-d tensor; 0 if unknown, which is taken as that of the next one.
    """

    moments: Moments | None = None
    count: Tensor | None = None
    size: Tensor | None = None

    def joined(self, approximation: Approximation, newest: Mean, decay: float) -> Moments | None:
        """The moments with one more observation, which may still grow.

        Args:
            approximation: whose moments these are.
            newest: the observation.
            decay: rho.
        """
        if self.moments is None:
            return newest.moments
        if newest.moments is None:
            return self.moments
        return approximation.average(self.moments, newest.moments, self.weight(newest, decay))

    def weight(self, newest: Mean, decay: float) -> Tensor:
        """Weight of the newest observation, a 0-d tensor; 0 for one without finite examples."""
        n = torch.as_tensor(newest.examples)
        count, size = self._known(n)
        ratio = torch.where(size > 0, n / size.clamp(min=1), 1.0)
        share = ratio / (count + ratio)
        left = torch.pow(decay, n / self._mean_size(n))
        return torch.where(n > 0, 1 - torch.minimum(1 - share, left), 0.0)

    def followed_by(self, newest: Mean, moments: Moments | None) -> Average:
        """What the next observation finds.

        Args:
            newest: the observation that is complete now.
            moments: those with it.
        """
        if newest.moments is None:
            return replace(self, moments=moments)
        n = torch.as_tensor(newest.examples)
        count, size = self._known(n)
        finite = n > 0
        return Average(moments, count + finite, torch.where(finite, self._mean_size(n), size))

    def settled(self, decay: float) -> Average:
        """Count what was seen as so many observations that the next one, of whatever size, weighs 1 - rho."""
        if self.count is None or self.size is None:
            return self
        many = torch.full_like(self.count, 1 / max(1 - decay, 1e-9))
        return Average(self.moments, torch.where(self.count > 0, many, 0.0), torch.zeros_like(self.size))

    def _known(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Count and size, zeros like n before the first observation."""
        zero = torch.zeros_like(n)
        count = zero if self.count is None else self.count
        size = zero if self.size is None else self.size
        return count, size

    def _mean_size(self, n: Tensor) -> Tensor:
        """Mean size of the observations, one of n examples included."""
        count, size = self._known(n)
        # written as a change, which is exactly zero for equal sizes
        return torch.where(size > 0, size + (n - size) / (count + 1), n)
