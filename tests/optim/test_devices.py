"""Ready for a GPU, proved without one: whole steps on the meta device, and no host reads in an
ordinary step.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisher_lab as fl
from fisher_lab import optim
from tests.optim.support import PRESETS, batch, net, one_step, preset, train

LIKELIHOOD = fl.Categorical()
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__")


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait for its device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for name in READS:
            original = getattr(torch.Tensor, name)

            def read(tensor, *args, name=name, original=original, **options):
                self.found.append(name)
                return original(tensor, *args, **options)

            monkeypatch.setattr(torch.Tensor, name, read)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found.append("_local_scalar_dense")
        return function(*args, **(kwargs or {}))


def with_fallback(dtype=torch.float32):
    return nn.Sequential(net(dtype), nn.LayerNorm(3, dtype=dtype))


def test_the_counter_sees_every_kind_of_read(monkeypatch):
    x = torch.ones(())
    with HostReads(monkeypatch) as reads:
        for read in (float, int, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu):
            before = len(reads.found)
            read(x)
            assert len(reads.found) > before


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_clip": 1e-3, "weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}],
)
@pytest.mark.parametrize("name", PRESETS)
def test_ordinary_steps_never_wait_and_refreshes_wait_once(name, options, monkeypatch):
    model, (x, y) = with_fallback(), batch(dtype=torch.float32)
    opt = preset(name, model, LIKELIHOOD, 0.01, observe_every=3, refresh_every=6, **options)
    train(opt, model, LIKELIHOOD, x, y, 7)
    counts = []
    for _ in range(7, 19):
        inverse = opt.curvature["0.0"].inverse
        with opt.observing():
            z = model(x)
        loss = LIKELIHOOD.loss(z, y)
        opt.zero_grad()
        loss.backward()
        with HostReads(monkeypatch) as reads:
            opt.step()
        monkeypatch.undo()
        counts.append((opt.curvature["0.0"].inverse is not inverse, reads.found))
    assert [refreshed for refreshed, _ in counts].count(True) == 2
    for refreshed, found in counts:
        assert found == (["tolist"] if refreshed else [])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("likelihood", [fl.Categorical(), fl.Bernoulli(), fl.Gaussian()], ids=repr)
def test_an_observation_never_waits(name, likelihood, monkeypatch):
    model, (x, y) = with_fallback(), batch(dtype=torch.float32)
    opt = preset(name, model, likelihood, 0.01, observe_every=1)
    labels = y if isinstance(likelihood, fl.Categorical) else torch.ones(12, 3)
    train(opt, model, likelihood, x, labels, 2)
    with HostReads(monkeypatch) as reads, opt.observing():
        model(x)
    assert reads.found == []


def test_a_wait_in_a_step_would_be_found(monkeypatch):
    model, (x, y) = with_fallback(), batch(dtype=torch.float32)

    class Waits(optim.KFAC):
        def update(self, loss):
            super().update(loss)
            float(self._skipped)

    opt = Waits(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    LIKELIHOOD.loss(model(x), y).backward()
    with HostReads(monkeypatch) as reads:
        opt.step()
    assert "_local_scalar_dense" in reads.found


@pytest.mark.parametrize("name", PRESETS)
def test_whole_steps_run_on_the_meta_device(name):
    """Every tensor is made on the parameters' device: one on another device would stop the step."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        )
        x, y = torch.empty(12, 4), torch.empty(12, dtype=torch.int64)
    opt = preset(
        name,
        model,
        LIKELIHOOD,
        0.01,
        observe_every=1,
        refresh_every=2,
        weight_decay=0.1,
        kl_clip=1e-3,
    )
    for _ in range(3):
        one_step(opt, model, LIKELIHOOD, x, y)
    for c in opt.curvature.values():
        assert all(t.is_meta for t in (*c.moments.values(), *c.inverse.tensors().values()))


def test_kbfgs_never_waits_and_runs_on_the_meta_device(monkeypatch):
    for device in ("cpu", "meta"):
        model = with_fallback().to(device)
        x, y = (part.to(device) for part in batch(dtype=torch.float32))
        opt = optim.KBFGS(model, LIKELIHOOD, 0.01, weight_decay=0.1)

        def closure(opt=opt, model=model, x=x, y=y):
            opt.zero_grad()
            loss = LIKELIHOOD.loss(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        with HostReads(monkeypatch) as reads:
            opt.step(closure)
        monkeypatch.undo()
        # AdamW without its fused kernel counts its steps on the host
        assert device == "meta" or reads.found == []
