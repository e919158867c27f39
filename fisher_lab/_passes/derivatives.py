"""Derivatives by torch.func: per-example gradients, and the derivative of the output in one
direction.

Nothing here knows of layers or hooks, so that it can check what `capture` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_lab._passes.batches import Inputs, by_example, entries, examples_of, rebuilt, taken
from fisher_lab._passes.model import Forward, plain_kernels

SMALL = 10**8  # examples times parameters up to which reverse mode twice takes no time

Pure = Callable[[dict[str, Tensor], Inputs], Tensor]
Output = Callable[[dict[str, Tensor]], Tensor]


def per_example_gradients(
    forward: Forward, names: list[str], inputs: Inputs, S: Tensor
) -> dict[str, Tensor]:
    """S_rn^T J_n for the named parameters: `{name: [R, N, *shape]}`, by vmap of vjp.

    Where an operation cannot be vectorised (recurrent layers, branches on data), example by
    example.

    Args:
        forward: the model, acting per example.
        names: parameter names.
        inputs: of N examples.
        S: output factors `[R, N, *output]`.
    """
    chosen, call = _pure(forward, names)
    with plain_kernels(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes that an operation is vectorised by a loop
        try:
            return _vectorised(call, chosen, inputs, S)
        except (RuntimeError, ValueError, TypeError):
            # ValueError and TypeError: models that look at shapes or values of their inputs may
            # refuse those of vmap
            return _one_by_one(call, chosen, inputs, S)


def _vectorised(
    call: Pure, chosen: dict[str, Tensor], inputs: Inputs, S: Tensor
) -> dict[str, Tensor]:
    """All examples in one pass."""
    own = by_example(inputs)
    shared = entries(inputs)
    mine = tuple(entry for entry, is_own in zip(shared, own, strict=True) if is_own)

    def one_example(example: tuple[Tensor, ...], columns: Tensor) -> dict[str, Tensor]:
        rest = iter(example)
        parts = []
        for entry, is_own in zip(shared, own, strict=True):
            parts.append(next(rest).unsqueeze(0) if is_own else entry)
        pull = _pull_back(call, chosen, rebuilt(inputs, parts))
        return vmap(lambda s: pull(s)[0])(columns)

    return vmap(one_example, in_dims=(0, 1), out_dims=1, randomness="error")(mine, S)


def _one_by_one(
    call: Pure, chosen: dict[str, Tensor], inputs: Inputs, S: Tensor
) -> dict[str, Tensor]:
    """One example after the other."""
    examples = []
    for n in range(examples_of(inputs)):
        pull = _pull_back(call, chosen, taken(inputs, slice(n, n + 1)))
        examples.append([pull(s)[0] for s in S[:, n]])
    found = {}
    for name in chosen:
        columns = [torch.stack([gradient[name] for gradient in row]) for row in examples]
        found[name] = torch.stack(columns, 1)
    return found


def _pull_back(call: Pure, chosen: dict[str, Tensor], one: Inputs) -> Any:
    """The pull-back of one example's output `[*output]` to the chosen parameters."""

    def output(params: dict[str, Tensor]) -> Tensor:
        return call(params, one).squeeze(0)

    return vjp(output, chosen)[1]


def directional_derivative(
    forward: Forward, V: dict[str, Tensor], inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """Output z `[N, *output]` and its derivative J V `[N, *output]` in the direction V of the named
    parameters.

    In forward mode, whose first use loads modules for two seconds; small models derive the gradient
    again instead, and so do operations without forward mode.
    """
    chosen, call = _pure(forward, list(V))

    def output(params: dict[str, Tensor]) -> Tensor:
        return call(params, inputs)

    size = sum(p.numel() for p in forward.module.parameters())
    first, second = _forward_mode, _reverse_mode
    if examples_of(inputs) * size <= SMALL:
        first, second = _reverse_mode, _forward_mode
    try:
        return first(output, chosen, V)
    except (NotImplementedError, RuntimeError):
        return second(output, chosen, V)


def column_derivatives(forward: Forward, V: dict[str, Tensor], inputs: Inputs, S: Tensor) -> Tensor:
    """S_rn^T J_n V `[R, N]` by derivatives in the direction V, or by per-example gradients where
    there are none.

    Args:
        forward: the model.
        V: a direction, by parameter.
        inputs: of N examples.
        S: output factors `[R, N, *output]`.
    """
    try:
        _, Jv = directional_derivative(forward, V, inputs)
    # operations with neither forward mode nor a second derivative
    except (NotImplementedError, RuntimeError):
        gradients = per_example_gradients(forward, list(V), inputs, S)
        terms = [(gradients[name] * direction).flatten(2).sum(2) for name, direction in V.items()]
        return torch.stack(terms).sum(0)
    return (S * Jv).flatten(2).sum(2)


def _forward_mode(
    output: Output, chosen: dict[str, Tensor], V: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with plain_kernels(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of the first use of forward mode
        derived = jvp(output, (chosen,), (V,))
        return derived[0], derived[1]


def _reverse_mode(
    output: Output, chosen: dict[str, Tensor], V: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """J V as the derivative of u -> J^T u, contracted with V."""
    with plain_kernels(), torch.enable_grad():
        params = {name: p.clone().requires_grad_() for name, p in chosen.items()}
        z = output(params)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(params.values()), u, create_graph=True)
        terms = [(g * V[name]).sum() for name, g in zip(params, pulled, strict=True)]
        inner = torch.stack(terms).sum()
        return z.detach(), torch.autograd.grad(inner, u)[0]


def _pure(forward: Forward, names: list[str]) -> tuple[dict[str, Tensor], Pure]:
    """The named parameters, and the model as a function of them and of inputs.

    Parameters and buffers that modules share are passed under all their names: torch's own tying
    leaves tensors behind where one module has two names.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # by identity: the name in module.named_parameters()
    shared: dict[str, str] = {}
    for prefix, module in forward.module.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            known = first.setdefault(id(tensor), name)
            if known == name:
                tensors[name] = tensor.detach()
            else:
                shared[name] = known
    chosen = {name: tensors.pop(name) for name in names}

    def call(params: dict[str, Tensor], inputs: Inputs) -> Tensor:
        everything = tensors | params
        for name, source in shared.items():
            everything[name] = everything[source]
        return forward.of_tensors(everything, inputs)

    return chosen, call
