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
from fisher_lab._ground.ranks import dealt, in_order, ranks_of
from fisher_lab._passes.batches import LABELS, Batch, Inputs
from fisher_lab._passes.capture import check_examples_apart, check_output
from fisher_lab._passes.derivatives import per_example_gradients
from fisher_lab._passes.labels import FisherKind, check_output_factors
from fisher_lab._passes.model import (
    Output,
    lowest_precision,
    outputs_of,
    probe,
    untouched_randomness,
)
from fisher_lab._passes.setup import Prepared, Setup, check_asked_alike
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
    group: Any = None,
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
        group: the processes that share the work, as in `compare`.

    Returns:
        `{layer: FisherMatrix}`, each over W `[d_out, d_in]` (bias as last column), or W `[P, 1]`
        for other modules.

    Raises:
        ValueError, TypeError: what cannot be computed or would not fit, in one sentence.

    Example:
        >>> F = fl.exact_fisher(model, loss, (x, y))
        >>> sorted(F), F["0"].shape
        (['0', '2'], (6, 9))
    """
    ranks = ranks_of(group)
    setup = Setup.of(locals(), memory=ranks.memory(memory), on_unknown="flatten")
    prepared = ranks.agreed(setup.prepared)
    check_asked_alike(prepared, ranks)
    blocks = prepared.selection.layers
    # the product of its columns, which is a block's whole work
    costs = {}
    for name, block in blocks.items():
        costs[name] = float(block.shape[0] * block.shape[1]) ** 2
    own = dealt(costs, ranks.count)[ranks.own]
    parts = ranks.gathered(lambda: exact_blocks(prepared, blocks, own))
    return in_order(blocks, parts)


def exact_blocks(
    prepared: Prepared, blocks: dict[str, Layer], chosen: Sequence[str] | None = None
) -> dict[str, FisherMatrix]:
    """The dense blocks of a question.

    Args:
        prepared: the question.
        blocks: adapters by name, which say how parameters form W.
        chosen: names of the blocks that are formed, in the pieces in which all would be; None for
            all.

    Raises:
        ValueError: if the blocks do not fit the memory.
    """
    _check_memory(blocks, prepared.budget, prepared.dtype)
    names: list[str] = []
    for block in blocks.values():
        names += map(block.full_name, block.parameters)
    own = blocks
    if chosen is not None:
        own = {name: blocks[name] for name in blocks if name in chosen}
    if not own:
        return {}
    wanted: list[str] = []
    for block in own.values():
        wanted += map(block.full_name, block.parameters)
    zero = torch.zeros(())
    totals: dict[str, Tensor] = dict.fromkeys(own, zero)
    with untouched_randomness():
        for inputs, S in _pieces(prepared, names):
            gradients = per_example_gradients(prepared.forward, wanted, inputs, S)
            for name, block in own.items():
                tensors = {}
                for key in block.parameters:
                    tensors[key] = gradients[block.full_name(key)]
                P = block.pack(tensors)  # [R, n, Q d_out, d_in]
                # one row for every direction of every example: F = 1/N U^T U
                U = P.flatten(2).flatten(0, 1)
                total = totals[name].to(U)
                totals[name] = torch.addmm(total, U.T, U)
    N = prepared.batches.counted()
    found: dict[str, FisherMatrix] = {}
    for name, total in totals.items():
        found[name] = Dense(total / N, blocks[name].shape)
    return found


def _check_memory(blocks: dict[str, Layer], budget: Budget, dtype: torch.dtype) -> None:
    itemsize = torch.finfo(dtype).bits // 8
    need = 0
    for block in blocks.values():
        d_out, d_in = block.shape
        d = d_out * d_in
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
    N = None
    if likelihood.summed:
        N = prepared.batches.counted()  # before the first piece, whose factors have it inside
    wanted = set(names)
    numbers = 0
    for name, parameter in forward.module.named_parameters():
        if name in wanted:
            numbers += parameter.numel()
    for batch in prepared.batches:
        z = probe(forward, batch)
        _check_batch(prepared, batch, z)
        output = tuple(z.shape[1:])
        scaled = likelihood.of_batch(batch.y)
        R = labels.directions(likelihood, z)
        check_output_factors(R, z, prepared.budget)
        # per-example gradients of all parameters, or the factors themselves where these are more
        of_example = R * max(numbers, z.numel()) * z.element_size()
        room = min(prepared.budget.for_jacobian, LARGEST_JACOBIAN)
        chunk = max(1, room // of_example)
        outputs = outputs_of(forward, batch, output, chunk)
        label = labels.draw(likelihood, outputs, batch.index)
        for start in range(0, batch.N, chunk):
            some = slice(start, start + chunk)
            piece = batch.part(some)
            with torch.no_grad():
                z = forward(piece.inputs)
            check_output(z, piece.N)
            likelihood.check_values(z)
            if start == 0:
                inside = lowest_precision(forward, piece, prepared.dtype)
                seen = replace(forward, inside=inside)
                check_examples_apart(seen, piece.inputs, z)
            own = None
            if label is not None:
                own = label[some]
            S = labels.factors(scaled, z, own, piece.y, N)
            yield piece.inputs, S


def _check_batch(prepared: Prepared, batch: Batch, z: Tensor) -> None:
    """Refuse outputs and labels that do not fit the likelihood and the kind of Fisher.

    Args:
        prepared: the question.
        batch: of the data.
        z: the output of one of its examples.
    """
    likelihood = prepared.likelihood
    likelihood.check_output(z)
    if batch.y is None:
        likelihood.check_unlabelled(z)
        prepared.labels.check_unlabelled()
        return
    # labels are checked by shape: no output needs to be computed
    like_outputs = torch.empty(batch.N, *z.shape[1:], device="meta")
    likelihood.check_labels(like_outputs, batch.y)
