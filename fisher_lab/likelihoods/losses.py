"""Torch's loss modules as likelihoods: the Fisher that equals the generalised Gauss-Newton matrix of the loss.

A torch loss is kappa times a negative log-likelihood per example, with L positions and C outputs (or classes):

    CrossEntropyLoss   mean: kappa = 1 / L        sum: 1
    MSELoss            mean: kappa = 2 / (L C)    sum: 2
    BCEWithLogitsLoss  mean: kappa = 1 / (L C)    sum: 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods.base import FisherKind, Likelihood
from fisher_lab.likelihoods.bernoulli import Bernoulli
from fisher_lab.likelihoods.categorical import Categorical
from fisher_lab.likelihoods.gaussian import Gaussian


class TorchLoss(Likelihood):
    """The likelihood behind a `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` module, with the loss's scale.

    Args:
        module: the loss module; class weights and `reduction="none"` are refused.

    Raises:
        TypeError: for a module that is none of these.
        ValueError: for options under which the loss is not kappa times a negative log-likelihood.
    """

    def __init__(self, module: nn.Module) -> None:
        bases = {nn.CrossEntropyLoss: Categorical(dim=1), nn.MSELoss: Gaussian(), nn.BCEWithLogitsLoss: Bernoulli()}
        if type(module) not in bases:
            raise TypeError(
                f"Got {type(module).__name__} as likelihood, expected a fisher_lab likelihood (Categorical, Gaussian, "
                "Bernoulli) or one of CrossEntropyLoss, MSELoss, BCEWithLogitsLoss."
            )
        for option in ("weight", "pos_weight"):
            if getattr(module, option, None) is not None:
                raise ValueError(
                    f"{type(module).__name__} has {option} set, expected None: a weighted loss is not a likelihood; "
                    "use the loss without weights."
                )
        if module.reduction not in ("mean", "sum"):
            raise ValueError(f'{type(module).__name__} has reduction={module.reduction!r}, expected "mean" or "sum".')
        self.module = module
        self.base: Likelihood = bases[type(module)]
        self.summed = module.reduction == "sum"

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

    def directions(self, z: Tensor, fisher: FisherKind) -> int:
        """As the likelihood's."""
        return self.base.directions(z, fisher)

    def columns(
        self, z: Tensor, fisher: FisherKind, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `Likelihood.columns`; label smoothing leaves "true" and "mc" as they are and is refused otherwise."""
        if fisher == "empirical" and getattr(self.module, "label_smoothing", None):
            raise ValueError(
                f"CrossEntropyLoss has label_smoothing={self.module.label_smoothing}, expected 0 for "
                'fisher="empirical"; use fisher="true" or a loss without smoothing.'
            )
        return super().columns(z, fisher, y, generator)

    def check_output(self, z: Tensor) -> None:
        """As the likelihood's."""
        self.base.check_output(z)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """As the likelihood's, and no label is `ignore_index`."""
        ignored = getattr(self.module, "ignore_index", None)
        if ignored is not None and not y.is_floating_point() and bool((y == ignored).any()):
            raise ValueError(
                f"{int((y == ignored).sum())} labels equal ignore_index={ignored}, expected none: such examples have "
                "no loss; remove them from the data."
            )
        self.base.check_labels(z, y)

    def check_unlabelled(self, z: Tensor) -> None:
        """Refuse outputs with positions: only labels tell whether they are laid out as the loss expects."""
        if z.ndim > 2:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)} and there are no labels, so which dimension holds the "
                f"classes is a guess with {self.name}, expected labels or an explicit likelihood; pass one, such as "
                "fl.Categorical(dim=-1)."
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
            f"Got the class {likelihood.__name__} as likelihood, expected an instance; write {likelihood.__name__}()."
        )
    return TorchLoss(likelihood)
