"""Running: the only holder of estimation state; and estimate(), an approximation of every layer
from data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from fisher_lab._ground.ranks import Ranks, dealt, in_order, ranks_of
from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import OnUnknown, Setup, check_asked_alike
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, check_approximation
from fisher_lab.approximations.base import assembled, carried, check_names, observed
from fisher_lab.approximations.vocabulary import has_diagonal_rows
from fisher_lab.estimation.average import Mean
from fisher_lab.estimation.memory import check_fits
from fisher_lab.layers import VocabularyLayer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import Sums, sums_over
from fisher_lab.statistics.pieces import within


class Running:
    """One layer's approximation, updated batch by batch: the mean over all examples of one sweep
    after the other.

    Args:
        approximation: what to build.
    """

    def __init__(self, approximation: Approximation) -> None:
        self.approximation = approximation
        self.mean = Mean()
        self.matrix: FisherMatrix | None = None
        # spent on moments and assembly, and by anybody on the sums that were read
        self.seconds = 0.0
        self._again = False  # whether this is another sweep over the data behind `matrix`

    def absorb(self, sums: Sums) -> None:
        """Add the examples of a batch."""
        with sums.billed(self) as bill:
            new = observed(self.approximation, sums, self.matrix)
            check_names(self.approximation, self.mean.moments, new, self.matrix)
            self.mean.add(new, sums.N)
        self.seconds += bill.seconds

    def refresh(self) -> FisherMatrix:
        """Assemble the matrix from the moments."""
        if self.mean.moments is None:
            raise ValueError(
                "Nothing was observed yet, expected at least one batch; call absorb first."
            )
        started = time.perf_counter()
        moments = self.mean.moments
        self.matrix = assembled(self.approximation, moments, self.matrix, self._again)
        # what a method that goes on from its matrix needs of the moments in the new basis
        self.mean.moments = carried(self.approximation, moments, self.matrix)
        self._again = False
        self.seconds += time.perf_counter() - started
        return self.matrix

    def restart(self) -> None:
        """Forget the moments but not the matrix: the next sweep over the same data begins."""
        self._again = self.matrix is not None
        self.mean = Mean()


class Key(NamedTuple):
    """What a state of estimation belongs to: a layer, and the label of a candidate; None for the
    exact block.
    """

    layer: str
    candidate: str | None = None


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
    group: Any = None,
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
        group: the processes that share the work, as in `compare`.

    Returns:
        `{layer: FisherMatrix}`, each over W `[d_out, d_in]` with the bias as last column.

    Raises:
        ValueError, TypeError: what cannot be estimated, in one sentence.

    See Also:
        compare, which measures many approximations at once; exact_fisher, the independent truth.

    Example:
        >>> fl.estimate(fl.TKFAC(), model, loss, (x, y))["0"].shape
        (6, 9)
    """
    ranks = ranks_of(group)
    setup = Setup.of(locals(), memory=ranks.memory(memory))

    def ask() -> Source:
        check_approximation(approximation)
        found = Source(setup, vocabularies=True)
        check_vocabularies(approximation, found)
        check_fits([approximation], found)
        return found

    source = ranks.agreed(ask)
    check_asked_alike(source.prepared, ranks)
    own = _own_layers(source, ranks)
    parts = ranks.gathered(lambda: estimated(approximation, source, own))
    return in_order(source.layers, parts)


def check_vocabularies(approximation: Approximation, source: Source) -> None:
    """Refuse an approximation that a layer of a vocabulary of the source cannot have.

    Raises:
        ValueError: where there is such a layer.
    """
    for name, layer in source.layers.items():
        if isinstance(layer, VocabularyLayer) and not has_diagonal_rows(approximation):
            raise ValueError(
                f"{approximation.label} needs more than a diagonal over the {layer.shape[0]:,} "
                f"rows of layer {name!r}, expected one such as KFAC, EKFAC, TKFAC, TN or Diagonal; "
                "leave the layer out with layers=[...]."
            )


def _own_layers(source: Source, ranks: Ranks) -> list[str]:
    """The layers of this rank, which it captures in the pieces of one process."""
    if ranks.alone:
        return list(source.layers)
    costs = {}
    for name, layer in source.layers.items():
        rows, columns = layer.shape
        costs[name] = source.N * source.column_numbers(name) * (rows + columns)
    own = dealt(costs, ranks.count)[ranks.own]
    source.take(own, [list(source.layers)])
    return own


def estimated(
    approximation: Approximation, source: Source, names: Sequence[str] | None = None
) -> dict[str, FisherMatrix]:
    """An approximation of every layer of a question that is ready to be captured.

    Args:
        approximation: what to build.
        source: the question.
        names: of the layers; None for all.
    """
    chosen = list(source.layers if names is None else names)
    if not chosen:
        return {}
    running = {}
    for name in chosen:
        running[Key(name)] = Running(approximation)
    kept = {}
    with untouched_randomness(), within(source.limit):
        if approximation.sweeps > 1 and source.fits_at_once():
            # every sweep sees the same statistics, and need not sum them anew
            (whole,) = source.sweep(chosen)
            for name, stats in whole.items():
                kept[name] = sums_over(stats)
        sweep_all(running, source, kept)
    found = {}
    for key, state in running.items():
        found[key.layer] = _matrix(state)
    return found


def sweep_all(
    running: Mapping[Key, Running],
    source: Source,
    kept: Mapping[str, Sums] | None = None,
) -> None:
    """Run every Running through all its sweeps.

    Args:
        running: by what they build.
        source: of the data.
        kept: sums of the layers whose statistics are kept, for all sweeps and for those who come
            afterwards.
    """
    if kept is None:
        kept = {}
    sweeps = max((state.approximation.sweeps for state in running.values()), default=0)
    for sweep in range(sweeps):
        readers: dict[str, list[Running]] = {}
        for key, state in running.items():
            if sweep < state.approximation.sweeps:
                readers.setdefault(key.layer, []).append(state)
        _sweep(readers, source, kept)


def _sweep(
    readers: Mapping[str, Sequence[Running]],
    source: Source,
    kept: Mapping[str, Sums],
) -> None:
    """One pass over the data, for some states of every layer."""
    every = list(chain.from_iterable(readers.values()))
    for state in every:
        state.restart()
    for piece in source.sweep([*readers]):
        for name, states in readers.items():
            sums = kept.get(name)
            if sums is None:
                # with one reader nothing is worth keeping
                several = len(states) > 1
                sums = sums_over(piece[name], several)
            for state in states:
                state.absorb(sums)
    for state in every:
        state.refresh()


def _matrix(state: Running) -> FisherMatrix:
    assert state.matrix is not None
    return state.matrix
