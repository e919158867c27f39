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
from fisher_lab._passes.model import REENTRANT, Forward, plain_kernels

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
    everything = entries(inputs)
    # vmap maps over what every example has its own of; the rest is the same for all
    mapped = [place for place, is_own in enumerate(by_example(inputs)) if is_own]
    mine = tuple(everything[place] for place in mapped)

    def one_example(example: tuple[Tensor, ...], columns: Tensor) -> dict[str, Tensor]:
        """Gradients `{name: [R, *shape]}` of one example for its columns `[R, *output]`."""
        parts = list(everything)
        for place, entry in zip(mapped, example, strict=True):
            parts[place] = entry.unsqueeze(0)  # a batch of one, as the model expects
        one = rebuilt(inputs, parts)
        pull = _pull_back(call, chosen, one)

        def of_column(s: Tensor) -> dict[str, Tensor]:
            (gradients,) = pull(s)
            return gradients

        return vmap(of_column)(columns)

    over_examples = vmap(one_example, in_dims=(0, 1), out_dims=1, randomness="error")
    return over_examples(mine, S)


def _one_by_one(
    call: Pure, chosen: dict[str, Tensor], inputs: Inputs, S: Tensor
) -> dict[str, Tensor]:
    """One example after the other, by plain autograd: torch.func cannot derive every function."""
    R = S.shape[0]
    N = examples_of(inputs)
    params = {}
    found: dict[str, Tensor] = {}
    for name, p in chosen.items():
        copy = p.clone()
        params[name] = copy.requires_grad_()
        found[name] = p.new_zeros(R, N, *p.shape)
    for n in range(N):
        one = taken(inputs, slice(n, n + 1))
        with torch.enable_grad():
            z = call(params, one).squeeze(0)
        for r in range(R):
            gradients = _gradients(z, list(params.values()), S[r, n])
            for name, gradient in zip(params, gradients, strict=True):
                if gradient is not None:  # a parameter that does not reach the output
                    found[name][r, n] = gradient
    return found


def _gradients(z: Tensor, params: list[Tensor], s: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of one example in one direction, None where a parameter does not reach it."""
    try:
        return torch.autograd.grad(z, params, s, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(REENTRANT) from error
        raise


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
    first = _forward_mode
    second = _reverse_mode
    if examples_of(inputs) * size <= SMALL:
        first = _reverse_mode
        second = _forward_mode
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
        terms = []
        for name, direction in V.items():
            products = gradients[name] * direction
            terms.append(_over_numbers(products))
        return torch.stack(terms).sum(0)
    return _over_numbers(S * Jv)


def _over_numbers(x: Tensor) -> Tensor:
    """Sum of x `[R, N, ...]` over the numbers of an example, `[R, N]`."""
    return x.flatten(2).sum(2)


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
        params = {}
        for name, p in chosen.items():
            copy = p.clone()
            params[name] = copy.requires_grad_()
        z = output(params)
        # J^T u is linear in u, so any u will do
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(params.values()), u, create_graph=True)
        terms = []
        for name, gradient in zip(params, pulled, strict=True):
            product = gradient * V[name]
            terms.append(product.sum())
        inner = torch.stack(terms).sum()  # u^T J V
        (Jv,) = torch.autograd.grad(inner, u)
        return z.detach(), Jv


def _pure(forward: Forward, names: list[str]) -> tuple[dict[str, Tensor], Pure]:
    """The named parameters, and the model as a function of them and of inputs.

    Parameters and buffers that modules share are passed under all their names: torch's own tying
    leaves tensors behind where one module has two names.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # by identity: the name in module.named_parameters()
    shared: dict[str, str] = {}
    for prefix, module in forward.module.named_modules():
        own = module._parameters | module._buffers
        for key, tensor in own.items():
            if tensor is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            known = first.setdefault(id(tensor), name)
            if known == name:
                tensors[name] = tensor.detach()
            else:
                shared[name] = known
    chosen = {}
    for name in names:
        chosen[name] = tensors.pop(name)

    def call(params: dict[str, Tensor], inputs: Inputs) -> Tensor:
        everything = tensors | params
        for name, source in shared.items():
            everything[name] = everything[source]
        return forward.of_tensors(everything, inputs)

    return chosen, call
