"""What an optimizer sees of a forward pass.

Layer inputs, and output gradients from one extra backward pass.

The hooks live only inside the `with`. The extra backward goes through the graph that the user's own
loss uses, asks only for the gradients at the layers' outputs, and so touches no `p.grad` and fires
no gradient hook of a parameter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_lab._ground.linalg import kept
from fisher_lab._passes.capture import (
    Placements,
    is_shared,
    learn_placements,
    pull_back,
    pull_back_shared,
    recording,
)
from fisher_lab._passes.labels import Labels, Sampler, output_factors
from fisher_lab._passes.model import Forward
from fisher_lab._passes.placement import Use
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.optim.finite import all_finite
from fisher_lab.statistics import LayerStats


class Watched(NamedTuple):
    """One call of the model: its output, and input and output edge of every use of every layer."""

    z: Tensor
    uses: dict[str, list[Use]]


class Observed(NamedTuple):
    """Statistics of one layer in one forward pass.

    Attributes:
        stats: inputs and output gradients; zero where not ok.
        ok: whether they are finite, a 0-d tensor.
        examples: of how many examples of the data they are.
    """

    stats: LayerStats
    ok: Tensor
    examples: int


@contextmanager
def watching(forward: Forward, layers: dict[str, Layer]) -> Iterator[list[Watched]]:
    """Record every forward pass of the model while the `with` lasts.

    Args:
        forward: the model, and what of its output is z.
        layers: adapters by name.
    """
    forwards: list[Watched] = []
    with _uncompiled(), recording(layers) as uses:

        def finished(module: nn.Module, inputs: Any, z: Any) -> None:  # noqa: ARG001
            own = {}
            for name, found in uses.items():
                own[name] = list(found)
                # the next pass begins anew
                found.clear()
            output = forward.picked(z)
            forwards.append(Watched(output, own))

        handle = forward.module.register_forward_hook(finished)
        try:
            yield forwards
        finally:
            handle.remove()


def _uncompiled() -> AbstractContextManager[Any]:
    """Have compiled models run eagerly, as their hooks would be compiled away."""
    # importing dynamo takes a second, and without it nothing is compiled
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


class Uncompiled(AbstractContextManager[Any]):
    """A context manager whose own code dynamo leaves alone inside a compiled function."""

    def __init__(self, inner: AbstractContextManager[Any]) -> None:
        self._enter = torch.compiler.disable(inner.__enter__)
        self._exit = torch.compiler.disable(inner.__exit__)

    def __enter__(self) -> Any:
        return self._enter()

    def __exit__(self, *error: Any) -> Any:
        return self._exit(*error)


def check_forwards(forwards: list[Watched], likelihood: Likelihood, values: bool = False) -> None:
    """Refuse a window in which nothing usable happened.

    Args:
        forwards: what was recorded.
        likelihood: p(y | z).
        values: whether the outputs' numbers are checked too, which waits for the device.
    """
    if not forwards:
        raise ValueError(
            "observing() recorded no forward pass of the model, expected one inside the `with`; "
            "call the very model that the optimizer was given (not one of its parts, not a copy)."
        )
    for z, _ in forwards:
        likelihood.check_output(z)
        if values:
            likelihood.check_values(z)
        if not z.requires_grad:
            raise ValueError(
                "observing() saw an output without a graph, expected gradients to be recorded; "
                "leave out torch.no_grad() and torch.inference_mode() around the forward pass."
            )


def check_labels(y: Any, examples: int) -> None:
    """Refuse labels that are not one for every example; None stands for none."""
    if y is None:
        return
    if not isinstance(y, Tensor):
        kind = type(y).__name__
        raise TypeError(f"observing() got labels of type {kind}, expected a tensor; convert them.")
    if len(y) != examples:
        raise ValueError(
            f"observing() got {len(y)} labels for {examples} examples, expected as many."
        )


def check_kept(kept: Any, y: Tensor | None) -> None:
    """Refuse a mask that is none, or that comes with labels, which tell as much."""
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        kind = type(kept).__name__
        raise TypeError(
            f"observing() got kept={kind}, expected a tensor of booleans; write kept=y != -100."
        )
    if y is not None:
        raise ValueError(
            "observing() got labels and kept, expected one of the two: labels tell what is "
            "ignored; leave kept out."
        )


def statistics(
    forward: Watched,
    layers: dict[str, Layer],
    likelihood: Likelihood,
    labels: Labels,
    y: Tensor | None,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    placements: Placements,
    sample: Sampler | None = None,
) -> dict[str, Observed]:
    """Statistics of every layer that took part in a forward pass, at labels of the chosen kind.

    Args:
        forward: the recorded pass.
        layers: adapters by name.
        likelihood: p(y | z).
        labels: which Fisher.
        y: the data's labels, where they are known.
        generator: source of sampled labels.
        dtype: of the statistics; None for each layer's own, at least float32.
        placements: of layers whose rows are not the examples, as far as they are known; added to.
        sample: draws labels, where these examples are part of a larger batch.
    """
    z = forward.z.detach()
    finite = all_finite([z])
    # sampling refuses NaN
    safe = kept(finite, z)
    safe = safe.to(statistics_dtype(z.dtype, dtype))
    N = z.shape[0]
    S = output_factors(likelihood, safe, labels, y, generator, N, sample).to(z.dtype)
    learn_placements(forward.z, forward.uses, placements)
    apart: dict[str, Layer] = {}
    shared: dict[str, Layer] = {}
    for name, layer in layers.items():
        group = shared if is_shared(placements.get(name, ())) else apart
        group[name] = layer
    if shared and not labels.draws:
        S = S * _signs(S, generator)
    captured = pull_back(forward.z, S, forward.uses, apart, placements, retain_graph=True)
    captured |= pull_back_shared(forward.z, S, forward.uses, shared)
    found = {}
    for name in layers:  # in their order
        if name in captured:
            found[name] = _observed(layers[name], captured[name], finite, N, dtype)
    return found


def _signs(S: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random sign for every direction and example `[R, N, 1, ...]`.

    Sums over examples then have no mean, as those of sampled labels; second moments of one example
    do not see it.
    """
    size = (*S.shape[:2], *(1,) * (S.ndim - 2))
    bits = torch.randint(0, 2, size, generator=generator, device=S.device)
    return (2 * bits - 1).to(S.dtype)


def statistics_dtype(own: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The chosen precision; by default the tensor's own, but at least float32."""
    return chosen or torch.promote_types(own, torch.float32)


def _observed(
    layer: Layer, stats: LayerStats, finite: Tensor, examples: int, dtype: torch.dtype | None
) -> Observed:
    """Statistics in working precision, zero where they are not finite."""
    first = next(iter(layer.parameters.values()))
    dtype = statistics_dtype(first.dtype, dtype)
    assert stats.a is not None
    a = stats.a.to(dtype)
    g = stats.g.to(dtype)
    ok = finite & all_finite([a, g])
    a = kept(ok, a)
    g = kept(ok, g)
    finite_stats = LayerStats(a, g, layer.kernel, layer.bias)
    return Observed(finite_stats, ok, examples)


def of_batch_mean(stats: LayerStats) -> LayerStats:
    """The batch-mean gradient as one example, times sqrt(N).

    For sampled labels its outer product has mean F.
    """
    if stats.a is None:
        total = stats.g.sum((0, 1))
    else:
        total = torch.einsum("rntqo,ntqi->qoi", stats.g, stats.a)
    # the mean is total / N
    W = total.flatten(0, 1)
    W = W.div_(math.sqrt(stats.N))
    return of_gradient(W, stats.Q, stats.kernel, stats.bias)


def of_gradient(gradient: Tensor, Q: int, kernel: tuple[int, ...], bias: bool) -> LayerStats:
    """One packed gradient `[Q * d_out, d_in]` as the statistics of one example."""
    P = gradient.unflatten(0, (Q, -1))
    # of one output direction and one example
    P = P[None, None]
    return LayerStats.of_gradients(P, kernel, bias)
