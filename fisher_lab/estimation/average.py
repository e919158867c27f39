"""Averages of moments: the mean over examples, and the moving average over observations of unequal
size.

After observations of n_1, ..., n_k examples (mean size m = (n_1 + ... + n_k) / k) the newest weighs

    1 - min(1 - n_k / (n_1 + ... + n_k),  rho^(n_k / m))

All examples count alike at first; later an observation of mean size leaves rho of what was there,
and one of twice that size as much as two of them. For equal sizes this is the rule of George et al.
(2018) and Martens & Grosse (2015), whose k-th observation weighs 1 - min(1 - 1/k, rho).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.approximations import Moments


@dataclass
class Mean:
    """The mean of moments over all examples seen.

    Attributes:
        moments: None before the first examples.
        examples: how many; a 0-d tensor where only finite ones count.
    """

    moments: Moments | None = None
    examples: float | Tensor = 0

    def add(self, new: Moments, examples: float | Tensor) -> None:
        """Add the mean over some more examples.

        Args:
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
        weight = examples / total
        self.moments = self.moments.mix(new, weight)


@dataclass
class Average:
    """The moving average of moments over observations, each the mean over its examples; nothing
    waits for the device.

    Attributes:
        moments: None before the first observation.
        count: observations with finite examples, a 0-d tensor; None before the first observation.
        size: mean number of examples of these, a 0-d tensor; 0 if unknown, which is taken as that
            of the next one.
    """

    moments: Moments | None = None
    count: Tensor | None = None
    size: Tensor | None = None

    def followed_by(self, newest: Mean, decay: float) -> Average:
        """The average with one more observation; one without finite examples changes nothing.

        Args:
            newest: the observation, its number of examples a tensor.
            decay: rho.
        """
        n = torch.as_tensor(newest.examples)
        count, size = self.counted(n)
        moments = newest.moments
        if self.moments is None or moments is None or self.count is None:
            return Average(moments, count, size)
        seen = self.count * self._size_before(n)
        share = n / (seen + n)  # of this one in the mean of all examples
        left = torch.pow(decay, n / size)  # of what was there
        weight = 1 - torch.minimum(1 - share, left)
        # without finite examples it is 0 / 0
        weight = torch.where(n > 0, weight, 0.0)
        moments = self.moments.follow(moments, weight)
        return Average(moments, count, size)

    def counted(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Count and size with one more observation of n examples."""
        finite = n > 0
        if self.count is None or self.size is None:
            return finite.to(n.dtype), n
        count = self.count + finite
        before = self._size_before(n)
        # written as a change, which is exactly zero for equal sizes
        change = (n - before) / count
        size = before + change
        return count, torch.where(finite, size, self.size)

    def _size_before(self, n: Tensor) -> Tensor:
        """Mean size of the observations so far; n where it is not known."""
        assert self.size is not None
        return torch.where(self.size > 0, self.size, n)

    def settled(self, decay: float) -> Average:
        """Count what was seen as so many observations that the next one, of whatever size, weighs 1
        - rho.
        """
        if self.count is None or self.size is None:
            return self
        # so many that the next one's share is below 1 - rho; finite also for rho = 1
        many = 1 / max(1 - decay, 1e-9)
        settled = torch.full_like(self.count, many)
        count = torch.where(self.count > 0, settled, 0.0)
        unknown = torch.zeros_like(self.size)
        return Average(self.moments, count, unknown)
