"""Losses, small models and expected blocks that the traps share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fisher_lab as fl
from tests.layers.oracle import naive_block, normal, randomised, weight_and_bias

SCALES = {
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "MSELoss": nn.MSELoss,
    "BCEWithLogitsLoss": nn.BCEWithLogitsLoss,
}


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp() -> nn.Sequential:
    return randomised(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def labels_for(loss: nn.Module, *shape: int) -> Tensor:
    """Labels of outputs `[N, C, *positions]`."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return (
            torch.arange(shape[0] * int(torch.Size(shape[2:]).numel())).reshape(
                shape[0], *shape[2:]
            )
            % shape[1]
        )
    return (normal(*shape, seed=9) > 0).double()


def block(model: nn.Module, loss: nn.Module | fl.Likelihood, data, layer: str, **options) -> Tensor:
    """The captured block, dense."""
    return fl.estimate(fl.Exact(), model, loss, data, layers=[layer], **options)[layer].dense()


def expected(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """The Gauss-Newton matrix of the mean over examples of the loss."""
    module = model.get_submodule(layer)
    return naive_block(
        model,
        dict(module.named_parameters()),
        weight_and_bias(module),
        x,
        lambda z, n: loss(z, y[n : n + 1]),
    )
