"""Torch's loss modules as likelihoods: the Fisher that equals the generalised Gauss-Newton matrix.

Where the Hessian of a loss in the outputs depends on the label, its expectation over the labels of
the likelihood is meant, as everywhere here; see `readings` for what each module is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods.base import Likelihood
from fisher_lab.likelihoods.readings import READINGS, WRITE, refuse_absolute_error


class TorchLoss(Likelihood):
    """The likelihood behind a loss module of torch, with the loss's scale.

    Class weights, `pos_weight` and ignored labels make terms of the loss smaller or zero, which is
    measured as it is. A mean over the labels that are kept divides by their number (or weights) in
    the whole batch, as it does in training; nothing else couples the examples.

    Args:
        module: the loss module; see `readings.READINGS` for those that are known.

    Raises:
        TypeError: for a module that is none of these.
        ValueError: for options under which the loss is not kappa times a negative log-likelihood.

    Example:
        >>> likelihood = fl.likelihoods.TorchLoss(nn.CrossEntropyLoss())
        >>> torch.allclose(likelihood.loss(model(x), y), loss(model(x), y))
        True
    """

    def __init__(self, module: nn.Module) -> None:
        if type(module) is nn.L1Loss:
            refuse_absolute_error(module)
        if type(module) not in READINGS:
            known = ", ".join(kind.__name__ for kind in READINGS)
            raise TypeError(
                f"Got {type(module).__name__} as likelihood, expected a fisher_lab likelihood "
                f"(Categorical, Gaussian, Bernoulli) or one of {known}; use one of these, {WRITE}."
            )
        self.module: Any = module
        self.reading = READINGS[type(module)](module)
        self.base = self.reading.base
        self.summed = self.module.reduction == "sum"
        self.weighted = self.reading.weighted
        self._batch_scale: Tensor | None = None

    def factor(self, z: Tensor) -> Tensor:
        """The likelihood's own factor, without kappa."""
        return self.base.factor(z)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels of the likelihood."""
        return self.base.sample(z, generator)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """The likelihood's log p, without kappa."""
        return self.base.log_prob(z, y)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """The torch loss itself."""
        return self.reading.loss(z, y)

    def kappa(self, z: Tensor) -> float | Tensor:
        """See the table of `readings`."""
        kappa = self.reading.kappa(z)
        if self._batch_scale is None:
            return kappa
        return kappa * self._batch_scale.to(z)

    def of_batch(self, y: Tensor | None) -> Likelihood:
        """The loss with the scale of a mean over the labels of this batch that are kept."""
        scale = None if y is None else self.reading.batch_scale(y)
        if scale is None:
            return self
        twin = copy.copy(self)
        twin._batch_scale = scale
        return twin

    def data_score(self, z: Tensor, y: Tensor) -> Tensor:
        """Minus the gradient of the loss over kappa, its smoothing and weights included."""
        if not self.reading.special:
            return super().data_score(z, y)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            total = self.reading.total(leaf, y)
            (gradient,) = torch.autograd.grad(total, leaf)
        return -gradient.unsqueeze(0)

    def kept(self, y: Tensor) -> Tensor | None:
        """Labels that are not `ignore_index`; None for losses without one, for class probabilities,
        and for class weights, of which a mask says nothing.
        """
        ignored = getattr(self.reading, "ignored", None)
        if ignored is None or self.weighted or y.is_floating_point():
            return None
        return y.ne(ignored)

    def labels_kept(self, kept: Tensor) -> Tensor:
        """Any class where a label is kept, `ignore_index` elsewhere."""
        ignored = getattr(self.reading, "ignored", None)
        if ignored is None:
            return super().labels_kept(kept)
        if self.weighted:
            raise ValueError(
                f"{self.name} has class weights, expected none with kept=: the labels tell the "
                "weight of an example; use observing(y)."
            )
        some_class = int(ignored == 0)  # the first that is not ignored
        some = torch.full_like(kept, some_class, dtype=torch.int64)
        return torch.where(kept, some, ignored)

    def rank(self, z: Tensor) -> int:
        """As the likelihood's."""
        return self.base.rank(z)

    def known(self, y: Tensor) -> Tensor:
        """Labels as the likelihood takes them."""
        return self.reading.known(y)

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Weights of the loss's terms at the data's labels."""
        return self.reading.weights(z, y)

    def check_output(self, z: Any) -> None:
        """As the likelihood's."""
        self.reading.check_output(z)

    def check_values(self, z: Tensor) -> None:
        """As the likelihood's; log-probabilities are normalised."""
        self.reading.check_values(z)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """As the likelihood's; a mean keeps at least one label."""
        self.reading.check_labels(z, y)

    def check_unlabelled(self, z: Tensor) -> None:
        """Refuse outputs whose layout only labels tell."""
        self.reading.check_unlabelled(z)

    @property
    def name(self) -> str:
        """The loss module's class."""
        return type(self.module).__name__

    def __repr__(self) -> str:
        return f"{self.name}(reduction={self.module.reduction!r})"


def as_likelihood(likelihood: Likelihood | nn.Module) -> Likelihood:
    """A likelihood as it is, or the likelihood of a torch loss module.

    Raises:
        TypeError: for anything else.
        ValueError: for loss options that break the likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, type):
        raise TypeError(
            f"Got the class {likelihood.__name__} as likelihood, expected an instance; write "
            f"{likelihood.__name__}()."
        )
    return TorchLoss(likelihood)
