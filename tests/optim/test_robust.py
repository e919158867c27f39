"""What must not spoil a training: non-finite losses, gradients and statistics, failed
factorisations, tiny cases.
"""

import warnings

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from fisher_lab._ground import linalg
from fisher_lab.approximations import corrected
from fisher_lab.matrices import BlockDiagonal, Kronecker
from fisher_lab.optim import refresh
from tests.helpers import assert_same
from tests.optim import support
from tests.optim.support import PRESETS, batch, net, one_step, preset, train, weights

LIKELIHOOD = fl.Categorical()


def snapshot(model, opt):
    """Parameters, momentum and inverses."""
    state = [
        x
        for p in model.parameters()
        for x in opt.state.get(p, {}).values()
        if isinstance(x, torch.Tensor)
    ]
    inverses = [x for c in opt.curvature.values() for x in c.inverse.tensors().values()]
    moments = [x for c in opt.curvature.values() for x in c.moments.values()]
    return [x.detach().clone() for x in (*model.parameters(), *state, *inverses, *moments)]


def mixed_net():
    """Layers and parameters of the fallback."""
    model = net()
    return nn.Sequential(model, nn.LayerNorm(3).double())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}, {"kl_clip": 1e-3}]
)
def test_a_non_finite_gradient_changes_nothing_at_all(order, options):
    model, (x, y) = mixed_net(), batch()
    opt = optim.TNT(
        model, LIKELIHOOD, 0.01, momentum_order=order, observe_every=2, refresh_every=2, **options
    )
    train(opt, model, LIKELIHOOD, x, y, 3)
    for poison in (float("nan"), float("inf")):
        for index in range(len(list(model.parameters()))):
            before = snapshot(model, opt)
            opt.zero_grad()
            LIKELIHOOD.loss(model(x), y).backward()
            list(model.parameters())[index].grad.view(-1)[0] = poison
            opt.window.observed_at = opt.steps
            opt.step()
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, opt), strict=True))
    assert opt.troubles()["updates skipped as non-finite"] == 2 * 6
    assert "updates skipped as non-finite: 12" in repr(opt)
    opt.window.observed_at = None
    with pytest.warns(RuntimeWarning, match="12 updates were skipped"):
        train(opt, model, LIKELIHOOD, x, y, 2)
    assert not torch.equal(snapshot(model, opt)[0], before[0])


@pytest.mark.parametrize("name", PRESETS)
def test_a_non_finite_batch_is_dropped_and_the_last_good_inverse_stays(name):
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    train(opt, model, LIKELIHOOD, x, y, 3)
    before = snapshot(model, opt)
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="dropped as non-finite|updates were skipped"):
        train(opt, model, LIKELIHOOD, bad, y, 2)
    after = snapshot(model, opt)
    if name == "TENGraD":  # its columns are ordered anew; the matrix is what counts
        before, after = before[:4], after[:4]
    # eigenvalues are carried over to the same basis
    exact = 1e-12 if name in ("EKFAC", "TEKFAC") else 0.0
    assert all(
        torch.allclose(a, b, rtol=exact, atol=exact) for a, b in zip(before, after, strict=True)
    )
    train_on = weights(model)
    with pytest.warns(RuntimeWarning, match="skipped"):  # the counters of the second bad step
        one_step(opt, model, LIKELIHOOD, x, y)
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())
    assert not torch.equal(weights(model)["0"], train_on["0"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_bad_first_batch_does_not_spoil_the_start(name):
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    before = weights(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one_step(opt, model, LIKELIHOOD, x * float("inf"), y)
        one_step(opt, model, LIKELIHOOD, x * float("nan"), y)
        assert all(torch.equal(before[n], W) for n, W in weights(model).items())
        train(opt, model, LIKELIHOOD, x, y, 3)
    assert any("non-finite" in str(warning.message) for warning in told)
    fresh = net()
    other = preset(name, fresh, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    if name == "Shampoo":  # no labels are drawn, so that both runs can be compared number by number
        train(other, fresh, LIKELIHOOD, x, y, 3)
        for n, W in weights(model).items():
            assert_same(W, weights(fresh)[n])
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())
    assert not torch.equal(weights(model)["0"], before["0"])


@pytest.mark.parametrize("first", [False, True])
def test_a_fallback_that_is_not_fused_skips_too(first):
    model, (x, y) = mixed_net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01, observe_every=10)
    opt.fallback.param_groups[0]["fused"] = False
    if not first:
        one_step(opt, model, LIKELIHOOD, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    with opt.observing():
        z = model(x)
    opt.zero_grad()
    LIKELIHOOD.loss(z, y).backward()
    model[1].weight.grad[0] = float("nan")
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    one_step(opt, model, LIKELIHOOD, x, y)
    assert not torch.equal(model[1].weight, before[4])
    assert bool(torch.isfinite(model[1].weight).all())


def test_a_layer_without_gradient_in_a_bucket_of_equal_layers_stays():
    model, (x, y) = net(widths=(5, 5, 5, 5)), batch(widths=(5, 5, 5, 5))
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = weights(model)
    LIKELIHOOD.loss(model(x), y).backward()
    model[2].weight.grad = model[2].bias.grad = model[4].bias.grad = None
    opt.step()
    after = weights(model)
    assert torch.equal(before["2"], after["2"])
    assert torch.equal(before["4"][:, -1], after["4"][:, -1])
    assert not torch.equal(before["0"], after["0"])
    assert not torch.equal(before["4"], after["4"])


def test_a_non_finite_loss_of_a_closure_skips_the_step():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = weights(model)

    def closure():
        opt.zero_grad()
        LIKELIHOOD.loss(model(x), y).backward()
        return torch.tensor(float("inf"))

    opt.step(closure)
    assert all(torch.equal(before[n], W) for n, W in weights(model).items())


def test_statistics_that_overflow_are_dropped():
    """Finite inputs whose second moments are not."""
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.KFAC(model, LIKELIHOOD, 1e-3, observe_every=1, refresh_every=1)
    one_step(opt, model, LIKELIHOOD, x, y)
    A = opt.curvature["0"].moments["A"]
    with opt.observing():
        model(x * 1e25)
    assert torch.equal(opt.curvature["0"].moments["A"], A)


def test_a_failed_factorisation_raises_that_layers_jitter_and_is_told():
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.TKFAC(model, LIKELIHOOD, 0.01, damping=1e-30, observe_every=1, refresh_every=1)
    x[:, 1:] = x[:, :1]  # rank one and the bias: float32 Cholesky breaks down without damping
    with pytest.warns(
        RuntimeWarning, match="layer '0': the factorisation failed, jitter is now 1e-08"
    ):
        one_step(opt, model, LIKELIHOOD, x, y)
    assert opt.curvature["0"].jitter == 1e-8
    assert "jitter 1e-08" in repr(opt)
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())


def test_bases_hold_no_entries_below_their_rounding_error():
    """Their products would be denormal: steps of EKFAC on a large layer with dead inputs took six
    times as long.
    """
    basis = torch.eye(3)
    basis[0, 1], basis[1, 0] = 1e-20, 1e-8
    found = linalg.without_noise(basis)
    assert found[0, 1] == 0
    assert found[1, 0] == basis[1, 0]
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.EKFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x * torch.tensor([1.0, 1e-20, 1.0, 1e-30]), y)
    for c in opt.curvature.values():
        for B in (*c.matrix.basis, *c.inverse.basis):
            assert float(B[B != 0].abs().min()) > 1e-10


def test_carried_eigenvalues_are_not_made_of_noise():
    """Squares of what is left of a product of bases would be denormal."""
    before, after = torch.eye(3), torch.eye(3)
    before[1, 0] = after[1, 2] = 2e-10
    s = torch.zeros(1, 3, 3)
    s[0, 0, 0] = 1
    found = corrected.in_new_basis(s, (before[None], None), (after[None], None))
    assert found[0, 0, 0] == 1
    assert found[0, 2, 0] == 0


def test_if_nothing_helps_the_last_good_inverse_stays(monkeypatch):
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = {n: c.inverse.dense() for n, c in opt.curvature.items()}
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    monkeypatch.setattr(refresh, "prepare", lambda a, matrix, s, j: matrix.scaled(nan))
    monkeypatch.setattr(Kronecker, "rescued", lambda matrix, p, damping: matrix.scaled(nan))
    with pytest.warns(RuntimeWarning, match="the last good inverse stays"):
        one_step(opt, model, LIKELIHOOD, x, y)
    for n, c in opt.curvature.items():
        assert torch.equal(c.inverse.dense(), before[n])


def test_the_ladder_of_a_failed_factorisation_ends_with_eigh():
    """Each rung in turn: jitter in the same precision, float64, eigenvalues clamped at zero."""
    F = torch.diag(torch.tensor([1.0, 0.5, -1e-3], dtype=torch.float64))[None]
    found = BlockDiagonal(F, (1, 3)).rescued(-1.0, 1e-2)
    assert_same(
        found.dense(), torch.diag(1 / torch.tensor([1.01, 0.51, 0.01], dtype=torch.float64))
    )


def test_updates_that_are_skipped_between_refreshes_are_told_too():
    """TENGraD at a learning rate that is far too large: nearly every update is dropped for a
    hundred steps.
    """
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.TENGraD(model, LIKELIHOOD, 1e-3, observe_every=100, refresh_every=100)
    one_step(opt, model, LIKELIHOOD, x, y)
    told = []
    for _ in range(50):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            one_step(opt, model, LIKELIHOOD, x * float("nan"), y)
        told += [warning for warning in found if "updates were skipped" in str(warning.message)]
    assert len(told) == 2
    assert {warning.filename for warning in told} == {support.__file__}  # the line that calls step
    assert "step 40: 20 updates were skipped" in str(told[1].message)


def test_a_step_in_which_only_the_fallback_has_gradients_is_made():
    model, (x, y) = mixed_net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    one_step(opt, model, LIKELIHOOD, x, y, observe=False)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False] * 4 + [True] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_all_zero_gradients_and_statistics(name):
    """A loss that is constant: nothing moves, nothing becomes NaN."""
    model, (x, y) = net(), batch()
    model[2].weight.data.zero_()
    model[2].bias.data = torch.tensor([60.0, 0.0, 0.0], dtype=torch.float64)
    opt = preset(name, model, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    before = weights(model)
    train(opt, model, LIKELIHOOD, x, torch.zeros_like(y), 3)
    for n, W in weights(model).items():
        assert float((W - before[n]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", PRESETS)
def test_dead_units(name):
    model, (x, y) = net(), batch()
    model[0].bias.data[:2] = -100.0
    opt = preset(name, model, LIKELIHOOD, 0.01, observe_every=1, refresh_every=1)
    dead = weights(model)["0"][:2]
    train(opt, model, LIKELIHOOD, x, y, 4)
    assert torch.equal(weights(model)["0"][:2], dead)
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_of_one_and_factors_of_rank_one(name):
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = preset(name, model, LIKELIHOOD, 0.001, observe_every=1, refresh_every=1)
    train(opt, model, LIKELIHOOD, x[:1], y[:1], 4)
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_of_one_unit(name):
    model, (x, _) = net(widths=(1, 1, 1)), batch(widths=(1, 1, 1))
    opt = preset(name, model, fl.Gaussian(), 0.001)
    train(opt, model, fl.Gaussian(), x, torch.zeros_like(x), 3)


def test_equal_layers_are_worked_on_as_one_and_give_the_same_steps():
    found = []
    for groups in (None, [{"layers": [name]} for name in ("0", "2", "4")]):
        model, (x, y) = net(widths=(5, 5, 5, 5)), batch(widths=(5, 5, 5, 5))
        for style in ("factored", "exact"):
            opt = fl.NaturalGradient(
                model,
                LIKELIHOOD,
                fl.KFAC(),
                0.01,
                damping=0.1,
                damping_style=style,
                fisher="true",
                groups=groups,
            )
            train(opt, model, LIKELIHOOD, x, y, 3)
            assert sum(map(len, opt._buckets)) == (1 if groups is None else 3)
        found.append(weights(model))
    for name in found[0]:
        assert_same(found[0][name], found[1][name])


@pytest.mark.parametrize(
    "approximation", [fl.TN(), fl.MiniBlock(), fl.EKFAC(), fl.Diagonal(), fl.Exact()]
)
def test_equal_convolutions_are_worked_on_as_one_too(approximation):
    found = []
    for groups in (None, [{"layers": ["0"]}, {"layers": ["2"]}]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(2, 2, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(2, 2, 3, padding=1),
                nn.Flatten(),
            ).double()
            x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
        opt = fl.NaturalGradient(
            model,
            fl.Gaussian(),
            approximation,
            0.01,
            damping=0.1,
            fisher="true",
            observe_every=1,
            groups=groups,
        )
        train(opt, model, fl.Gaussian(), x, torch.zeros(6, 18, dtype=torch.float64), 3)
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_same(a.reshape(len(a), -1), b.reshape(len(b), -1))
