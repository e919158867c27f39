"""From a model and a batch to {layer: LayerStats}: forward hooks for the inputs, one batched vjp for the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisher_lab.layers import Layer
from fisher_lab.likelihoods import FisherKind, Likelihood
from fisher_lab.stats import LayerStats


@contextmanager
def recording(layers: dict[str, Layer]) -> Iterator[dict[str, list[tuple[Tensor, GradientEdge]]]]:
    """Record, for every use of every layer, its unrolled input and the edge at which its output gradient arrives.

    The edge belongs to the output as the layer returned it, so an in-place activation behind the layer changes
    nothing. The hooks are gone when the `with` ends, also after an exception.
    """
    uses: dict[str, list[tuple[Tensor, GradientEdge]]] = {name: [] for name in layers}
    handles = []

    def hook_for(name: str, layer: Layer) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
            if output.requires_grad:
                uses[name].append((layer.unroll_input(inputs[0].detach()), get_gradient_edge(output)))

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.module.register_forward_hook(hook_for(name, layer)))
        yield uses
    finally:
        for handle in handles:
            handle.remove()


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
        y: the labels for "empirical", labels sampled from the model for "mc".

    Raises:
        ValueError: a layer that is not used, or that sees a number of examples other than N.
    """
    with torch.enable_grad(), recording(layers) as uses:
        z = model(x)
    if not bool(torch.isfinite(z).all()):
        raise ValueError(
            "The model returned NaN or infinite outputs, expected finite ones; check inputs and parameters."
        )
    S = likelihood.columns(z, fisher, y)
    edges = [edge for found in uses.values() for _, edge in found]
    _check_used(uses, layers)
    gradients = iter(torch.autograd.grad(z, edges, S, is_grads_batched=True, allow_unused=True))
    stats = {}
    for name, layer in layers.items():
        parts = []
        for a, _ in uses[name]:
            g = next(gradients)
            if a.shape[0] != x.shape[0]:
                raise ValueError(
                    f"Layer {name!r} sees {a.shape[0]} examples for a batch of {x.shape[0]}, expected its first "
                    "dimension to be the examples; keep [N, ...] in the model or measure other layers."
                )
            if g is not None:  # None: this use does not reach the output
                parts.append((a, layer.unroll_gradient(g)))
        if not parts:
            raise ValueError(
                f"Layer {name!r} does not influence the model's output, expected that it does; leave it out."
            )
        a = torch.cat([a for a, _ in parts], 1) if len(parts) > 1 else parts[0][0]
        g = torch.cat([g for _, g in parts], 2) if len(parts) > 1 else parts[0][1]
        stats[name] = LayerStats(a, g.detach(), layer.kernel, layer.bias)
    return stats


def _check_used(uses: dict[str, list[Any]], layers: dict[str, Layer]) -> None:
    for name, found in uses.items():
        if not found:
            raise ValueError(
                f"Layer {name!r} ({type(layers[name].module).__name__}) was not called in the forward pass or its output "
                "needs no gradient, expected a layer in use; leave it out with layers=[...]."
            )
