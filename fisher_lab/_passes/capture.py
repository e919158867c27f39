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

from fisher_lab._passes.model import NOT_FINITE, per_example_gradients, plain_kernels
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import FisherKind, Likelihood
from fisher_lab.statistics import LayerStats

ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative deviations that are rounding


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
    verify: bool = False,
) -> dict[str, LayerStats]:
    """LayerStats of every layer for one batch.

    Args:
        model: the model, acting per example.
        layers: adapters of modules of this model.
        likelihood: p(y | z).
        x: inputs `[N, ...]`.
        fisher: which Fisher.
        y: the labels for "empirical", labels sampled from the model for "mc"; see `Likelihood.columns`.
        verify: check that an example's output does not depend on the batch, and that the gradients found by hooks add
            up to autograd's, which they do not where a weight is used behind the hooks' back.

    Raises:
        ValueError: a layer that is not used, or that sees a number of examples other than N; what `verify` finds.
    """
    if x.shape[0] == 1 and any(isinstance(m, _InstanceNorm) for m in model.modules()):
        # torch's backward of InstanceNorm is wrong for one example and a gradient with channels last, not for two
        twice = capture(
            model, layers, likelihood, torch.cat([x, x]), fisher, None if y is None else torch.cat([y, y]), verify
        )
        return {name: stats.examples(slice(0, 1)) for name, stats in twice.items()}
    hooked = {name: layer for name, layer in layers.items() if not layer.gradient_form}
    with torch.enable_grad(), recording(hooked) as uses:
        z = model(x.clone())  # the first operation may work in place
    if not bool(torch.isfinite(z).all()):
        raise ValueError(NOT_FINITE)
    S = likelihood.columns(z, fisher, y)
    found = _by_hooks(z, S, uses, hooked, retain_graph=verify)
    if verify:
        _check_batch(model, x, z.detach())
        _check_total(z, S, hooked, found)
    found |= _by_gradients(model, layers, x, S)
    return {name: found[name] for name in layers}


def _check_batch(model: nn.Module, x: Tensor, z: Tensor) -> None:
    with torch.no_grad(), plain_kernels():
        alone = model(x[:1].clone())
    change = float((alone - z[:1]).norm() / z.norm().clamp(min=torch.finfo(z.dtype).tiny))
    if not change <= ALLOWED.get(z.dtype, 1e-2):
        raise ValueError(
            f"The output for an example changes by {change:.1e} with the batch around it, expected at most "
            f"{ALLOWED.get(z.dtype, 1e-2):g}: examples interact or the model is random; call model.eval(), or remove "
            "what mixes examples."
        )


def _check_total(z: Tensor, S: Tensor, layers: dict[str, Layer], found: dict[str, LayerStats]) -> None:
    """The sum of all captured gradients of a layer is autograd's gradient of its parameters, or ValueError."""
    parameters = [p for layer in layers.values() for p in layer.parameters.values()]
    if not parameters:
        return
    allowed, eps = ALLOWED.get(z.dtype, 1e-2), torch.finfo(z.dtype)
    totals = iter(torch.autograd.grad(z, parameters, S.sum(0), allow_unused=True))
    sizes = {name: _size_of_terms(found[name]) for name in layers}
    # where gradients cancel (a mean behind a norm layer), rounding on the scale of the largest is all there is
    floor = max(1e4 * eps.eps / allowed * max(sizes.values()), eps.tiny)
    for name, layer in layers.items():
        pairs = [(key, p, next(totals)) for key, p in layer.parameters.items()]
        expected = layer.pack({key: torch.zeros_like(p) if total is None else total for key, p, total in pairs})
        ones = S.new_ones(S.shape[:2])
        deviation = float((found[name].combine(ones) - expected).norm()) / max(sizes[name], floor)
        if not deviation <= allowed:
            raise ValueError(
                f"The gradients captured for layer {name!r} deviate from autograd's by {deviation:.1e}, expected at "
                f"most {allowed:g}: its weight is used in a way hooks do not see; use exact_fisher, or leave the layer "
                "out."
            )


def _size_of_terms(stats: LayerStats) -> float:
    """Size of what may cancel in the sum of all gradients."""
    assert stats.a is not None
    return float((stats.a.flatten(1).norm(dim=1) * stats.g.sum(0).flatten(1).norm(dim=1)).sum())


def _by_hooks(
    z: Tensor, S: Tensor, uses: dict[str, list[Use]], layers: dict[str, Layer], retain_graph: bool
) -> dict[str, LayerStats]:
    """Stats of the layers whose uses were recorded; several uses are so many more positions.

    Args:
        z: model output `[N, *output]`.
        S: output columns `[R, N, *output]`.
        uses: from `recording`.
        layers: the layers' adapters.
        retain_graph: whether the graph is needed again.
    """
    _check_used(uses, layers)
    edges = [use.edge for found in uses.values() for use in found]
    if not edges:
        return {}
    gradients = iter(torch.autograd.grad(z, edges, S, retain_graph, is_grads_batched=True, allow_unused=True))
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
