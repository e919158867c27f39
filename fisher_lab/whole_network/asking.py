"""network(): the Fisher of all layers' weights together, from a model, a loss and data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import OnUnknown, Setup
from fisher_lab._passes.source import Source
from fisher_lab.likelihoods import Likelihood
from fisher_lab.statistics.contractions import Columns
from fisher_lab.whole_network.fisher import NetworkFisher


def network(
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
) -> NetworkFisher:
    """The Fisher of all layers together, what couples them included, as products.

    Every argument is that of `compare`. The columns of all layers are kept where they fit the
    memory; where they do not, every product is one pass over the data.

    Args:
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
        The NetworkFisher over `{layer: W [d_out, d_in]}`.

    Raises:
        ValueError, TypeError: what cannot be computed, in one sentence.

    See Also:
        compare with errors="network_efficiency", which judges approximations by it.

    Example:
        >>> F = fl.network(model, loss, (x, y))
        >>> F.block_norms().shape
        torch.Size([2, 2])
    """
    setup = Setup.of(locals())
    with untouched_randomness():
        return network_of(Source(setup))


def network_of(source: Source) -> NetworkFisher:
    """The Fisher of the network of a question."""
    # of the loss, not of its mean
    gradient = {name: g * source.scale for name, g in source.gradients().items()}
    need = source.N * source.example_bytes(source.layers)
    kept = need <= source.budget.for_columns
    held: list[Columns] = []
    if kept:
        held = list(source.sweep())

    def pieces() -> Iterator[Columns]:
        if kept:
            yield from held
        else:
            yield from source.sweep()

    shapes = {name: layer.shape for name, layer in source.layers.items()}
    return NetworkFisher(pieces, shapes, source.N, source.R, gradient, source.budget, kept)
