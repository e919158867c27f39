"""From a model and a batch to {layer: LayerStats}: forward hooks for the inputs, one batched vjp
for the gradients.

    recording    z = model(inputs)     a of every use of a layer, and where its gradient arrives
                 S = factors(z)        output factors, see `labels`
    pull_back    g = S^T dz/d(output)  one backward pass for all layers and directions
    assembled    LayerStats(a, g)      rows in the order of the examples, uses as further positions

Layers in gradient form have no hooks: their per-example gradients come from torch.func. `compare`,
`estimate`, the gradients of the damped measures and the optimizers' `observing` all go this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.instancenorm import _InstanceNorm

from fisher_lab._passes.batches import Batch, Inputs, doubled, examples_of, taken
from fisher_lab._passes.derivatives import per_example_gradients
from fisher_lab._passes.model import NOT_FINITE, REENTRANT, Forward, plain_kernels, probe
from fisher_lab._passes.placement import (
    MOST_EXAMPLES,
    Placement,
    Use,
    fits,
    gradients_at,
    owners,
    placed,
    placement_of,
)
from fisher_lab._passes.vocabulary import Part, of_vocabulary
from fisher_lab.layers import EmbeddingLayer, Layer, VocabularyLayer
from fisher_lab.statistics import LayerStats, VocabularyStats, sums_over

Factors = Callable[[Tensor], Tensor]  # outputs z [N, *output] -> output factors S [R, N, *output]
Placements = dict[str, list[Placement]]  # for every layer the placement of each of its uses


@contextmanager
def recording(
    layers: dict[str, Layer], placements: Placements | None = None, N: int = 1
) -> Iterator[dict[str, list[Use]]]:
    """Record, for every use of every layer, its unrolled input and the edge at which its output
    gradient arrives.

    Args:
        layers: adapters by name.
        placements: of the uses of these layers, as far as they are known; inputs that all examples
            share are expanded.
        N: number of examples.
    """
    uses: dict[str, list[Use]] = {name: [] for name in layers}

    def used(name: str, use: Use, output: Tensor) -> None:  # noqa: ARG001
        uses[name].append(use)

    with hooked(layers, used, placements, N), plain_kernels():
        yield uses


@contextmanager
def hooked(
    layers: dict[str, Layer],
    used: Callable[[str, Use, Tensor], None],
    placements: Placements | None = None,
    N: int = 1,
) -> Iterator[None]:
    """Hand over every use of every layer as it happens; uses without a graph are left out.

    The edge belongs to the output as the layer returned it, so an in-place activation behind the
    layer changes nothing. The hooks are gone when the `with` ends, also after an exception.

    Args:
        layers: adapters by name.
        used: gets the layer's name, the use and the output.
        placements: as `recording`'s.
        N: number of examples.
    """
    known = placements or {}
    # first in line, before hooks of the user's that change inputs or outputs
    options: dict[str, bool] = {"prepend": True, "with_kwargs": True}
    handles = []
    try:
        for name, layer in layers.items():
            kinds = known.get(name, [])
            for use in layer.uses:
                if Placement.SHARED in kinds:
                    expand = _expanding(kinds, N)
                    handle = use.module.register_forward_pre_hook(expand, **options)
                    handles.append(handle)
                hook = _hook(name, use, used)
                handle = use.module.register_forward_hook(hook, **options)
                handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, layer: Layer, used: Callable[[str, Use, Tensor], None]) -> Any:
    """A forward hook that hands over one use."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = first_input(inputs, named)
        _check_call(name, x, output)
        a = layer.unroll_input(x.detach())
        edge = get_gradient_edge(output)
        used(name, Use(layer, a, edge), output)

    return hook


def _check_call(name: str, x: Tensor, output: Tensor) -> None:
    """Refuse calls of a layer from which its inputs cannot be read."""
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        raise ValueError(
            f"Layer {name!r} is called inside a transform of torch.func (vmap, grad), expected a "
            "call with the examples; use exact_fisher, or leave the layer out with layers=[...]."
        )
    if x.layout != torch.strided:
        raise ValueError(
            f"Layer {name!r} got an input of layout {x.layout}, expected a dense tensor; call "
            ".to_dense()."
        )


def _expanding(kinds: list[Placement], N: int) -> Any:
    """A hook before a layer that gives every example a row of its own where they share one."""
    calls = iter(kinds)

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if next(calls, None) is not Placement.SHARED:
            return None
        x = first_input(inputs, named)
        expanded = x.expand(N, *x.shape[1:])
        if inputs:
            return (expanded, *inputs[1:]), named
        first = next(iter(named))
        return inputs, {**named, first: expanded}

    return hook


def first_input(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The input of a module called as `layer(x)` or as `layer(input=x)`."""
    if inputs:
        return inputs[0]
    return next(iter(named.values()))


# -- how the rows of the layers belong to the examples ---------------------------------------------
def find_placements(
    forward: Forward, layers: dict[str, Layer], batch: Batch, most_numbers: float = math.inf
) -> Placements:
    """The placement of every use of every layer, found on the first examples of a batch.

    Args:
        forward: the model.
        layers: adapters by name; those in gradient form need none.
        batch: some examples.
        most_numbers: in what is alive meanwhile.

    Raises:
        ValueError: examples that interact, or a model that is random.
    """
    hooked, _ = by_form(layers)
    N = min(batch.N, _examples_to_place(forward, batch, most_numbers))
    some = batch.part(slice(0, N)).inputs
    with torch.enable_grad(), recording(hooked) as uses:
        z = forward(some)
    check_output(z, N)
    _check_graph(z)
    check_examples_apart(forward, some, z.detach())
    every = list(chain.from_iterable(uses.values()))
    found_owners: list[Tensor] = []
    if every:
        found_owners = owners(z, every)  # of all layers in one pass
    by_use = iter(found_owners)
    found: Placements = {}
    for name, of_layer in uses.items():
        found[name] = []
        for use in of_layer:
            M, T = use.a.shape[:2]
            kind = placement_of(next(by_use), M, T, N)
            found[name].append(kind)
        if not of_layer and _influences(layers[name], z):
            found[name].append(Placement.UNSEEN)
    _check_expansions(forward, hooked, some, z.detach(), found)
    return found


def _influences(layer: Layer, z: Tensor) -> bool:
    """Whether parameters of a layer reach the output, whose graph is kept."""
    parameters = list(layer.parameters.values())
    ones = torch.ones_like(z)
    gradients = torch.autograd.grad(z, parameters, ones, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _check_expansions(
    forward: Forward, layers: dict[str, Layer], inputs: Inputs, z: Tensor, found: Placements
) -> None:
    """Make rows that all examples share MIXED where the model cannot take one row for each of
    them, as when it repeats the layer's output itself.

    Args:
        forward: the model.
        layers: adapters by name.
        inputs: of N examples.
        z: outputs `[N, *output]`.
        found: the placements of the layers; changed.
    """
    shared = [name for name, kinds in found.items() if Placement.SHARED in kinds]
    if not shared or _same_when_expanded(forward, layers, inputs, z, found):
        return
    for name in shared:
        alone = {name: found[name]}
        if not _same_when_expanded(forward, layers, inputs, z, alone):
            found[name] = [Placement.MIXED]


def _same_when_expanded(
    forward: Forward, layers: dict[str, Layer], inputs: Inputs, z: Tensor, placements: Placements
) -> bool:
    """Whether the outputs stay when the rows that examples share are expanded."""
    expanded = {name: layers[name] for name in placements}
    try:
        with torch.enable_grad(), recording(expanded, placements, len(z)):
            again = forward(inputs).detach()
    except (RuntimeError, ValueError, IndexError):  # shapes that do not fit
        return False
    if again.shape != z.shape:
        return False
    difference = (again - z).norm()
    return bool(difference <= forward.agreement(z.dtype) * z.norm())


def _examples_to_place(forward: Forward, batch: Batch, most_numbers: float) -> int:
    """Of how many examples the derivatives that tell their rows apart fit; two at least."""
    # outputs, random output gradients, those of some examples, and what these become
    of_example = 4 * probe(forward, batch).numel()
    fitting = most_numbers // of_example
    return max(2, int(min(MOST_EXAMPLES, fitting)))


def by_form(layers: dict[str, Layer]) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """The layers that have hooks, and those in gradient form."""
    hooked: dict[str, Layer] = {}
    flat: dict[str, Layer] = {}
    for name, layer in layers.items():
        if layer.gradient_form:
            flat[name] = layer
        else:
            hooked[name] = layer
    return hooked, flat


def learn_placements(z: Tensor, uses: dict[str, list[Use]], known: Placements) -> None:
    """Find the placements of layers whose rows are not as many as the examples, where they are not
    known yet.

    Args:
        z: outputs `[N, *output]` with their graph, which is kept.
        uses: from `recording`.
        known: what is known of earlier batches; added to.
    """
    N = z.shape[0]
    for name, of_layer in uses.items():
        if name in known or not any(_may_be_others(use, N) for use in of_layer):
            continue
        known[name] = []
        for use, owner in zip(of_layer, owners(z, of_layer), strict=True):
            M, T = use.a.shape[:2]
            kind = placement_of(owner, M, T, N)
            known[name].append(kind)


def _may_be_others(use: Use, N: int) -> bool:
    """Whether the rows of a use may be something else than the examples."""
    M, T = use.a.shape[:2]
    if M != N:
        return True
    # N indices are examples, or as many positions
    return T == 1 and isinstance(use.layer, EmbeddingLayer)


def check_output(z: Tensor, N: int) -> None:
    """Raise ValueError where the output is not finite or not of N examples."""
    if z.shape[0] != N:
        raise ValueError(
            f"The model returned shape {tuple(z.shape)} for {N} examples, expected [{N}, *output]."
        )
    finite = torch.isfinite(z).all()
    if not bool(finite):
        raise ValueError(NOT_FINITE)


def _check_graph(z: Tensor) -> None:
    """Refuse a graph with reentrant checkpoints, which torch derives only as a whole."""
    todo = [z.grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(REENTRANT)
        for before, _ in node.next_functions:
            todo.append(before)


def check_examples_apart(forward: Forward, inputs: Inputs, z: Tensor) -> None:
    """Refuse models in which examples interact or that are random, by the first and the last
    example alone.

    Args:
        forward: the model.
        inputs: of N examples.
        z: its outputs for them `[N, *output]`.
    """
    N = z.shape[0]
    size = z.norm().clamp(min=torch.finfo(z.dtype).tiny)
    most = forward.agreement(z.dtype)
    # the first alone is not enough: nothing that is causal along the batch changes it
    for n in {0, N - 1}:
        some = slice(n, n + 1)
        one = taken(inputs, some)
        with torch.no_grad(), plain_kernels():
            alone = forward(one).detach()  # models may switch gradients on
        difference = (alone - z[some]).norm()
        change = float(difference / size)
        if not change <= most:  # NaN too
            raise ValueError(
                f"The output for an example changes by {change:.1e} with the batch around it, "
                f"expected at most {most:g}: examples interact or the model is random; call "
                "model.eval(), or remove what mixes examples."
            )


# -- capturing -------------------------------------------------------------------------------------
def capture(
    forward: Forward,
    layers: dict[str, Layer],
    inputs: Inputs,
    factors: Factors,
    placements: Placements | None = None,
    verify: bool = False,
) -> dict[str, LayerStats]:
    """LayerStats of every layer for one batch.

    Args:
        forward: the model, acting per example.
        layers: adapters of modules of this model.
        inputs: of N examples.
        factors: output factors of the outputs, see `labels`.
        placements: how the rows of the layers belong to the examples; by default row n is example
            n.
        verify: check that the gradients found by hooks add up to autograd's, which they do not
            where a weight is used behind the hooks' back.

    Raises:
        ValueError: a layer that is not used, or whose rows do not fit the examples; what `verify`
            finds.
    """
    N = examples_of(inputs)
    if N == 1 and _has_instance_norm(forward):
        # torch's backward of InstanceNorm is wrong for one example and a gradient with channels
        # last, not for two
        return _captured_twice(forward, layers, inputs, factors, placements, verify)
    hooked, flat = by_form(layers)
    with torch.enable_grad(), recording(hooked, placements, N) as uses:
        z = forward(inputs)
    check_output(z, N)
    S = factors(z)
    _check_used(uses, hooked)
    found = pull_back(z, S, uses, hooked, placements, retain_graph=verify)
    _check_reaching(found, hooked)
    if verify:
        _check_total(z, S, hooked, found, forward.agreement(z.dtype))
    found |= _by_gradients(forward, flat, inputs, S)
    return {name: found[name] for name in layers}


def _has_instance_norm(forward: Forward) -> bool:
    for module in forward.module.modules():
        if isinstance(module, _InstanceNorm):
            return True
    return False


def _captured_twice(
    forward: Forward,
    layers: dict[str, Layer],
    inputs: Inputs,
    factors: Factors,
    placements: Placements | None,
    verify: bool,
) -> dict[str, LayerStats]:
    """One example captured beside itself."""

    def factors_of_one(z: Tensor) -> Tensor:
        S = factors(z[:1])
        return torch.cat([S, S], 1)

    twice = capture(forward, layers, doubled(inputs), factors_of_one, placements, verify)
    return {name: stats.examples(slice(0, 1)) for name, stats in twice.items()}


def pull_back(
    z: Tensor,
    S: Tensor,
    uses: dict[str, list[Use]],
    layers: dict[str, Layer],
    placements: Placements | None = None,
    retain_graph: bool = False,
) -> dict[str, LayerStats]:
    """Stats of the layers whose uses were recorded, without those that do not reach the output.

    Args:
        z: outputs `[N, *output]` with their graph.
        S: output factors `[R, N, *output]`.
        uses: from `recording`.
        layers: the layers' adapters.
        placements: of the uses.
        retain_graph: whether the graph is needed again.
    """
    N = z.shape[0]
    every: list[Use] = []
    kinds: Placements = {}
    for name in layers:
        every += uses[name]
        kinds[name] = _kinds(name, uses[name], placements, N)
    if not every:
        return {}
    owner_of = _owners_needed(z, uses, kinds)
    # one backward pass for all layers
    gradients = iter(_gradients(z, S, every, retain_graph))
    stats = {}
    for name, layer in layers.items():
        parts = []
        for index, use in enumerate(uses[name]):
            gradient = next(gradients)
            if gradient is None:  # this use does not reach the output
                continue
            kind = kinds[name][index]
            owner = owner_of.get((name, index))
            a = placed(use.a, kind, N, owner, axis=0)
            g = use.layer.unroll_gradient(gradient)
            g = placed(g, kind, N, owner, axis=1)
            parts.append((use.layer, a, g))
        if parts:
            stats[name] = assembled(layer, parts)
    return stats


def is_shared(kinds: Sequence[Placement]) -> bool:
    """Whether rows of some use belong to several examples."""
    return Placement.SHARED in kinds or Placement.MIXED in kinds


def pull_back_shared(
    z: Tensor, S: Tensor, uses: dict[str, list[Use]], layers: dict[str, Layer]
) -> dict[str, LayerStats]:
    """Stats of layers whose rows several examples use, such as a table of positions: the whole
    batch as one example, whose gradient is the sum over the examples by sqrt(N).

    Where the examples' gradients have no mean (sampled labels, random signs), its second moment has
    the expectation of theirs, as the terms between examples vanish in the mean.

    Args:
        z: outputs `[N, *output]` with their graph, which is kept.
        S: output factors `[R, N, *output]`.
        uses: from `recording`.
        layers: the layers' adapters.
    """
    root = math.sqrt(z.shape[0])
    stats = {}
    for name, layer in layers.items():
        parts = []
        gradients = _gradients(z, S, uses[name], retain_graph=True)
        for use, gradient in zip(uses[name], gradients, strict=True):
            if gradient is None:  # this use does not reach the output
                continue
            g = use.layer.unroll_gradient(gradient)  # [R, M, T, Q, d_out]
            # all rows are positions of one example
            a = use.a.flatten(0, 1).unsqueeze(0)
            g = g.flatten(1, 2).unsqueeze(1)
            parts.append((use.layer, a, g / root))
        if parts:
            stats[name] = assembled(layer, parts)
    return stats


def _gradients(z: Tensor, S: Tensor, uses: list[Use], retain_graph: bool) -> list[Tensor | None]:
    """Gradients `[R, M, *output of the layer]` at every edge, None where an edge does not
    reach z.
    """
    edges = [use.edge for use in uses]
    try:
        return gradients_at(z, edges, S, retain_graph)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(REENTRANT) from error
        if "second time" not in str(error):
            raise
        raise ValueError(
            "The graph of the observed forward pass is gone, expected it to live until "
            "observing() ends; call loss.backward() after the `with` block."
        ) from error


def assembled(layer: Layer, parts: list[Part]) -> LayerStats:
    """Stats of a layer from a `[N, T, Q, d_in]` and g `[R, N, T, Q, d_out]` of its uses, which are
    more positions.
    """
    if isinstance(layer, VocabularyLayer):
        return of_vocabulary(layer, parts)  # type: ignore[return-value]
    in_block = [use.in_block(a, g) for use, a, g in parts]
    a, g = in_block[0]
    if len(parts) > 1:
        inputs, gradients = zip(*in_block, strict=True)
        a = torch.cat(inputs, 1)
        g = torch.cat(gradients, 2)
    return LayerStats(a, g.detach(), layer.kernel, layer.bias)


def _kinds(name: str, uses: list[Use], placements: Placements | None, N: int) -> list[Placement]:
    """The placement of every use of a layer, checked against its number of rows."""
    known = []
    if placements is not None:
        known = placements.get(name, [])
    found = []
    for index, use in enumerate(uses):
        kind = Placement.BLOCKS
        # what is shared was expanded before the layer
        if index < len(known) and known[index] is not Placement.SHARED:
            kind = known[index]
        M, T = use.a.shape[:2]
        guessed_wrong = not known and M != N
        if guessed_wrong or not fits(kind, M, T, N):
            raise ValueError(
                f"Layer {name!r} sees {M} rows for a batch of {N} examples, expected its first "
                "dimension to be the examples; keep [N, ...] in the model (expand what all "
                "examples share, such as positions) or leave the layer out with layers=[...]."
            )
        found.append(kind)
    return found


def _owners_needed(
    z: Tensor, uses: dict[str, list[Use]], kinds: dict[str, list[Placement]]
) -> dict[tuple[str, int], Tensor]:
    """The owners of the rows of those uses that have no regular placement."""
    keys = []
    irregular = []
    for name, of_layer in kinds.items():
        for index, kind in enumerate(of_layer):
            if kind is Placement.OWNERS:
                keys.append((name, index))
                irregular.append(uses[name][index])
    if not keys:
        return {}
    found = owners(z, irregular)
    return dict(zip(keys, found, strict=True))


def _by_gradients(
    forward: Forward, layers: dict[str, Layer], inputs: Inputs, S: Tensor
) -> dict[str, LayerStats]:
    """Stats of layers in gradient form: a = 1, g = their per-example gradients."""
    if not layers:
        return {}
    names: list[str] = []
    for layer in layers.values():
        names += map(layer.full_name, layer.parameters)
    gradients = per_example_gradients(forward, names, inputs, S)
    stats = {}
    for name, layer in layers.items():
        tensors = {}
        for key in layer.parameters:
            full_name = layer.full_name(key)
            tensors[key] = gradients[full_name]
        P = layer.pack(tensors).detach()
        a = layer.unroll_input(P[0])
        g = layer.unroll_gradient(P)
        stats[name] = LayerStats(a, g, layer.kernel, layer.bias)
    return stats


# -- checks ----------------------------------------------------------------------------------------
def _check_used(uses: dict[str, list[Use]], layers: dict[str, Layer]) -> None:
    for name, found in uses.items():
        if not found:
            raise ValueError(
                f"Layer {name!r} ({type(layers[name].module).__name__}) was not called in the "
                "forward pass or its output needs no gradient, expected a layer in use; leave it "
                "out with layers=[...]."
            )


def _check_reaching(found: dict[str, LayerStats], layers: dict[str, Layer]) -> None:
    for name in layers:
        if name not in found:
            raise ValueError(
                f"Layer {name!r} does not influence the model's output, expected that it does; "
                "leave it out."
            )


def _check_total(
    z: Tensor, S: Tensor, layers: dict[str, Layer], found: dict[str, LayerStats], allowed: float
) -> None:
    """The sum of all captured gradients of a layer is autograd's gradient of its parameters, or
    ValueError.
    """
    parameters: list[Tensor] = []
    for layer in layers.values():
        parameters += layer.parameters.values()
    if not parameters:
        return
    info = torch.finfo(z.dtype)
    totals = iter(torch.autograd.grad(z, parameters, S.sum(0), allow_unused=True))
    sizes = {name: _size_of_terms(found[name]) for name in layers}
    # where gradients cancel (a mean behind a norm layer), rounding on the scale of the largest is
    # all there is
    rounding = 1e4 * info.eps / allowed * max(sizes.values())
    floor = max(rounding, info.tiny)
    ones = S.new_ones(S.shape[:2])
    for name, layer in layers.items():
        tensors = {}
        for key, parameter in layer.parameters.items():
            total = next(totals)
            if total is None:
                total = torch.zeros_like(parameter)
            tensors[key] = total
        expected = layer.pack(tensors)
        captured = sums_over(found[name], shared=False).combine(ones)
        difference = (captured - expected).norm()
        deviation = float(difference) / max(sizes[name], floor)
        if not deviation <= allowed:
            raise ValueError(
                f"The gradients captured for layer {name!r} deviate from autograd's by "
                f"{deviation:.1e}, expected at most {allowed:g}: its weight is used in a way "
                "hooks do not see; use exact_fisher, or leave the layer out."
            )


def _size_of_terms(stats: LayerStats) -> float:
    """Size of what may cancel in the sum of all gradients."""
    if isinstance(stats, VocabularyStats):
        # a bound of |g| is 2 |c|, and much larger gradients would be wrong gradients of lookups
        sizes = stats.a.norm(dim=-1) * stats.scale.abs()
        return float(sizes.sum() + stats.e.norm(dim=-1).sum())
    a, g = stats.factors()
    inputs = a.flatten(1).norm(dim=1)
    total = g.sum(0)
    gradients = total.flatten(1).norm(dim=1)
    bounds = inputs * gradients
    return float(bounds.sum())
