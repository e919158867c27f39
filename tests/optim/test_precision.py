"""Mixed precision: autocast, GradScaler, bfloat16 parameters; and the compiled step."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.helpers import assert_same
from tests.optim.support import PRESETS, batch, net, one_step, preset, train, weights

LIKELIHOOD = fl.Categorical()


@pytest.mark.parametrize("name", ["TNT", "KFAC", "EKFAC", "MBF", "Shampoo"])
def test_under_autocast_statistics_and_steps_keep_their_precision(name):
    """Forward, observation and step all inside autocast: only the forward pass may round to
    bfloat16.
    """
    model, (x, y) = (
        net(torch.float32, widths=(8, 16, 10)),
        batch(64, torch.float32, widths=(8, 16, 10)),
    )
    opt = preset(name, model, LIKELIHOOD, 0.01, damping=0.1, observe_every=1, refresh_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            one_step(opt, model, LIKELIHOOD, x, y)
    for c in opt.curvature.values():
        assert all(
            t.dtype == torch.float32 for t in (*c.moments.values(), *c.inverse.tensors().values())
        )
        F, P = c.matrix, c.inverse
        X = torch.randn(F.shape, generator=torch.Generator().manual_seed(0))
        expected = (
            F.powered(c.approximation.exponent, 0.1, opt.param_groups[0]["damping_style"]) @ X
        )
        assert_same(P @ X, expected, 1e-5)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_statistics_under_autocast_are_near_those_without():
    found = []
    for enabled in (False, True):
        model, (x, _) = net(torch.float32), batch(64, torch.float32)
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.01, fisher="true")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), opt.observing():
            model(x)
        opt._refresh()
        found.append(opt.matrices()["2"].dense())
    assert_same(found[1], found[0], 0.02)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_gradient_scaler_changes_nothing_but_rounding(name, unscale):
    found = []
    for enabled in (False, True):
        model, (x, y) = (
            nn.Sequential(net(torch.float32), nn.LayerNorm(3)),
            batch(dtype=torch.float32),
        )
        opt = preset(name, model, LIKELIHOOD, 0.01, damping=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            scaler.scale(LIKELIHOOD.loss(z, y)).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_under_a_gradient_scaler_skips_the_step_and_halves_the_scale(unscale):
    model, (x, y) = nn.Sequential(net(torch.float32), nn.LayerNorm(3)), batch(dtype=torch.float32)
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    scaler.scale(LIKELIHOOD.loss(model(x), y)).backward()
    model[1].weight.grad[0] = float("inf")
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("name", PRESETS)
def test_bfloat16_parameters_keep_float32_factors_and_follow_float32_training(name):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, (x, y) = net(dtype), batch(64, dtype)
        opt = preset(name, model, LIKELIHOOD, 0.02, damping=0.3, observe_every=1, refresh_every=1)
        losses = train(opt, model, LIKELIHOOD, x, y, 10)
        for c in opt.curvature.values():
            assert c.inverse.dtype == torch.float32
        assert all(p.dtype == dtype for p in model.parameters())
        assert opt.state[model[0].weight]["momentum_buffer"].dtype == torch.float32
        found.append(losses[-1])
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_the_factor_dtype_can_be_chosen():
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.KFAC(model, LIKELIHOOD, 0.01, dtype=torch.float64)
    one_step(opt, model, LIKELIHOOD, x, y)
    assert opt.curvature["0"].inverse.dtype == torch.float64
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["KFAC", "TNT", "EKFAC"])
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_step_gives_the_same_training(name):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, (x, y) = nn.Sequential(net(), nn.LayerNorm(3).double()), batch()
        opt = preset(name, model, LIKELIHOOD, 0.01, damping=0.1, observe_every=2, refresh_every=4)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for _ in range(6):
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            LIKELIHOOD.loss(z, y).backward()
            step()
        found.append(weights(model))
    for layer in found[0]:
        assert_same(found[1][layer], found[0][layer])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_function_observes_when_due():
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, (x, y) = net(), batch()
        opt = optim.KFAC(model, LIKELIHOOD, 0.01, damping=0.1, observe_every=2, refresh_every=4)

        def run(opt=opt, model=model, x=x, y=y):
            return one_step(opt, model, LIKELIHOOD, x, y)

        run = torch.compile(run, backend="eager") if compiled else run
        for _ in range(5):
            run()
        assert opt.observed_at == 4
        found.append(weights(model))
    for layer in found[0]:
        assert_same(found[1][layer], found[0][layer])
