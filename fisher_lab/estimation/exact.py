"""The exact Fisher block of any module that has parameters, by torch.func alone.

This is the independent truth: it shares no code with `capture`. Per example, the output columns S (with S S^T the
output Hessian) are pulled back through the model by vmap of vjp, and F = 1/N sum (J^T S)(J^T S)^T is accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fisher_lab._ground.arguments import seed_of
from fisher_lab._ground.memory import budget_bytes, readable
from fisher_lab._passes.batches import Batches
from fisher_lab._passes.model import (
    NOT_FINITE,
    evaluation_copy,
    label_seed,
    per_example_gradients,
    probe,
    sample_labels,
    untouched_randomness,
)
from fisher_lab.layers import select
from fisher_lab.likelihoods import FisherKind, Likelihood, as_likelihood, check_fisher
from fisher_lab.matrices import Dense, FisherMatrix


def exact_fisher(
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
) -> dict[str, FisherMatrix]:
    """Exact Fisher block of every layer, dense.

    Args:
        model: any module that acts per example; it is not changed.
        likelihood: a Likelihood or a torch loss module.
        data: (x, y), x, a DataLoader or an iterable of batches.
        layers: names of modules that own trainable parameters; None for all.
        fisher: "true", "mc" (labels sampled from the model) or "empirical" (the labels given).
        seed: of the sampled labels, which are those that `estimate` and `compare` draw from the same seed.
        dtype: precision of the computation, which runs on a copy.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.

    Returns:
        `{layer: FisherMatrix}`, each over W `[d_out, d_in]` (bias as last column), or W `[P, 1]` for other modules.

    Raises:
        ValueError, TypeError: what cannot be computed or would not fit, in one sentence.
    """
    check_fisher(fisher)
    likelihood, budget, seed = as_likelihood(likelihood), budget_bytes(memory), seed_of(seed)
    model = evaluation_copy(model, dtype, device)
    blocks = select(model, layers, "flatten").layers
    item = torch.finfo(dtype).bits // 8
    need = sum((b.shape[0] * b.shape[1]) ** 2 for b in blocks.values()) * item
    if need > budget:
        raise ValueError(
            f"The dense blocks need {readable(need)}, expected at most {readable(budget)}; name fewer layers, raise "
            "memory=, or use compare, which needs no dense block."
        )
    batches = Batches(data, dtype, next(model.parameters()).device, budget)
    names = [block.full_name(key) for block in blocks.values() for key in block.parameters]
    totals = {name: torch.zeros(()) for name in blocks}
    with untouched_randomness():
        for x, S in _columns(model, likelihood, batches, fisher, seed, budget, names):
            gradients = per_example_gradients(model, names, x, S)
            for name, block in blocks.items():
                tensors = {key: gradients[block.full_name(key)] for key in block.parameters}
                U = block.pack(tensors).flatten(2).flatten(0, 1)
                totals[name] = torch.addmm(totals[name].to(U), U.T, U)
    assert batches.N is not None
    scale = 1.0 if likelihood.summed else 1.0 / batches.N
    return {name: Dense(total * scale, blocks[name].shape) for name, total in totals.items()}


def _columns(
    model: nn.Module,
    likelihood: Likelihood,
    batches: Batches,
    fisher: FisherKind,
    seed: int,
    budget: int,
    names: list[str],
) -> Any:
    """Inputs and output columns `(x [n, ...], S [R, n, *output])` in pieces that fit the memory."""
    numbers = sum(p.numel() for name, p in model.named_parameters() if name in set(names))
    for index, (x, y) in enumerate(batches):
        z = probe(model, x)
        likelihood.check_output(z)
        if y is None:
            likelihood.check_unlabelled(z)
        else:
            likelihood.check_labels(torch.empty(x.shape[0], *z.shape[1:], device="meta"), y)
        R = likelihood.directions(z, fisher)
        chunk = max(1, int(min(budget // 8, 2**28) // (8 * R * numbers)))
        label = y
        if fisher == "mc":
            generator = torch.Generator(x.device).manual_seed(label_seed(seed, index))
            label = sample_labels(model, partial(likelihood.sample, generator=generator), x, chunk)
            label = label if y is None else likelihood.masked(label, y)
        for start in range(0, x.shape[0], chunk):
            piece = slice(start, start + chunk)
            with torch.no_grad():
                z = model(x[piece].clone())
            if not bool(torch.isfinite(z).all()):
                raise ValueError(NOT_FINITE)
            yield x[piece], likelihood.columns(z, fisher, None if label is None else label[piece])
