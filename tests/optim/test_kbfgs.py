"""K-BFGS: its two quasi-Newton updates, the whole step against a naive one, and its place in a
training loop.
"""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from fisher_lab.optim.bfgs import bfgs_, double_damping
from tests.helpers import assert_same
from tests.naive import kron
from tests.optim.support import batch, gradients, layer_stats, net, weights

LIKELIHOOD = fl.Categorical()


def spd(n, generator):
    M = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return M @ M.T + 0.1 * torch.eye(n, dtype=torch.float64)


def test_golden_numbers_of_double_damping():
    H, s, y = (
        torch.diag(torch.tensor([2.0, 1.0])),
        torch.tensor([1.0, 0.0]),
        torch.tensor([-1.0, 1.0]),
    )
    s, y = double_damping(H, s, y, 0.2, 0.3)
    assert torch.allclose(s, torch.tensor([-0.2, 0.4]))
    assert torch.allclose(y, torch.tensor([-1.0, 1.0]))
    expected = torch.tensor([[1.066667, 0.866667], [0.866667, 1.266667]])
    assert torch.allclose(bfgs_(H, s, y), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_double_damping_keeps_h_positive_definite_and_the_secant_equation(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 2 + seed % 4
    H = spd(n, generator)
    for _ in range(15):
        s, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
        first, _ = double_damping(H, s, y, 0.2, 1e-300)
        assert first @ y >= 0.2 * (y @ H @ y) * (1 - 1e-9)
        s, y = double_damping(H, s, y, 0.2, 0.3)
        assert s @ y >= 0.3 * (s @ s) * (1 - 1e-9)
        expected, given = naive_bfgs(H, s, y), H
        H = bfgs_(H, s, y)
        assert H is given  # in place
        assert_same(H, expected)
        assert torch.linalg.eigvalsh(H)[0] > 0
        assert torch.allclose(H @ y, s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_hessian_action_never_moves_away_from_the_inverse(seed):
    """P24: |A^1/2 H A^1/2 - I| never increases in either norm for s = H v, y = A s."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 + seed % 5
    A, H = spd(n, generator), spd(n, generator)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.sqrt()) @ vectors.T
    eye = torch.eye(n, dtype=torch.float64)
    norms = []
    for _ in range(15):
        gap = root @ H @ root - eye
        norms.append((float(gap.norm()), float(torch.linalg.matrix_norm(gap, 2))))
        s = H @ torch.randn(n, generator=generator, dtype=torch.float64)
        H = bfgs_(H, s, A @ s)
    for before, after in pairwise(norms):
        assert after[0] <= before[0] * (1 + 1e-9)
        assert after[1] <= before[1] * (1 + 1e-9)


def test_a_pair_without_positive_curvature_is_left_out():
    H = torch.eye(2)
    first, nan, huge = (
        torch.tensor([1.0, 0.0]),
        torch.tensor([torch.nan, 1.0]),
        torch.tensor([1e38, 1.0]),
    )
    left_out = [
        (first, -first, True, 0.0),
        (torch.zeros(2), torch.zeros(2), True, 0.0),
        (first, 0.1 * first, True, 0.5),
        (first, first, torch.tensor(False), 0.0),
        (nan, first, True, 0.0),
        (first, nan, True, 0.0),
        (huge, first, True, 0.0),
        (first, huge, True, 0.0),
    ]
    for s, y, ok, guard in left_out:
        assert torch.equal(bfgs_(H, s, y, ok, guard), torch.eye(2))


def closure_of(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = LIKELIHOOD.loss(model(x), y)
        loss.backward()
        return loss

    return closure


def same_factors(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def naive_means(model, x, y):
    """A, abar, hbar, gbar per layer, from inputs and gradients made by hand."""
    stats = layer_stats(model, LIKELIHOOD, x, "empirical", y)
    W, found = weights(model), {}
    for name, s in stats.items():
        a, g = s.a[:, 0, 0], -s.g[0, :, 0, 0]  # the statistics hold gradients of log p
        found[name] = (a.T @ a / len(a), a.mean(0), (a @ W[name].T).mean(0), g.mean(0))
    return found


def naive_bfgs(H, s, y):
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    return (eye - rho * torch.outer(s, y)) @ H @ (
        eye - rho * torch.outer(y, s)
    ) + rho * torch.outer(s, s)


def naive_damping(H, s, y, mu1, mu2):
    if s @ y < mu1 * (y @ H @ y):
        theta = (1 - mu1) * (y @ H @ y) / (y @ H @ y - s @ y)
        s = theta * s + (1 - theta) * H @ y
    if s @ y < mu2 * (s @ s):
        theta = (1 - mu2) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


def test_three_steps_equal_the_dense_formula():
    model, (x, y) = net(), batch()
    lam, lr = 0.3, 0.1
    opt = optim.KBFGS(model, LIKELIHOOD, lr, damping=lam, weight_decay=0.01)
    closure = closure_of(opt, model, x, y)
    state, m = {}, dict.fromkeys(weights(model), 0.0)
    for _ in range(3):
        W, g, before = weights(model), gradients(model, LIKELIHOOD, x, y), naive_means(model, x, y)
        for name, (A, *_) in before.items():
            eye = torch.eye(len(A), dtype=A.dtype)
            zero = torch.zeros(len(W[name]), dtype=A.dtype)
            start = (
                A,
                torch.linalg.inv(A + lam**0.5 * eye),
                torch.eye(len(W[name]), dtype=A.dtype),
                zero,
                zero,
            )
            state.setdefault(name, start)
        opt.step(closure)
        after = naive_means(model, x, y)
        for name in W:
            A, H_a, H_g, s, d = state[name]
            m[name] = 0.9 * m[name] + g[name] + 0.01 * W[name]
            step = (kron(H_g.contiguous(), H_a.contiguous()) @ m[name].flatten()).reshape(
                W[name].shape
            )
            assert_same(weights(model)[name], W[name] - lr * step)
            A = 0.9 * A + 0.1 * before[name][0]
            s_a = H_a @ before[name][1]
            H_a = naive_bfgs(H_a, s_a, A @ s_a + lam**0.5 * s_a)
            s = 0.9 * s + 0.1 * (after[name][2] - before[name][2])
            d = 0.9 * d + 0.1 * (after[name][3] - before[name][3])
            H_g = naive_bfgs(H_g, *naive_damping(H_g, s, d, 0.2, lam**0.5))
            state[name] = (A, H_a, H_g, s, d)
            assert_same(opt.inverses()[name].dense(), kron(H_g.contiguous(), H_a.contiguous()))


def test_a_step_without_closure_is_refused():
    model, (x, y) = net(), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.1)
    with opt.observing():
        z = model(x)
    LIKELIHOOD.loss(z, y).backward()
    with pytest.raises(
        ValueError, match=r"expected one: it needs a second pass; write opt.step\(closure\)"
    ):
        opt.step()


def test_it_trains_with_a_warm_start_and_a_fallback_and_leaves_no_hooks():
    model, (x, y) = nn.Sequential(net(), nn.LayerNorm(3).double()), batch(64)
    y = (x.sum(1) > 0) + (x[:, 0] > 0).to(torch.int64)
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.warm_start((x, None))
    assert_same(opt.factors["0.0"].A[-1:, :-1], x.mean(0, keepdim=True))
    losses = [float(opt.step(closure_of(opt, model, x, y)).detach()) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    assert "0.2: Linear 3 x 6, K-BFGS" in repr(opt)
    assert "1.weight" in repr(opt)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_batches_change_nothing(bad):
    model, (x, y) = net(), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    before, factors = weights(model), copy.deepcopy(opt.factors)
    opt.step(closure_of(opt, model, x * bad, y))
    assert all(torch.equal(before[name], W) for name, W in weights(model).items())
    for name, found in factors.items():
        assert same_factors(found, opt.factors[name])
    assert opt.troubles()["updates skipped as non-finite"] == 1


def test_inputs_whose_squares_overflow_change_no_factor_of_their_layer():
    model, (x, y) = net(), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    factors = copy.deepcopy(opt.factors)
    opt.step(closure_of(opt, model, x * 1e200, y))
    assert same_factors(factors["0"], opt.factors["0"])
    assert all(
        bool(torch.isfinite(F).all())
        for found in opt.factors.values()
        for F in vars(found).values()
    )


def test_a_second_pass_that_is_not_finite_leaves_all_factors():
    model, (x, y) = net(), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    factors = copy.deepcopy(opt.factors)
    first, second = closure_of(opt, model, x, y), closure_of(opt, model, x * float("nan"), y)
    calls = iter([first, second])
    opt.step(lambda: next(calls)())
    for name, found in factors.items():
        assert same_factors(found, opt.factors[name])
    opt.step(first)
    assert not torch.equal(factors["0"].H_a, opt.factors["0"].H_a)


def test_a_saved_state_and_the_inverses_handed_out_stay_as_they_were():
    """Steps change the factors in place."""
    model, (x, y) = net(), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    saved, inverses = opt.state_dict()["fisher_lab"]["factors"], opt.inverses()
    kept, dense = copy.deepcopy(saved), {name: K.dense() for name, K in inverses.items()}
    opt.step(closure_of(opt, model, x, y))
    for name, found in kept.items():
        assert all(torch.equal(found[key], saved[name][key]) for key in found)
        assert torch.equal(dense[name], inverses[name].dense())


def test_resuming_is_exact():
    model, (x, y) = net(torch.bfloat16), batch(dtype=torch.bfloat16)
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, y))
    twin = copy.deepcopy(model)
    other = optim.KBFGS(twin, LIKELIHOOD, 0.05)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        opt.step(closure_of(opt, model, x, y))
        other.step(closure_of(other, twin, x, y))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_state_of_another_precision_is_converted():
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    twin = copy.deepcopy(model).double()
    other = optim.KBFGS(twin, LIKELIHOOD, 0.05)
    other.load_state_dict(opt.state_dict())
    opt.step(closure_of(opt, model, x, y))
    other.step(closure_of(other, twin, x.double(), y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-4, atol=1e-6)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"no trainable nn\.Linear"):
        optim.KBFGS(nn.Conv2d(1, 1, 1), LIKELIHOOD, 0.1)


def test_shared_positions_are_refused():
    model = nn.Linear(3, 2)
    opt = optim.KBFGS(model, fl.Gaussian(), 0.1)
    with pytest.raises(ValueError, match="is used at 4 positions, expected one"):
        opt.step(lambda: model(torch.randn(5, 4, 3)).sum())


def test_a_layer_without_gradient_in_a_step_stays_and_the_others_move():
    """An expert that no example chose, or a layer frozen later."""
    model, (x, y) = net(widths=(4, 5, 5, 3)), batch()
    opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
    opt.step(closure_of(opt, model, x, y))
    before = weights(model)
    model[2].requires_grad_(False)
    opt.step(closure_of(opt, model, x, y))
    after = weights(model)
    assert torch.equal(before["2"], after["2"])
    assert not torch.equal(before["0"], after["0"])
    assert not torch.equal(before["4"], after["4"])


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
def test_a_gradient_scale_changes_nothing_but_rounding(scale):
    """The change of the gradients is that of the loss, not of the scaled loss."""
    found = []
    for scaled in (False, True):
        model, (x, y) = net(), batch()
        opt = optim.KBFGS(model, LIKELIHOOD, 0.05)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale, enabled=scaled, growth_interval=10**6
        )

        def closure(opt=opt, model=model, scaler=scaler, x=x, y=y):
            opt.zero_grad()
            loss = LIKELIHOOD.loss(model(x), y)
            scaler.scale(loss).backward()
            return loss

        closure()  # the scaler looks at gradients before the step
        for _ in range(6):
            scaler.step(opt, closure)
            scaler.update()
        found.append(weights(model))
    for name, W in found[0].items():
        assert_same(found[1][name], W, 1e-9)
