"""Small models and dense formulas shared by the tests of the optimizers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab import optim
from tests.helpers import columns_at

# every named natural-gradient method of the library, so that a new one is tested by being defined
PRESETS = tuple(
    name for name, cls in optim.registry().items() if cls.__module__ == optim.methods.__name__
)


def net(
    dtype: torch.dtype = torch.float64, seed: int = 0, widths: tuple[int, ...] = (4, 5, 3)
) -> nn.Sequential:
    """A small classifier whose parameters depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
    return model


def batch(
    N: int = 12,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    widths: tuple[int, ...] = (4, 5, 3),
):
    """Inputs and class labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(widths[-1], (N,), generator=generator)


def one_step(
    opt, model, likelihood, x, y, observe: bool = True, labels: Tensor | None = None
) -> Tensor:
    """An ordinary step of the training loop."""
    if observe:
        with opt.observing(labels):
            z = model(x)
    else:
        z = model(x)
    loss = likelihood.loss(z, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.detach()


def train(opt, model, likelihood, x, y, steps: int) -> list[float]:
    """Losses of some steps on one batch."""
    return [float(one_step(opt, model, likelihood, x, y)) for _ in range(steps)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """W = [weight | bias] of every Linear layer, copied."""
    return {
        name: torch.cat([m.weight, m.bias[:, None]], 1).detach().clone()
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }


def gradients(model: nn.Module, likelihood, x, y) -> dict[str, Tensor]:
    """Gradient of the loss over W of every Linear layer."""
    params = dict(model.named_parameters())
    found = dict(
        zip(
            params,
            torch.autograd.grad(likelihood.loss(model(x), y), list(params.values())),
            strict=True,
        )
    )
    return {
        name: torch.cat([found[f"{name}.weight"], found[f"{name}.bias"][:, None]], 1)
        for name in weights(model)
    }


def layer_stats(
    model: nn.Sequential, likelihood, x, fisher: str, y=None
) -> dict[str, fl.LayerStats]:
    """Inputs and output gradients of every layer, by hand: module after module, one autograd call
    per direction.
    """
    inputs, outputs, h = {}, {}, x
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            inputs[name] = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1).detach()
        h = module(h)
        if isinstance(module, nn.Linear):
            outputs[name] = h
    columns = columns_at(likelihood, h, fisher, y)
    found = [
        torch.autograd.grad((h * S).sum(), list(outputs.values()), retain_graph=True)
        for S in columns
    ]
    stats = {}
    for i, name in enumerate(outputs):
        g = torch.stack([gradients[i] for gradients in found])
        a = inputs[name][:, None, None]
        stats[name] = fl.LayerStats(a, g[:, :, None, None], kernel=(a.shape[-1] - 1,), bias=True)
    return stats


def preset(name: str, model: nn.Module, likelihood, lr: float = 0.1, **options):
    """One of the papers' optimizers by name."""
    return getattr(optim, name)(model, likelihood, lr, **options)
