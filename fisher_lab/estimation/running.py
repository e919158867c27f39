"""Running: the only holder of estimation state; and estimate(), an approximation of every layer from data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import OnUnknown, Setup
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, check_approximation
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats


class Running:
    """One layer's approximation, updated batch by batch.

    Args:
        approximation: what to build.
        decay: None for the plain mean over all examples; otherwise the moving average of George et al. and Martens &
            Grosse, whose k-th observation weighs 1 - min(1 - 1/k, decay).
    """

    def __init__(self, approximation: Approximation, decay: float | None = None) -> None:
        self.approximation, self.decay = approximation, decay
        self.moments: dict[str, Tensor] | None = None
        self.matrix: FisherMatrix | None = None
        self.observations = 0
        self.examples = 0
        self._again = False  # whether this is another sweep over the data behind `matrix`
        self.seconds = 0.0  # spent on moments and assembly

    def absorb(self, stats: LayerStats) -> None:
        """Add the examples of a batch."""
        self.observations += 1
        self.examples += stats.N
        started = time.perf_counter()
        new = self.approximation.moments(stats, self.matrix)
        if self.moments is None:
            self.moments = new
        else:
            weight = stats.N / self.examples
            if self.decay is not None:
                weight = 1 - min(1 - 1 / self.observations, self.decay)
            self.moments = self.approximation.average(self.moments, new, weight)
        self.seconds += time.perf_counter() - started

    def refresh(self) -> FisherMatrix:
        """Assemble the matrix from the moments."""
        if self.moments is None:
            raise ValueError("Nothing was observed yet, expected at least one batch; call absorb first.")
        started = time.perf_counter()
        if self._again and self.matrix is not None:
            self.matrix, self._again = self.approximation.reassemble(self.moments, self.matrix), False
        else:
            self.matrix = self.approximation.assemble(self.moments, self.matrix)
        self.moments = self.approximation.carry(self.moments, self.matrix)
        self.seconds += time.perf_counter() - started
        return self.matrix

    def restart(self) -> None:
        """Forget the moments but not the matrix: the next sweep over the same data begins."""
        self._again = self.matrix is not None
        self.moments, self.observations, self.examples = None, 0, 0


def estimate(
    approximation: Approximation,
    model: nn.Module,
    likelihood: Likelihood | nn.Module,
    data: Any,
    *,
    layers: Sequence[str] | None = None,
    fisher: FisherKind = "true",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    memory: float | None = None,
    on_unknown: OnUnknown = "error",
    labels: str = LABELS,
    output: Output | None = None,
) -> dict[str, FisherMatrix]:
    """One approximation of every layer's Fisher block.

    Args:
        approximation: for instance `fl.KFAC()`; `fl.Exact()` gives the captured block itself.
        model: any module that acts per example; it is not changed.
        likelihood: a Likelihood or a torch loss module.
        data: (x, y), x, a DataLoader or an iterable of batches.
        layers: names of layers; None for all.
        fisher: "true", "mc" (labels sampled from the model) or "empirical" (the labels given).
        seed: of the sampled labels.
        dtype: precision of the computation, which runs on a copy.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: "error" or "skip" for modules without adapter.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z.

    Returns:
        `{layer: FisherMatrix}`, each over W `[d_out, d_in]` with the bias as last column.

    Raises:
        ValueError, TypeError: what cannot be estimated, in one sentence.

    See Also:
        compare, which measures many approximations at once; exact_fisher, the independent truth.
    """
    check_approximation(approximation)
    setup = Setup(
        model, likelihood, data, layers=layers, fisher=fisher, seed=seed, dtype=dtype, device=device, memory=memory,
        on_unknown=on_unknown, labels=labels, output=output,
    )  # fmt: skip
    source = Source(setup)
    running = {Key(name): Running(approximation) for name in source.layers}
    with untouched_randomness():
        sweep_all(running, source)
    return {key.layer: _assembled(state).scaled(source.scale) for key, state in running.items()}


class Key(NamedTuple):
    """What a state of estimation belongs to: a layer, and the label of a candidate; None for the exact block."""

    layer: str
    candidate: str | None = None


def sweep_all(running: dict[Key, Running], source: Source) -> None:
    """Run every Running through all its sweeps over the data."""
    sweeps = max((state.approximation.sweeps for state in running.values()), default=0)
    for sweep in range(sweeps):
        due = {key: state for key, state in running.items() if sweep < state.approximation.sweeps}
        for state in due.values():
            state.restart()
        names = list(dict.fromkeys(key.layer for key in due))
        for stats in source.sweep(names):
            for key, state in due.items():
                state.absorb(stats[key.layer])
        for state in due.values():
            state.refresh()


def _assembled(state: Running) -> FisherMatrix:
    assert state.matrix is not None
    return state.matrix
