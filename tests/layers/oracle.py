"""A third truth: Fisher blocks by loops over examples and outputs, plain autograd and the torch
loss's own Hessian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, every parameter random (norm layers do not start at
    one and zero).
    """
    draw = generator(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw, dtype=torch.float64))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=draw, dtype=torch.float64))
    return model


def weight_and_bias(module: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """W of a layer with a weight and perhaps a bias: `[weight.flatten(1) | bias]`, as far as they
    are trained.
    """

    def pack(gradient: dict[str, Tensor]) -> Tensor:
        columns = []
        if module.weight.requires_grad:
            columns.append(gradient["weight"].flatten(1))
        if module.bias is not None and module.bias.requires_grad:
            columns.append(gradient["bias"][:, None])
        return torch.cat(columns, 1).flatten()

    return pack


def flattened(gradient: dict[str, Tensor]) -> Tensor:
    """All gradients one after the other."""
    return torch.cat([g.flatten() for g in gradient.values()])


def naive_block(
    model: nn.Module,
    parameters: dict[str, Tensor],
    pack: Callable[[dict[str, Tensor]], Tensor],
    x: Tensor,
    loss: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """1/N sum over n of J_n^T H_n J_n `[d, d]`: the Gauss-Newton matrix of the mean of
    `loss(z_n, n)`.

    Args:
        model: acts per example.
        parameters: those of the block.
        pack: a dictionary of gradients as one vector in the order of W.
        x: inputs `[N, ...]`.
        loss: of the output `[1, *output]` of example n, a scalar.
    """
    total = torch.zeros(())
    for n in range(len(x)):
        z = model(x[n : n + 1])
        rows = []
        for entry in z.flatten():
            grads = torch.autograd.grad(
                entry, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            pairs = zip(parameters.items(), grads, strict=True)
            rows.append(
                pack({key: torch.zeros_like(p) if g is None else g for (key, p), g in pairs})
            )
        J = torch.stack(rows)
        H = hessian(lambda out, n=n: loss(out, n), z.detach()).reshape(len(J), len(J))
        total = total + J.T @ H @ J
    return total / len(x)
