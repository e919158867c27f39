"""Torch's loss modules as likelihoods: the Fisher that equals the generalised Gauss-Newton matrix
of the loss.

A torch loss is kappa times a negative log-likelihood per example, with L positions and C outputs
(or classes):

    CrossEntropyLoss   mean: kappa = 1 / L        sum: 1
    MSELoss            mean: kappa = 2 / (L C)    sum: 2
    BCEWithLogitsLoss  mean: kappa = 1 / (L C)    sum: 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods.base import Likelihood
from fisher_lab.likelihoods.bernoulli import Bernoulli
from fisher_lab.likelihoods.categorical import Categorical
from fisher_lab.likelihoods.gaussian import Gaussian


class TorchLoss(Likelihood):
    """The likelihood behind a `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` module, with the
    loss's scale.

    Args:
        module: the loss module; `reduction="none"` and BCEWithLogitsLoss's weights are refused.
            CrossEntropyLoss's class weights and ignored labels make terms of the loss smaller or
            zero; under reduction="sum" that is measured as it is, under "mean" refused, because the
            mean over what is kept couples the examples.

    Raises:
        TypeError: for a module that is none of these.
        ValueError: for options under which the loss is not kappa times a negative log-likelihood.
    """

    def __init__(self, module: nn.Module) -> None:
        bases = {
            nn.CrossEntropyLoss: Categorical(dim=1),
            nn.MSELoss: Gaussian(),
            nn.BCEWithLogitsLoss: Bernoulli(),
        }
        if type(module) not in bases:
            raise TypeError(
                f"Got {type(module).__name__} as likelihood, expected a fisher_lab likelihood "
                "(Categorical, Gaussian, Bernoulli) or one of CrossEntropyLoss, MSELoss, "
                "BCEWithLogitsLoss."
            )
        if module.reduction not in ("mean", "sum"):
            raise ValueError(
                f'{type(module).__name__} has reduction={module.reduction!r}, expected "mean" or '
                '"sum".'
            )
        self.module = module
        self.base: Likelihood = bases[type(module)]
        self.summed = module.reduction == "sum"
        self.weight: Tensor | None = getattr(module, "weight", None)
        self.ignored: int | None = getattr(module, "ignore_index", None)
        self.weighted = self.weight is not None
        self.smoothing = getattr(module, "label_smoothing", 0.0)
        self._check_weights()

    def _check_weights(self) -> None:
        module, kind = self.module, type(self.module).__name__
        if isinstance(module, nn.CrossEntropyLoss) and self.weight is not None:
            if not self.summed:
                raise ValueError(
                    f"{kind} has weight set and reduction='mean', expected reduction='sum': the "
                    "mean divides by the labels' weights and so couples the examples; use "
                    "reduction='sum', or no weights."
                )
            if module.label_smoothing or bool((self.weight < 0).any()):
                raise ValueError(
                    f"{kind} has weight set together with "
                    f"label_smoothing={module.label_smoothing} or with negative weights, expected "
                    "one of the two and weights >= 0; change the loss."
                )
        elif self.weight is not None or getattr(module, "pos_weight", None) is not None:
            raise ValueError(
                f"{kind} has weight or pos_weight set, expected None: a weighted loss is not a "
                "likelihood; use the loss without weights."
            )

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
        return self.module(z, y)

    def kappa(self, z: Tensor) -> float:
        """See the table at the top of this file."""
        outputs = math.prod(z.shape[1:])
        if isinstance(self.module, nn.CrossEntropyLoss):
            return 1.0 if self.summed else z.shape[1] / outputs
        scale = 2.0 if isinstance(self.module, nn.MSELoss) else 1.0
        return scale if self.summed else scale / outputs

    def rank(self, z: Tensor) -> int:
        """As the likelihood's."""
        return self.base.rank(z)

    def known(self, y: Tensor) -> Tensor:
        """Class 0 in place of `ignore_index`."""
        if self.ignored is None or y.is_floating_point():
            return y
        return torch.where(y.eq(self.ignored), torch.zeros_like(y), y)

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:
        """For class indices y `[N, *positions]`: 0 where the loss ignores one, else the weight of
        its class.
        """
        if self.ignored is None or y.is_floating_point():
            return self.base.weights(z, y)
        kept = y.ne(self.ignored)
        if self.weight is None:
            weight = kept.to(z.dtype)
        else:
            weight = kept * self.weight.to(z)[self.known(y)]
        return weight.unsqueeze(1)  # the same for all classes

    def check_output(self, z: Tensor) -> None:
        """As the likelihood's."""
        self.base.check_output(z)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """As the likelihood's; under a mean, no label is `ignore_index`."""
        if (
            self.ignored is not None
            and not y.is_floating_point()
            and bool((y == self.ignored).any())
        ):
            if not self.summed:
                raise ValueError(
                    f"{int((y == self.ignored).sum())} labels equal ignore_index={self.ignored}, "
                    "expected none under reduction='mean', whose mean over the labels kept "
                    "couples the examples; use reduction='sum', or remove them from the data."
                )
            y = torch.where(y == self.ignored, torch.zeros_like(y), y)
        self.base.check_labels(z, y)

    def check_unlabelled(self, z: Tensor) -> None:
        """Refuse outputs with positions: only labels tell whether they are laid out as the loss
        expects.
        """
        if z.ndim > 2:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)} and there are no labels, so which "
                f"dimension holds the classes is a guess with {self.name}, expected labels or an "
                "explicit likelihood; pass one, such as fl.Categorical(dim=-1)."
            )

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
