"""How each loss module of torch reads outputs z and labels y, one class per module.

A torch loss is kappa times a negative log-likelihood per example, up to a constant, with L
positions and C outputs (or classes) each, K = L C:

    CrossEntropyLoss, NLLLoss                       mean: kappa = 1 / L    sum: 1
    MSELoss                                         mean: kappa = 2 / K    sum: 2
    BCEWithLogitsLoss, BCELoss, PoissonNLLLoss,
    HuberLoss, SmoothL1Loss                         mean: kappa = 1 / K    sum: 1
    GaussianNLLLoss (K labels, 2 K outputs)         mean: kappa = 1 / K    sum: 1
    KLDivLoss                 batchmean: kappa = 1, mean: kappa = 1 / K    sum: 1

NLLLoss and KLDivLoss read log-probabilities, in which they are linear: the curvature is that of the
log_softmax before them. It is found all the same with z as logits, since log_softmax leaves
log-probabilities as they are, and J^T (diag p - p p^T) J with its Jacobian J is the Hessian in the
logits behind it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fisher_lab.likelihoods.base import Likelihood
from fisher_lab.likelihoods.bernoulli import Bernoulli, BernoulliProbability
from fisher_lab.likelihoods.categorical import Categorical
from fisher_lab.likelihoods.gaussian import Gaussian, GaussianVariance
from fisher_lab.likelihoods.huber import Huber
from fisher_lab.likelihoods.poisson import Poisson

WRITE = (
    "or write a Likelihood of your own, a class with factor, sample and log_prob "
    "(see fl.Likelihood and the page on extending)"
)
# Far above the rounding of log-probabilities even in bfloat16, far below what logits sum to.
NORMALISED = 0.05


class Reading:
    """What a loss module means: a likelihood, its scale and the weights of its terms.

    Args:
        module: the loss module.

    Attributes:
        base: the likelihood.
        special: whether labels of the data are not just labels of `base`, so that the gradient at
            them is the loss's own.
        weighted: whether the weight of a term follows from its label.
    """

    reductions: tuple[str, ...] = ("mean", "sum")
    base: Likelihood
    special = False
    weighted = False

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kind = type(module).__name__
        if module.reduction not in self.reductions:
            expected = " or ".join(f'"{name}"' for name in self.reductions)
            raise ValueError(
                f"{self.kind} has reduction={module.reduction!r}, expected {expected}; choose one "
                f"of them, {WRITE}."
            )

    def terms(self, z: Tensor) -> float:
        """Number of terms of one example that a mean divides by."""
        return math.prod(z.shape[1:])

    def kappa(self, z: Tensor) -> float:
        """See the table at the top of this file."""
        if self.module.reduction == "mean":
            return 1.0 / self.terms(z)
        return 1.0

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss itself."""
        return self.module(z, y)

    def known(self, y: Tensor) -> Tensor:
        """Labels as the likelihood takes them, with something harmless for ignored ones."""
        return y

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Weights of the terms in the Hessian at the data's labels."""
        return self.base.weights(z, self.known(y))

    def batch_scale(self, y: Tensor) -> Tensor | None:  # noqa: ARG002
        """What a mean over fewer than all terms of a batch multiplies with; None for all terms."""
        return None

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        """Sum over the examples of the loss over kappa at the data's labels, up to a constant."""
        return -self.base.log_prob(z, self.known(y)).sum()

    def check_output(self, z: Any) -> None:
        """As the likelihood's."""
        self.base.check_output(z)

    def check_values(self, z: Tensor) -> None:
        """As the likelihood's."""
        self.base.check_values(z)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """As the likelihood's."""
        self.base.check_labels(z, self.known(y))

    def check_unlabelled(self, z: Tensor) -> None:
        """Nothing to refuse."""


class _Elementwise(Reading):
    """A loss of independent outputs."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if getattr(module, "weight", None) is not None:
            raise ValueError(
                f"{self.kind} has weight set, expected None: it weighs the examples of a batch by "
                f"their places; use the loss without weights, {WRITE}."
            )


class SquaredError(_Elementwise):
    """MSELoss: twice the Gaussian of variance 1."""

    def __init__(self, module: nn.MSELoss) -> None:
        super().__init__(module)
        self.base = Gaussian()

    def kappa(self, z: Tensor) -> float:
        """See the table at the top of this file."""
        if self.module.reduction == "mean":
            return 2.0 / self.terms(z)
        return 2.0


class BinaryLogits(_Elementwise):
    """BCEWithLogitsLoss: a Bernoulli likelihood; `pos_weight` w weighs a term by 1 + (w - 1) y."""

    def __init__(self, module: nn.BCEWithLogitsLoss) -> None:
        super().__init__(module)
        self.base = Bernoulli()
        self.positive: Tensor | None = module.pos_weight
        self.weighted = self.special = self.positive is not None
        if self.positive is not None and bool((self.positive < 0).any()):
            raise ValueError(
                f"{self.kind} has a negative pos_weight, expected weights >= 0, as the Hessian "
                f"would be indefinite; change the loss, {WRITE}."
            )

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:
        """1 + (pos_weight - 1) y, the factor of p (1 - p) in the second derivative."""
        if self.positive is None:
            return None
        more = self.positive.to(z) - 1
        # also for labels between 0 and 1, in which the loss is linear
        share = y.to(z.dtype)
        return 1 + more * share

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss's own sum."""
        positive = None if self.positive is None else self.positive.to(z)
        return binary_cross_entropy_with_logits(
            z, y.to(z.dtype), pos_weight=positive, reduction="sum"
        )


class BinaryProbabilities(_Elementwise):
    """BCELoss: a Bernoulli likelihood of probabilities."""

    def __init__(self, module: nn.BCELoss) -> None:
        super().__init__(module)
        self.base = BernoulliProbability()


class Counts(_Elementwise):
    """PoissonNLLLoss: z is the logarithm of the rate, or the rate."""

    def __init__(self, module: nn.PoissonNLLLoss) -> None:
        super().__init__(module)
        self.base = Poisson(log_rate=module.log_input, eps=module.eps)


class HuberError(_Elementwise):
    """HuberLoss and SmoothL1Loss, which is Huber's over its threshold beta."""

    def __init__(self, module: nn.HuberLoss | nn.SmoothL1Loss) -> None:
        super().__init__(module)
        if isinstance(module, nn.HuberLoss):
            self.base = Huber(module.delta, 1.0)
            return
        if module.beta == 0:
            refuse_absolute_error(module)
        self.base = Huber(module.beta, 1.0 / module.beta)


class MeanAndVariance(Reading):
    """GaussianNLLLoss: the model's two outputs are stacked in dimension 1."""

    def __init__(self, module: nn.GaussianNLLLoss) -> None:
        super().__init__(module)
        self.base = GaussianVariance(module.eps)

    def terms(self, z: Tensor) -> float:
        """Labels of one example: half as many as outputs."""
        return math.prod(z.shape[2:])

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss itself, of the means z[:, 0] and the variances z[:, 1]."""
        mean = z[:, 0]
        return self.module(mean, y.reshape(mean.shape), z[:, 1])


class Classes(Reading):
    """CrossEntropyLoss: classes in dimension 1; weights, ignored labels and smoothing.

    With class weights w and smoothing e, the term of label y has the weight (1 - e) w_y + e mean w
    in the Hessian, and a mean divides by the sum of w_y over the labels kept.
    """

    def __init__(self, module: nn.CrossEntropyLoss | nn.NLLLoss) -> None:
        super().__init__(module)
        self.base = Categorical(dim=1)
        self.weight: Tensor | None = module.weight
        self.ignored: int = module.ignore_index
        self.smoothing: float = getattr(module, "label_smoothing", 0.0)
        self.weighted = self.weight is not None
        self.special = self.weighted or self.smoothing > 0
        if self.weight is not None and bool((self.weight < 0).any()):
            raise ValueError(
                f"{self.kind} has negative class weights, expected weights >= 0, as the Hessian "
                f"would be indefinite; change the loss, {WRITE}."
            )

    def terms(self, z: Tensor) -> float:
        """Positions of one example."""
        return math.prod(z.shape[2:])

    def kappa(self, z: Tensor) -> float:
        """See the table at the top of this file."""
        if self.module.reduction == "mean":
            return z.shape[1] / math.prod(z.shape[1:])
        return 1.0

    def known(self, y: Tensor) -> Tensor:
        """Class 0 in place of `ignore_index`."""
        if y.is_floating_point():
            return y
        return torch.where(y.eq(self.ignored), torch.zeros_like(y), y)

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Weights `[N, 1, *positions]`, the same for all classes."""
        e = self.smoothing
        C = z.shape[1]
        if y.is_floating_point():
            return self._sums(z, y)
        kept = y.ne(self.ignored)
        if self.weight is None:
            # a smoothed label sums to 1 as any other
            weight = kept.to(z.dtype)
        else:
            w = self.weight.to(z)
            own = w[self.known(y)]
            everywhere = e / C * w.sum()
            smoothed = (1 - e) * own + everywhere
            weight = kept * smoothed
        return weight.unsqueeze(1)

    def _sums(self, z: Tensor, y: Tensor) -> Tensor:
        """Sums of class probabilities, smoothed and weighted as the loss does."""
        if not self.special:
            return y.sum(1, keepdim=True)
        e = self.smoothing
        C = z.shape[1]
        smoothed = y * (1 - e) + e / C
        if self.weight is not None:
            positions = [1] * (z.ndim - 2)
            w = self.weight.to(z).reshape(-1, *positions)
            smoothed = smoothed * w
        return smoothed.sum(1, keepdim=True)

    def batch_scale(self, y: Tensor) -> Tensor | None:
        """All labels over the sum of the weights of those that are kept."""
        if self.module.reduction != "mean" or y.is_floating_point():
            return None
        kept = y.ne(self.ignored)
        # one of the devices has no float64
        wide = torch.float32 if y.device.type == "mps" else torch.float64
        if self.weight is None:
            return y.numel() / kept.sum().to(wide)
        own = self.weight.to(y.device, wide)[self.known(y)]
        return y.numel() / (kept * own).sum()

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss's own sum."""
        weight = None if self.weight is None else self.weight.to(z)
        ignored = self.ignored
        if y.is_floating_point():  # torch refuses the two together
            ignored = -100
        return cross_entropy(
            z, y, weight, ignore_index=ignored, reduction="sum", label_smoothing=self.smoothing
        )

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """As the likelihood's; classes last get the cure, and some label is kept under a mean."""
        classes_last = y.shape == z.shape[:-1]
        classes_second = y.shape[1:] == z.shape[2:]
        # where both fit, as in [N, 3, 3], torch's reading stands
        last = z.ndim > 2 and classes_last and not classes_second
        if last and not y.is_floating_point():
            N, *positions, C = z.shape
            swapped = (N, C, *positions)
            raise ValueError(
                f"{self.kind} reads the classes of outputs {tuple(z.shape)} in dimension 1, and "
                f"labels {tuple(y.shape)} expect them last; use Categorical() or put classes "
                f"second, outputs {swapped}."
            )
        super().check_labels(z, y)
        scale = self.batch_scale(y)
        if scale is not None and y.numel() and not math.isfinite(float(scale)):
            raise ValueError(
                f"{self.kind} keeps none of the {y.numel()} labels of a batch, expected at least "
                "one that is not ignored and has a weight; leave such batches out."
            )

    def check_unlabelled(self, z: Tensor) -> None:
        """Refuse positions: only labels tell whether they are laid out as the loss expects."""
        if z.ndim > 2:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)} and there are no labels, so which "
                f"dimension holds the classes is a guess with {self.kind}, expected labels or an "
                "explicit likelihood; pass one, such as fl.Categorical(dim=-1)."
            )


class LogProbabilities(Classes):
    """NLLLoss: as CrossEntropyLoss behind a log_softmax."""

    def check_values(self, z: Tensor) -> None:
        """Log-probabilities over dimension 1."""
        check_normalised(self.kind, z, 1)


class Divergence(Reading):
    """KLDivLoss: cross-entropy with class probabilities, classes last, up to a constant."""

    reductions = ("batchmean", "mean", "sum")

    def __init__(self, module: nn.KLDivLoss) -> None:
        super().__init__(module)
        self.base = Categorical(dim=-1)

    def known(self, y: Tensor) -> Tensor:
        """Probabilities; what was drawn stays a class."""
        if self.module.log_target and y.is_floating_point():
            return y.exp()
        return y

    def check_values(self, z: Tensor) -> None:
        """Log-probabilities over the last dimension."""
        check_normalised(self.kind, z, -1)

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Class probabilities, or their logarithms."""
        if not y.is_floating_point() or y.shape != z.shape:
            raise ValueError(
                f"{self.kind} got labels {y.dtype} {tuple(y.shape)} for outputs "
                f"{tuple(z.shape)}, expected probabilities of the same shape; use NLLLoss for "
                "class indices."
            )
        super().check_labels(z, y)


def check_normalised(kind: str, z: Tensor, dim: int) -> None:
    """Refuse outputs that are not log-probabilities along a dimension."""
    sums = z.detach().logsumexp(dim)
    worst = float(sums.abs().max())
    if not worst <= NORMALISED:
        raise ValueError(
            f"{kind} got outputs whose exponentials sum to exp(+-{worst:.3g}) over dimension "
            f"{dim}, expected log-probabilities; end the model with LogSoftmax(dim={dim}), or use "
            "CrossEntropyLoss."
        )


def refuse_absolute_error(module: nn.Module) -> None:
    """L1 has no GGN."""
    kind = type(module).__name__
    raise ValueError(
        f"{kind} has no curvature, expected a loss with second derivatives: they are 0 wherever "
        f"they exist, and so is its GGN; use HuberLoss, {WRITE}, as the Laplace distribution there."
    )


READINGS: dict[type[nn.Module], type[Reading]] = {
    nn.CrossEntropyLoss: Classes,
    nn.NLLLoss: LogProbabilities,
    nn.KLDivLoss: Divergence,
    nn.MSELoss: SquaredError,
    nn.HuberLoss: HuberError,
    nn.SmoothL1Loss: HuberError,
    nn.GaussianNLLLoss: MeanAndVariance,
    nn.PoissonNLLLoss: Counts,
    nn.BCEWithLogitsLoss: BinaryLogits,
    nn.BCELoss: BinaryProbabilities,
}
