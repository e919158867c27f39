"""Which Fisher: the labels at which the loss is differentiated, and the output factors S that are
pulled back.

The only file that knows the three kinds. With J_n the Jacobian of example n, each of them is the
mean over the examples of sum_r (J_n^T S_rn)(J_n^T S_rn)^T:

    true        S S^T is the Hessian of the loss in the outputs: the expectation over labels
    mc          one column, the gradient at a label drawn from the model: unbiased
    empirical   one column, the gradient at the label of the data: not the Fisher, but often used

Labels are drawn once for a whole batch, from a seed of its own, before the batch is cut into
pieces; so neither the memory nor the number of passes nor the way to compute changes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fisher_lab._ground.arguments import shown
from fisher_lab._ground.memory import Budget, readable
from fisher_lab.likelihoods import Likelihood

FisherKind = Literal["true", "mc", "empirical"]
# draws labels `[N, ...]` of outputs z `[N, *output]`
Sampler = Callable[[Likelihood, Tensor, torch.Generator | None], Tensor]
# numbers of the outputs whose labels are drawn together: 32 MB in float64, some copies beside it
DRAWN_AT_ONCE = 2**22


@dataclass(frozen=True)
class Outputs:
    """The outputs of a batch, computed when they are needed.

    Attributes:
        N: examples.
        numbers: of the output of one example.
        compute: outputs `[n, *output]` of some of the examples.
    """

    N: int
    numbers: int
    compute: Callable[[slice], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """The outputs in blocks whose size follows from the outputs alone, so that labels do not
        depend on memory.
        """
        fitting = DRAWN_AT_ONCE // max(1, self.numbers)
        step = max(1, fitting)
        for start in range(0, self.N, step):
            stop = min(self.N, start + step)
            yield self.compute(slice(start, stop))


class Labels(ABC):
    """One kind of Fisher: what others ask about it, so that nobody compares its name.

    Args:
        seed: of labels that are drawn.

    Attributes:
        kind: its name.
        description: what it is, in words.
        expectation: whether it is an expectation over labels, in as many directions as the loss
            has; otherwise the second moment of one gradient, at one label.
        draws: whether its labels are drawn from the model, so that the gradients at them have mean
            zero.
        needs_data_labels: whether there is nothing to measure without labels of the data.
    """

    kind: FisherKind
    description: str
    expectation: bool = False
    draws: bool = False
    needs_data_labels: bool = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def directions(self, likelihood: Likelihood, z: Tensor) -> int:
        """Number R of output factors per example for outputs z `[N, *output]`."""

    def draw(self, likelihood: Likelihood, outputs: Outputs, batch: int) -> Tensor | None:
        """Labels of a whole batch at which the loss is differentiated, None where the kind draws
        none.

        Args:
            likelihood: p(y | z).
            outputs: of the batch.
            batch: its index in the data, from which its seed follows.
        """
        return None

    def check_unlabelled(self) -> None:
        """Raise ValueError where this kind needs the data's labels and there are none."""
        if self.needs_data_labels:
            raise ValueError(
                f'fisher="{self.kind}" needs labels, got none; pass data as (x, y) or use '
                f'fisher="{TrueFisher.kind}".'
            )

    def factors(
        self,
        likelihood: Likelihood,
        z: Tensor,
        label: Tensor | None,
        y: Tensor | None,
        N: int | None = None,
    ) -> Tensor:
        """Output factors S `[R, n, *output]`, the scale of the loss inside.

        Args:
            likelihood: p(y | z).
            z: outputs `[n, *output]`.
            label: what `draw` gave for these examples.
            y: the data's labels of these examples, which tell the weights of the loss's terms; None
                without labels.
            N: how many examples the data has, of which these are some; None gives the factors of
                the mean of the loss, also where it is a sum.

        Raises:
            ValueError: where the loss has no factors of this kind, or labels are missing.
        """
        S = self._factors(likelihood, z, label, y)
        if N is None or not likelihood.summed:
            return S
        # Every matrix is a mean over the examples; that of a sum of N losses is N times as large.
        # This is the only place that knows.
        return S * math.sqrt(N)

    @abstractmethod
    def _factors(
        self, likelihood: Likelihood, z: Tensor, label: Tensor | None, y: Tensor | None
    ) -> Tensor:
        """Output factors of the mean of the loss."""


class TrueFisher(Labels):
    """The expectation over labels; the data's are read only by losses that weigh or ignore some of
    them.
    """

    kind = "true"
    description = "the true Fisher (label expectation in closed form)"
    expectation = True

    def directions(self, likelihood: Likelihood, z: Tensor) -> int:
        """As many as the Hessian of the loss has factors."""
        return likelihood.rank(z)

    def _factors(
        self, likelihood: Likelihood, z: Tensor, label: Tensor | None, y: Tensor | None
    ) -> Tensor:
        """Factors of the Hessian, whose terms have the weights of the data's labels."""
        _check_weights_known(likelihood, self.kind, y)
        z = z.detach()
        S = likelihood.factor(z)
        if S.shape[1:] != z.shape:
            raise ValueError(
                f"{likelihood.name}.factor returned shape {tuple(S.shape)} for outputs "
                f"{tuple(z.shape)}, expected [R, *the shape of the outputs]."
            )
        # factors of a Hessian: they have the root of its scale
        S = S * _root(likelihood.kappa(z))
        return _weighted(S, likelihood, z, y)


class MonteCarlo(Labels):
    """One label per example (and position) drawn from the model."""

    kind = "mc"
    description = "the Monte-Carlo Fisher (labels sampled from the model)"
    draws = True

    def directions(self, likelihood: Likelihood, z: Tensor) -> int:
        """One."""
        return 1

    def draw(self, likelihood: Likelihood, outputs: Outputs, batch: int) -> Tensor | None:
        """Labels from the seed of the batch, for all positions alike."""
        seed = label_seed(self.seed, batch)
        generator: torch.Generator | None = None
        drawn: Tensor | None = None
        start = 0
        for z in outputs.blocks():
            if generator is None:
                generator = torch.Generator(z.device)
                generator.manual_seed(seed)
            label = likelihood.sample(z, generator)
            if drawn is None:
                # small ones kept between the large ones of every block would leave holes that the
                # next block does not fit into
                drawn = label.new_empty(outputs.N, *label.shape[1:])
            stop = start + len(label)
            drawn[start:stop] = label
            start = stop
        return drawn

    def _factors(
        self, likelihood: Likelihood, z: Tensor, label: Tensor | None, y: Tensor | None
    ) -> Tensor:
        """The gradient at the labels drawn, times the root of the loss's scale: its second moment
        is the Hessian.
        """
        if label is None:
            raise ValueError(
                f'fisher="{self.kind}" needs labels drawn from the model, got none; call `draw` '
                "first."
            )
        _check_weights_known(likelihood, self.kind, y)
        scale = _root(likelihood.kappa(z))
        S = likelihood.score(z, label) * scale
        return _weighted(S, likelihood, z, y)


class Empirical(Labels):
    """The labels of the data."""

    kind = "empirical"
    description = "the empirical Fisher (the labels of the data; not the Fisher itself)"
    needs_data_labels = True

    def directions(self, likelihood: Likelihood, z: Tensor) -> int:
        """One."""
        return 1

    def _factors(
        self, likelihood: Likelihood, z: Tensor, label: Tensor | None, y: Tensor | None
    ) -> Tensor:
        """The gradient of the loss at the data's labels."""
        if y is None:
            self.check_unlabelled()
        assert y is not None
        # the gradient itself: it has the scale of the loss, not its root
        return likelihood.data_score(z, y) * likelihood.kappa(z)


KINDS: dict[str, type[Labels]] = {kind.kind: kind for kind in (TrueFisher, MonteCarlo, Empirical)}


def labels_of(fisher: FisherKind, seed: int = 0) -> Labels:
    """The kind of Fisher of that name.

    Raises:
        ValueError: for another name.
    """
    # what is no text may have no answer to a comparison, or no place among keys
    if not isinstance(fisher, str) or fisher not in KINDS:
        raise ValueError(f'Got fisher={shown(fisher)}, expected "true", "mc" or "empirical".')
    return KINDS[fisher](seed)


def described(fisher: Any) -> str:
    """A kind of Fisher in words; a file need not name one that is known."""
    kind = KINDS.get(str(fisher))
    if kind is None:
        return "the Fisher"
    return kind.description


def needs_data_labels(fisher: Any) -> bool:
    """Whether an optimizer of that kind of Fisher asks for the data's labels; others have none."""
    kind = KINDS.get(str(fisher))
    return kind is not None and kind.needs_data_labels


def _root(kappa: float | Tensor) -> float | Tensor:
    """Square root of the loss's scale, which no number of the host enters where it is a tensor."""
    if isinstance(kappa, Tensor):
        return kappa.sqrt()
    return math.sqrt(kappa)


def _weighted(S: Tensor, likelihood: Likelihood, z: Tensor, y: Tensor | None) -> Tensor:
    """Factors of a Hessian whose terms have weights: times their roots."""
    if y is None:
        return S
    weight = likelihood.weights(z, y)
    if weight is None:
        return S
    return S * weight.sqrt()


def output_factors(
    likelihood: Likelihood,
    z: Tensor,
    labels: Labels,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    N: int | None = None,
    sample: Sampler | None = None,
) -> Tensor:
    """Output factors S `[R, N, *output]` in one call.

    Args:
        likelihood: p(y | z).
        z: outputs `[N, *output]`.
        labels: the kind.
        y: the data's labels of these examples as a whole batch, if there are any.
        generator: source of labels that are drawn.
        N: as in `Labels.factors`.
        sample: draws labels of these outputs, which may be part of a larger batch; None for the
            likelihood's own.
    """
    likelihood = likelihood.of_batch(y)
    label = None
    if labels.draws:
        z = z.detach()
        if sample is None:
            label = likelihood.sample(z, generator)
        else:
            label = sample(likelihood, z, generator)
    return labels.factors(likelihood, z, label, y, N)


def gradient_labels(
    likelihood: Likelihood, outputs: Outputs, y: Tensor | None, seed: int, batch: int
) -> Tensor:
    """Labels for the gradient of the training loss: those of the data, or drawn from the model
    where there are none.
    """
    if y is not None:
        return y
    drawn = MonteCarlo(seed).draw(likelihood, outputs, batch)
    assert drawn is not None
    return drawn


def check_output_factors(R: int, z: Tensor, budget: Budget) -> None:
    """Refuse output factors that do not fit for one example."""
    need = R * z.numel() * z.element_size()
    if need > budget.total:
        raise ValueError(
            f"The output factors of one example with R = {R} directions need {readable(need)}, "
            "expected at most "
            f'{readable(budget.total)}; use fisher="mc", whose R is 1, or raise memory=.'
        )


def label_seed(seed: int, batch: int) -> int:
    """Seed of the labels drawn for one batch: the same in every pass and every way to compute."""
    return (seed * 1_000_003 + batch) % 2**63


def _check_weights_known(likelihood: Likelihood, kind: str, y: Tensor | None) -> None:
    """Class weights follow from the data's labels, which those drawn from the model are not."""
    if likelihood.weighted and y is None:
        raise ValueError(
            f"{likelihood.name} has weights and got fisher={kind!r} without labels, expected them "
            "known: the data's labels tell the weight of an example; pass (x, y), or give an "
            'optimizer fisher="empirical".'
        )
