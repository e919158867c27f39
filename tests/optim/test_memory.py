"""What an optimizer held is free again once nothing refers to it."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fisher_lab as fl


@pytest.mark.parametrize("name", ["TNT", "EKFAC", "KBFGS"])
def test_no_cycle_keeps_an_optimizer_alive(name: str) -> None:
    def used() -> weakref.ref:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y, loss = torch.randn(5, 3), torch.arange(5) % 2, nn.CrossEntropyLoss()
        opt = getattr(fl.optim, name)(model, loss, lr=0.1)

        def closure() -> torch.Tensor:
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            value = loss(z, y)
            value.backward()
            return value

        opt.step(closure)
        return weakref.ref(opt)

    used()  # the first optimizer of a process stays in frames that torch keeps
    gc.collect()
    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()
