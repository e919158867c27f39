"""From a model and a batch to {layer: LayerStats}: forward hooks for the inputs, one batched vjp for the gradients.

Layers in gradient form have no hooks: their per-example gradients come from torch.func.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.instancenorm import _InstanceNorm

from fisher_lab.functional import NOT_FINITE, per_example_gradients, plain_kernels
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import FisherKind, Likelihood
from fisher_lab.stats import LayerStats


class Use(NamedTuple):
    """One call of a layer: its adapter, its unrolled input `[N, T, Q, d_in]` and where its output gradient arrives."""

    layer: Layer
    a: Tensor
    edge: GradientEdge


@contextmanager
def recording(layers: dict[str, Layer]) -> Iterator[dict[str, list[Use]]]:
    """Record, for every use of every layer, its unrolled input and the edge at which its output gradient arrives.

    The edge belongs to the output as the layer returned it, so an in-place activation behind the layer changes
    nothing. The hooks are gone when the `with` ends, also after an exception.
    """
    uses: dict[str, list[Use]] = {name: [] for name in layers}
    handles = []

    def hook_for(name: str, layer: Layer) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                a = layer.unroll_input(first_input(inputs, named).detach())
                uses[name].append(Use(layer, a, get_gradient_edge(output)))

        return hook

    try:
        for name, layer in layers.items():
            for use in layer.uses:  # first in line, before hooks of the user's that change inputs or outputs
                hook = hook_for(name, use)
                handles.append(use.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        with plain_kernels():
            yield uses
    finally:
        for handle in handles:
            handle.remove()


def first_input(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The input of a module called as `layer(x)` or as `layer(input=x)`."""
    return inputs[0] if inputs else next(iter(named.values()))


def capture(
    model: nn.Module,
    layers: dict[str, Layer],
    likelihood: Likelihood,
    x: Tensor,
    fisher: FisherKind,
    y: Tensor | None = None,
) -> dict[str, LayerStats]:
    """LayerStats of every layer for one batch.

    Args:
        model: the model, acting per example.
        layers: adapters of modules of this model.
        likelihood: p(y | z).
        x: inputs `[N, ...]`.
        fisher: which Fisher.
        y: the labels for "empirical", labels sampled from the model for "mc"; see `Likelihood.columns`.

    Raises:
        ValueError: a layer that is not used, or that sees a number of examples other than N.
    """
    if x.shape[0] == 1 and any(isinstance(m, _InstanceNorm) for m in model.modules()):
        # torch's backward of InstanceNorm is wrong for one example and a gradient with channels last, not for two
        twice = capture(model, layers, likelihood, torch.cat([x, x]), fisher, None if y is None else torch.cat([y, y]))
        return {name: stats.examples(slice(0, 1)) for name, stats in twice.items()}
    hooked = {name: layer for name, layer in layers.items() if not layer.gradient_form}
    with torch.enable_grad(), recording(hooked) as uses:
        z = model(x.clone())  # the first operation may work in place
    if not bool(torch.isfinite(z).all()):
        raise ValueError(NOT_FINITE)
    S = likelihood.columns(z, fisher, y)
    found = _by_hooks(z, S, uses, hooked) | _by_gradients(model, layers, x, S)
    return {name: found[name] for name in layers}


def _by_hooks(z: Tensor, S: Tensor, uses: dict[str, list[Use]], layers: dict[str, Layer]) -> dict[str, LayerStats]:
    """Stats of the layers whose uses were recorded; several uses are so many more positions.

    Args:
        z: model output `[N, *output]`.
        S: output columns `[R, N, *output]`.
        uses: from `recording`.
        layers: the layers' adapters.
    """
    _check_used(uses, layers)
    edges = [use.edge for found in uses.values() for use in found]
    if not edges:
        return {}
    gradients = iter(torch.autograd.grad(z, edges, S, is_grads_batched=True, allow_unused=True))
    stats = {}
    for name, layer in layers.items():
        parts = []
        for use in uses[name]:
            g = next(gradients)
            check_examples(name, use.a.shape[0], z.shape[0])
            if g is not None:  # None: this use does not reach the output
                parts.append((use.a, use.layer.unroll_gradient(g)))
        if not parts:
            raise ValueError(
                f"Layer {name!r} does not influence the model's output, expected that it does; leave it out."
            )
        a = torch.cat([a for a, _ in parts], 1) if len(parts) > 1 else parts[0][0]
        g = torch.cat([g for _, g in parts], 2) if len(parts) > 1 else parts[0][1]
        stats[name] = LayerStats(a, g.detach(), layer.kernel, layer.bias)
    return stats


def check_examples(name: str, seen: int, N: int) -> None:
    """Raise ValueError where the first dimension of a layer's input is not the examples."""
    if seen != N:
        raise ValueError(
            f"Layer {name!r} sees {seen} examples for a batch of {N}, expected its first dimension to be the examples; "
            "keep [N, ...] in the model (expand what all examples share, such as positions) or measure other layers."
        )


def _by_gradients(model: nn.Module, layers: dict[str, Layer], x: Tensor, S: Tensor) -> dict[str, LayerStats]:
    """Stats of the layers in gradient form: a = 1, g = their per-example gradients."""
    flat = {name: layer for name, layer in layers.items() if layer.gradient_form}
    names = [layer.full_name(key) for layer in flat.values() for key in layer.parameters]
    if not names:
        return {}
    gradients = per_example_gradients(model, names, x, S)
    stats = {}
    for name, layer in flat.items():
        P = layer.pack({key: gradients[layer.full_name(key)] for key in layer.parameters}).detach()
        stats[name] = LayerStats(layer.unroll_input(x), layer.unroll_gradient(P), layer.kernel, layer.bias)
    return stats


def _check_used(uses: dict[str, list[Use]], layers: dict[str, Layer]) -> None:
    for name, found in uses.items():
        if not found:
            raise ValueError(
                f"Layer {name!r} ({type(layers[name].module).__name__}) was not called in the forward pass or its "
                "output needs no gradient, expected a layer in use; leave it out with layers=[...]."
            )
