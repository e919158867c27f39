"""What an optimizer held is free again once nothing refers to it."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fisher_lab as fl
from tests.optim.support import batch, net, one_step


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


def storages(matrices) -> dict[int, int]:
    """Bytes of every memory that matrices lie in, each counted once."""
    found = {}
    for matrix in matrices:
        for tensor in matrix.tensors().values():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["KFAC", "TNT", "MBF"])
def test_inverses_of_equal_layers_are_held_once(name, loaded):
    """The matrix in which equal layers are multiplied at once is the memory of their inverses."""
    widths = (6, 6, 6, 6, 3)
    model, (x, y) = net(widths=widths), batch(widths=widths)
    opt = getattr(fl.optim, name)(model, fl.Categorical(), 0.1)
    one_step(opt, model, fl.Categorical(), x, y)
    if loaded:
        state = opt.state_dict()
        opt = getattr(fl.optim, name)(model, fl.Categorical(), 0.1)
        opt.load_state_dict(state)
    own = [c.inverse for c in opt.curvature.values()]
    joined = [bucket.inverse for buckets in opt._buckets for bucket in buckets]
    assert len(joined) < len(own)
    assert storages(joined) == storages([*own, *joined])
    assert sum(storages(joined).values()) == sum(matrix.nbytes for matrix in own)
