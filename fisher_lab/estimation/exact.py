"""The exact Fisher block of any module that has parameters, by torch.func alone.

This is the independent truth: it shares no code with `capture`. Per example, the output columns S
(with S S^T the output Hessian) are pulled back through the model by vmap of vjp, and F = 1/N sum
(J^T S)(J^T S)^T is accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.memory import Budget, readable
from fisher_lab._passes.batches import LABELS, Inputs
from fisher_lab._passes.capture import check_examples_apart, check_output
from fisher_lab._passes.derivatives import per_example_gradients
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import (
    Output,
    lowest_precision,
    outputs_of,
    probe,
    untouched_randomness,
)
from fisher_lab._passes.setup import Prepared, Setup
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import Dense, FisherMatrix

LARGEST_JACOBIAN = 2**28  # most bytes of per-example gradients at once: more makes no pass faster


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
    labels: str = LABELS,
    output: Output | None = None,
) -> dict[str, FisherMatrix]:
    """Exact Fisher block of every layer, dense.

    Every argument is that of `compare`; sampled labels are those that `estimate` and `compare` draw
    from the same seed.

    Args:
        model: any module that acts per example; it is not changed.
        likelihood: a Likelihood or a torch loss module.
        data: (inputs, y), inputs, a DataLoader or an iterable of batches.
        layers: names of modules that own trainable parameters; None for all.
        fisher: "true", "mc" or "empirical".
        seed: of the sampled labels.
        dtype: precision of the computation, which runs on a copy.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z.

    Returns:
        `{layer: FisherMatrix}`, each over W `[d_out, d_in]` (bias as last column), or W `[P, 1]`
        for other modules.

    Raises:
        ValueError, TypeError: what cannot be computed or would not fit, in one sentence.
    """
    setup = Setup(
        model, likelihood, data, layers=layers, fisher=fisher, seed=seed, dtype=dtype, device=device,
        memory=memory, on_unknown="flatten", labels=labels, output=output,
    )  # fmt: skip
    prepared = setup.prepared()
    return exact_blocks(prepared, prepared.selection.layers)


def exact_blocks(prepared: Prepared, blocks: dict[str, Layer]) -> dict[str, FisherMatrix]:
    """The dense blocks of a question.

    Args:
        prepared: the question.
        blocks: adapters by name, which say how parameters form W.

    Raises:
        ValueError: if the blocks do not fit the memory.
    """
    _check_memory(blocks, prepared.budget, prepared.dtype)
    names = []
    for block in blocks.values():
        names += [block.full_name(key) for key in block.parameters]
    totals: dict[str, Tensor] = {name: torch.zeros(()) for name in blocks}
    with untouched_randomness():
        for inputs, S in _pieces(prepared, names):
            gradients = per_example_gradients(prepared.forward, names, inputs, S)
            for name, block in blocks.items():
                tensors = {key: gradients[block.full_name(key)] for key in block.parameters}
                P = block.pack(tensors)  # [R, n, Q d_out, d_in]
                U = P.flatten(2).flatten(0, 1)
                totals[name] = torch.addmm(totals[name].to(U), U.T, U)
    N = prepared.batches.counted()
    return {name: Dense(total / N, blocks[name].shape) for name, total in totals.items()}


def _check_memory(blocks: dict[str, Layer], budget: Budget, dtype: torch.dtype) -> None:
    itemsize = torch.finfo(dtype).bits // 8
    need = 0
    for block in blocks.values():
        d = block.shape[0] * block.shape[1]
        need += d**2 * itemsize
    if need > budget.total:
        raise ValueError(
            f"The dense blocks need {readable(need)}, expected at most {readable(budget.total)}; "
            "name fewer layers, raise memory=, or use compare, which needs no dense block."
        )


def _pieces(prepared: Prepared, names: list[str]) -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs of n examples and their output factors S `[R, n, *output]`, in pieces that fit the
    memory.
    """
    forward = prepared.forward
    likelihood = prepared.likelihood
    labels = prepared.labels
    # sums need it before the first piece
    N = prepared.batches.counted() if likelihood.summed else None
    wanted = set(names)
    numbers = sum(p.numel() for name, p in forward.module.named_parameters() if name in wanted)
    for batch in prepared.batches:
        z = probe(forward, batch)
        likelihood.check_output(z)
        if batch.y is None:
            likelihood.check_unlabelled(z)
            labels.check_unlabelled()
        else:
            like_outputs = torch.empty(batch.N, *z.shape[1:], device="meta")
            likelihood.check_labels(like_outputs, batch.y)
        R = labels.directions(likelihood, z)
        _check_factors(R, z, prepared.budget)
        room = min(prepared.budget.for_jacobian, LARGEST_JACOBIAN)
        chunk = max(1, room // (8 * R * max(numbers, z.numel())))
        label = labels.draw(
            likelihood, outputs_of(forward, batch, tuple(z.shape[1:]), chunk), batch.index
        )
        for start in range(0, batch.N, chunk):
            some = slice(start, start + chunk)
            piece = batch.part(some)
            with torch.no_grad():
                z = forward(piece.inputs)
            check_output(z, piece.N)
            if start == 0:
                inside = lowest_precision(forward, piece, prepared.dtype)
                check_examples_apart(replace(forward, inside=inside), piece.inputs, z)
            own = None if label is None else label[some]
            yield piece.inputs, labels.factors(likelihood, z, own, piece.y, N)


def _check_factors(R: int, z: Tensor, budget: Budget) -> None:
    """Refuse output factors that do not fit for one example."""
    need = R * z.numel() * z.element_size()
    if need > budget.total:
        raise ValueError(
            f"The output factors of one example with R = {R} directions need {readable(need)}, "
            "expected at most "
            f'{readable(budget.total)}; use fisher="mc", whose R is 1, or raise memory=.'
        )
