"""A truth for models of other libraries: one example at a time, plain autograd, no method of the
library.

For every example alone the model is called, every output entry differentiated, and the loss's
Hessian applied to the Jacobian. Inputs and output gradients of a layer are recorded by a hook of
this file's own, one example at a time, so that nothing is assumed of how the model lays out its
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn.functional import pad

from fisher_lab.statistics import LayerStats

Loss = Callable[[Tensor, int], Tensor]  # of the output [1, *output] of example n, a scalar


@dataclass
class Example:
    """What one example does: its output and, per use of the layer, its input and where its gradient
    arrives.
    """

    z: Tensor
    uses: list[tuple[Tensor, Tensor]]


def run(model: nn.Module, call: Callable[[int], Tensor], layer: nn.Module, n: int) -> Example:
    """One example through the model."""
    uses: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(
        lambda _module, inputs, output: uses.append((inputs[0].detach(), output))
    )
    try:
        z = call(n)
    finally:
        handle.remove()
    return Example(z, uses)


def factor(z: Tensor, loss: Loss, n: int) -> Tensor:
    """A square root S `[R, *z.shape]` of the Hessian of the loss in the output, by its
    eigenvectors.
    """
    size = z.numel()
    H = hessian(lambda out: loss(out, n), z.detach()).reshape(size, size)
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    S = vectors * values.clamp(min=0).sqrt()
    return S.T.reshape(size, *z.shape)


def dense_block(
    model: nn.Module,
    call: Callable[[int], Tensor],
    N: int,
    parameters: list[Tensor],
    pack: Callable[..., Tensor],
    loss: Loss,
) -> Tensor:
    """1/N sum of J_n^T H_n J_n `[d, d]` over the packed parameters of one block."""
    total = torch.zeros(())
    for n in range(N):
        z = call(n)
        rows = []
        for entry in z.flatten():
            grads = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            filled = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, grads, strict=True)
            ]
            rows.append(pack(*filled).flatten())
        J = torch.stack(rows)
        H = hessian(lambda out, n=n: loss(out, n), z.detach()).reshape(len(J), len(J))
        total = total + J.T @ H @ J
    return total / N


def layer_stats(
    model: nn.Module,
    call: Callable[[int], Tensor],
    N: int,
    layer: nn.Module,
    unroll: Callable[[Tensor], Tensor],
    loss: Loss,
    kernel: tuple[int, ...],
    bias: bool,
) -> LayerStats:
    """a and g of a layer that is used at T positions, from single examples; positions that one
    lacks are zeros.

    Args:
        unroll: the layer's input for one example as `[T, d_in]`, bias column included.
        kernel: input modes of the weight.
        bias: whether the last column is the bias.
    """
    inputs, gradients = [], []
    for n in range(N):
        example = run(model, call, layer, n)
        S = factor(example.z, loss, n)
        a = torch.cat([unroll(x) for x, _ in example.uses])
        outputs = [output for _, output in example.uses]
        g = []
        for column in S:
            found = torch.autograd.grad(example.z, outputs, column, retain_graph=True)
            g.append(torch.cat([part.reshape(-1, part.shape[-1]) for part in found]))
        inputs.append(a)
        gradients.append(torch.stack(g))
    T = max(len(a) for a in inputs)
    a = torch.stack([pad(x, (0, 0, 0, T - len(x))) for x in inputs])[:, :, None]
    g = torch.stack([pad(x, (0, 0, 0, T - x.shape[1])) for x in gradients], 1)[:, :, :, None]
    return LayerStats(a, g, kernel, bias)
