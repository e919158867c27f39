"""budget(): what each compromise on the way from the whole Fisher to a trainer's step costs.

The efficiency of a step is the share of the best decrease of the damped quadratic model of the
whole network that it reaches with its best length (errors.network_efficiency). The compromises are
made one after the other, each on top of those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._passes.batches import LABELS, Batch
from fisher_lab._passes.labels import FisherKind, MonteCarlo
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import OnUnknown, Setup
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, Exact, check_approximation
from fisher_lab.diagnose.inside import network_floor_inside
from fisher_lab.errors import MEASURES
from fisher_lab.estimation import estimated
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results.budget import Stage, StepBudget
from fisher_lab.whole_network import NetworkFisher, network_of

Matrices = Mapping[str, FisherMatrix]


def budget(
    model: nn.Module,
    likelihood: Likelihood | nn.Module,
    data: Any,
    approximation: Approximation,
    *,
    damping: float = 1e-2,
    batch: int | None = None,
    layers: Sequence[str] | None = None,
    fisher: FisherKind = "true",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    memory: float | None = None,
    on_unknown: OnUnknown = "error",
    labels: str = LABELS,
    output: Output | None = None,
) -> StepBudget:
    """How much of the best step of the whole network is left after each compromise.

    In this order, each on top of those before:

    1. the whole Fisher, whose step is the best one;
    2. exact blocks of the layers: what couples layers is left out;
    3. the approximation of the blocks, from the same data;
    4. factored damping, where the approximation has factors: (A + c I) (x) (G + c' I);
    5. labels sampled from the model, one for each example, as trainers draw them;
    6. with `batch`, statistics of so many examples instead of all.

    Args:
        model: any module that acts per example, in evaluation mode; it is not changed.
        likelihood: a Likelihood or a torch loss module.
        data: (x, y), x, a DataLoader or an iterable of batches.
        approximation: for instance `fl.KFAC()`.
        damping: lambda relative to tr F / d of the whole network, the same in every layer.
        batch: examples that the statistics of the last stage are taken from; None for no such
            stage.
        layers: names of layers; None for all.
        fisher: "true", "mc" or "empirical", of the stages 1 to 4.
        seed: of the sampled labels.
        dtype: precision of the computation, which runs on a copy.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: "error" or "skip" for modules without adapter.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z.

    Returns:
        The StepBudget; print it, or draw it with `plots.waterfall`.

    Raises:
        ValueError, TypeError: what cannot be measured, in one sentence.

    See Also:
        network, compare with errors="network_efficiency".

    Example:
        >>> found = fl.budget(model, loss, (x, y), fl.KFAC(), batch=20)
        >>> found.stages[0].name
        'whole Fisher'
    """
    setup = Setup.of(locals())
    check_approximation(approximation)
    source = Source(setup)
    few = None if batch is None else _few_examples(source, batch)
    with untouched_randomness():
        F = network_of(source)
    judge = _Judge(source, F, damping)
    stages = [Stage("whole Fisher", 1.0, 0.0, "the best step: what couples layers is there")]
    blocks = estimated(Exact(), source)
    stages.append(judge.stage("exact blocks", blocks, "every layer by itself"))
    label = approximation.label
    matrices = estimated(approximation, source)
    stages.append(judge.stage("approximation", matrices, f"{label} of the same data"))
    factored = any(matrix.has_factors for matrix in matrices.values())
    if factored:
        judge.factored = True
        stages.append(judge.stage("factored damping", matrices, "of the factors, not the product"))
    if source.labels.expectation:
        setup = replace(setup, fisher=MonteCarlo.kind)
        matrices = estimated(approximation, Source(setup))
        about = "one drawn from the model for each example"
        stages.append(judge.stage("sampled labels", matrices, about))
    if few is not None:
        of_few = Source(replace(setup, data=few))
        matrices = estimated(approximation, of_few)
        if source.likelihood.summed:
            # of the same size as F: a sum over as many examples
            more = F.N / of_few.N
            matrices = {name: matrix.scaled(more) for name, matrix in matrices.items()}
        stages.append(judge.stage("batch", matrices, f"statistics of {batch} examples"))
    return StepBudget(
        approximation=label,
        damping=float(damping),
        stages=tuple(stages),
        gradient=judge.along("gradient", F.gradient, "the gradient itself, without any matrix"),
        N=F.N,
        likelihood=repr(source.likelihood),
    )


class _Judge:
    """Efficiencies of steps at one damping.

    Args:
        source: model and data.
        F: the Fisher of the whole network.
        damping: relative to tr F / d.

    Attributes:
        factored: whether matrices with factors are damped in these.
    """

    def __init__(self, source: Source, F: NetworkFisher, damping: float) -> None:
        self.source = source
        self.F = F
        self.damping = damping
        self.factored = False

    def stage(self, name: str, matrices: Matrices, about: str) -> Stage:
        """The stage of the steps (F^_l + lambda I)^-1 g_l."""
        return self.along(name, self.F.step(matrices, self.damping, self.factored), about)

    def along(self, name: str, step: Mapping[str, Tensor], about: str) -> Stage:
        """The stage of a step."""
        quantities = self.F.quantities(step, self.damping)
        value, noise = MEASURES["network_efficiency"].formula(quantities)
        floor = network_floor_inside(self.source, self.F, self.damping)
        return Stage(name, value, max(noise, floor), about)


def _few_examples(source: Source, count: int) -> Any:
    """The first examples of the data as data of their own."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"Got batch={count!r}, expected a number of examples, at least 1.")
    first: Batch = source.batches.first()
    if count > first.N:
        raise ValueError(
            f"Got batch={count}, expected at most the {first.N} examples of the first batch of the "
            "data; give the data in larger batches or ask for fewer."
        )
    some = first.part(slice(0, count))
    if some.y is None:
        return some.inputs
    return some.inputs, some.y
