"""The training loop around an optimizer: momentum, decay, clipping, groups, schedulers, closures,
accumulation.
"""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.helpers import assert_same
from tests.optim.support import PRESETS, batch, gradients, net, one_step, preset, train, weights

LIKELIHOOD = fl.Categorical()
FIXED = {"fisher": "true", "damping": 0.1}


def inverses(opt):
    """What the optimizer multiplies each layer's gradient with, as a function."""
    return {name: (lambda X, P=c.inverse: P @ X) for name, c in opt.curvature.items()}


@pytest.mark.parametrize("order", ["before", "after"])
def test_momentum_before_and_after_preconditioning(order):
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(
        model,
        LIKELIHOOD,
        fl.KFAC(),
        0.1,
        momentum=0.8,
        momentum_order=order,
        observe_every=1,
        refresh_every=1,
        decay=0.0,
        **FIXED,
    )
    m = dict.fromkeys(weights(model), 0.0)
    for _ in range(3):
        W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
        one_step(opt, model, LIKELIHOOD, x, y)
        P = inverses(opt)
        for name in W:
            if order == "before":
                m[name] = 0.8 * m[name] + g[name]
                move = P[name](m[name])
            else:
                m[name] = 0.8 * m[name] + P[name](g[name])
                move = m[name]
            assert_same(weights(model)[name], W[name] - 0.1 * move)


def test_momentum_orders_coincide_while_the_inverse_stays():
    moved = {}
    for order in ("before", "after"):
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(
            model, LIKELIHOOD, fl.KFAC(), 0.1, momentum_order=order, observe_every=50, **FIXED
        )
        train(opt, model, LIKELIHOOD, x, y, 5)
        moved[order] = weights(model)
    for name in moved["before"]:
        assert_same(moved["before"][name], moved["after"][name])


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled):
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, fl.KFAC(), 0.1, weight_decay=0.3, decoupled=decoupled, **FIXED
    )
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    one_step(opt, model, LIKELIHOOD, x, y)
    P = inverses(opt)
    for name in W:
        if decoupled:
            expected = W[name] * (1 - 0.1 * 0.3) - 0.1 * P[name](g[name])
        else:
            expected = W[name] - 0.1 * P[name](g[name] + 0.3 * W[name])
        assert_same(weights(model)[name], expected)


def test_statistics_are_free_of_weight_decay():
    found = []
    for decay in (0.0, 5.0):
        model, (x, y) = net(), batch()
        opt = optim.Shampoo(model, LIKELIHOOD, 0.1, weight_decay=decay)
        one_step(opt, model, LIKELIHOOD, x, y)
        found.append(opt.matrices())
    for name in found[0]:
        assert_same(found[0][name].dense(), found[1][name].dense())


def whole_quadratic(model, x, step) -> float:
    """step^T F step of the whole network, F = 1/N sum of J^T (diag(p) - p p^T) J, by the chain rule
    alone.
    """
    z = model(x)
    # J step, as the derivative of u^T J in u
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, list(model.parameters()), u, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(pulled, step.values(), strict=True))
    (change,) = torch.autograd.grad(along, u)
    p = z.detach().softmax(1)
    variances = (p * change**2).sum(1) - (p * change).sum(1) ** 2
    return float(variances.detach().mean())


@pytest.mark.filterwarnings("ignore:.*keeps 4 of the")
@pytest.mark.parametrize("approximation", [fl.KFAC(), fl.MiniBlock(), fl.TENGraD(4)], ids=str)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("limit", [1e-6, 1e9])
def test_kl_clip_limits_what_the_step_does_on_the_batch(limit, order, approximation):
    """Of the whole network with its couplings, not <p, m> of the approximation."""
    model, (x, y) = net(), batch()
    options = {"kl_clip": limit, "momentum_order": order, "fisher": "true", "decay": 0.0}
    opt = fl.NaturalGradient(model, LIKELIHOOD, approximation, 0.1, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(opt, model, LIKELIHOOD, x, y)
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    found = whole_quadratic(model, x, step)
    if limit < 1:
        assert found == pytest.approx(limit, rel=1e-8)
    else:
        # not reached: the whole step is made
        assert found < limit
        free = net()
        options["kl_clip"] = None
        opt = fl.NaturalGradient(free, LIKELIHOOD, approximation, 0.1, **options)
        one_step(opt, free, LIKELIHOOD, x, y)
        for name, p in free.named_parameters():
            assert_same(p.detach(), before[name] + step[name])


def test_between_observations_kl_clip_keeps_the_ratio_found_last():
    """<p, m> follows the step, and the batch says once by how much it is off."""
    model, (x, y) = net(), batch()
    options = {"kl_clip": 1e-6, "observe_every": 2, "damping": 1.0, "momentum": 0.0}
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, **options)
    one_step(opt, model, LIKELIHOOD, x, y)
    ratio = opt.step_size.ratio
    assert ratio is not None
    assert abs(float(ratio) - 1) > 0.1
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    one_step(opt, model, LIKELIHOOD, x, y)  # not due
    assert opt.step_size.ratio is ratio
    P = inverses(opt)
    inner = 0.0
    squared = 0.0
    for name in W:
        p = P[name](g[name])
        inner += float((p * g[name]).sum())
        squared += float(p.square().sum())
    moved = sum(float((weights(model)[name] - W[name]).square().sum()) for name in W)
    lr_nu = (moved / squared) ** 0.5
    assert lr_nu**2 * inner * float(ratio) == pytest.approx(1e-6, rel=1e-8)
    one_step(opt, model, LIKELIHOOD, x, y)  # due
    assert opt.step_size.ratio is not ratio


def test_the_examples_of_a_step_are_let_go_with_it():
    model, (x, y) = net(), batch(400)
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, kl_clip=1e-6)
    with opt.observing():
        z = model(x)
    (held,) = opt.step_size.seen
    assert all(stats.N == 128 for stats in held.values())
    LIKELIHOOD.loss(z, y).backward()
    opt.step()
    assert opt.step_size.seen == []
    opt.warm_start((x, y))
    assert opt.step_size.seen == []


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_kl_clip_bounds_the_step_of_an_inverse_root_in_its_own_matrix(order, conv):
    """Shampoo's p is not F^-1 m, so that <p, m> is not p^T F p."""
    model, (x, y) = net(widths=(4, 5, 5, 3)), batch(widths=(4, 5, 5, 3))
    if conv:
        model = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3)
        ).double()
    opt = optim.Shampoo(model, LIKELIHOOD, 0.1, kl_clip=1e-6, momentum_order=order)
    W = {
        name: layer.pack(dict(layer.parameters)).detach().clone()
        for name, layer in opt.layers.items()
    }
    one_step(opt, model, LIKELIHOOD, x, y)
    power = 0.0
    for name, layer in opt.layers.items():
        step = layer.pack(dict(layer.parameters)).detach() - W[name]
        power += float((step * (opt.matrices()[name] @ step)).sum())
    assert power == pytest.approx(1e-6, rel=1e-8)


def test_groups_have_their_own_settings_and_approximation():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(
        model,
        LIKELIHOOD,
        fl.KFAC(),
        0.1,
        groups=[
            {
                "layers": ["2"],
                "lr": 0.02,
                "damping": 1.0,
                "approximation": fl.Diagonal(),
                "weight_decay": 0.5,
            }
        ],
        **FIXED,
    )
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    F = fl.estimate(fl.KFAC(), model, LIKELIHOOD, (x, None)) | {
        "2": fl.estimate(fl.Diagonal(), model, LIKELIHOOD, (x, None))["2"]
    }
    one_step(opt, model, LIKELIHOOD, x, y)
    assert_same(weights(model)["0"], W["0"] - 0.1 * F["0"].solve(g["0"], 0.1))
    assert_same(weights(model)["2"], W["2"] - 0.02 * F["2"].solve(g["2"] + 0.5 * W["2"], 1.0))
    assert "2: Linear 3 x 6, Diagonal" in repr(opt)


def test_weight_and_bias_of_a_layer_share_a_group():
    model = net()
    with pytest.raises(ValueError, match="each in one group"):
        fl.NaturalGradient(
            model, LIKELIHOOD, fl.KFAC(), 0.1, groups=[{"layers": ["0"]}, {"layers": ["0"]}]
        )
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, fl.KFAC(), 0.1, groups=[{"layers": ["2"], "lr": 0.5}]
    )
    groups = [{id(p) for p in group["params"]} for group in opt.param_groups]
    for module in (model[0], model[2]):
        assert any({id(module.weight), id(module.bias)} <= group for group in groups)


SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5**k),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(
        opt, 0.3, total_steps=8, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "LinearLR": lambda opt: torch.optim.lr_scheduler.LinearLR(opt),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers_move_every_group(name):
    model, (x, y) = nn.Sequential(net(), nn.LayerNorm(3).double()), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    schedule = SCHEDULERS[name](opt)
    before = [group["lr"] for group in opt.param_groups]
    for _ in range(4):
        one_step(opt, model, LIKELIHOOD, x, y)
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert all(group["lr"] != lr for group, lr in zip(opt.param_groups, before, strict=True))
    assert opt.fallback.param_groups[0]["lr"] == opt.param_groups[-1]["lr"]


def test_a_changed_lr_is_the_lr_of_the_next_step():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, momentum=0.0, **FIXED)
    one_step(opt, model, LIKELIHOOD, x, y)
    opt.param_groups[0]["lr"] = 0.03
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    one_step(opt, model, LIKELIHOOD, x, y)
    for name, P in inverses(opt).items():
        assert_same(weights(model)[name], W[name] - 0.03 * P(g[name]))


def test_a_tensor_as_lr_gives_the_same_steps():
    moved = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model, (x, y) = net(), batch()
        train(
            optim.TNT(model, LIKELIHOOD, lr, weight_decay=0.1, decoupled=True, kl_clip=0.01),
            model,
            LIKELIHOOD,
            x,
            y,
            3,
        )
        moved.append(weights(model))
    for name in moved[0]:
        assert_same(moved[0][name], moved[1][name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_closure_gives_the_same_steps_and_returns_the_loss(name):
    moved = []
    for closed in (False, True):
        model, (x, y) = net(), batch()
        opt = preset(name, model, LIKELIHOOD, 0.01)

        def closure(opt=opt, model=model, x=x, y=y):
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            loss = LIKELIHOOD.loss(z, y)
            loss.backward()
            return loss

        for _ in range(3):
            loss = opt.step(closure) if closed else one_step(opt, model, LIKELIHOOD, x, y)
        assert float(loss.detach()) > 0
        moved.append(weights(model))
    for layer in moved[0]:
        assert torch.equal(moved[0][layer], moved[1][layer])


@pytest.mark.parametrize(
    "approximation", [fl.KFAC(), fl.TN(), fl.MiniBlock(), fl.Exact(), fl.Diagonal()]
)
def test_accumulated_micro_batches_equal_the_whole_batch(approximation):
    """With the expectation over labels in closed form; twice, so that the average over observations
    takes part.
    """
    moved = []
    for pieces in ((12,), (6, 4, 2)):
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(model, LIKELIHOOD, approximation, 0.1, observe_every=1, **FIXED)
        for _ in range(3):
            opt.zero_grad()
            for part_x, part_y in zip(x.split(list(pieces)), y.split(list(pieces)), strict=True):
                with opt.observing():
                    z = model(part_x)
                (LIKELIHOOD.loss(z, part_y) * len(part_x) / len(x)).backward()
            opt.step()
        moved.append(weights(model))
    for name in moved[0]:
        assert_same(moved[0][name], moved[1][name])


def test_several_forward_passes_in_one_window_add_examples():
    moved = []
    for pieces in ((12,), (7, 5)):
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, **FIXED)
        with opt.observing():
            z = torch.cat([model(part) for part in x.split(list(pieces))])
        opt.zero_grad()
        LIKELIHOOD.loss(z, y).backward()
        opt.step()
        moved.append(weights(model))
    for name in moved[0]:
        assert_same(moved[0][name], moved[1][name])


def test_clipped_gradients_are_what_is_preconditioned():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, **FIXED)
    W = weights(model)
    with opt.observing():
        z = model(x)
    opt.zero_grad()
    LIKELIHOOD.loss(z, y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    g = {
        name: torch.cat([m.weight.grad, m.bias.grad[:, None]], 1)
        for name, m in model.named_modules()
        if name in W
    }
    opt.step()
    for name, P in inverses(opt).items():
        assert_same(weights(model)[name], W[name] - 0.1 * P(g[name]))


def test_periods_observations_and_refreshes():
    """Step 0 observes and refreshes; a refresh follows every observation until `refresh_every`,
    then every so often.
    """
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01, observe_every=2, refresh_every=5)
    observed, refreshed, last = [], [], None
    for k in range(20):
        before = opt.observed_at
        one_step(opt, model, LIKELIHOOD, x, y)
        observed += [k] if opt.observed_at != before else []
        inverse = opt.curvature["0"].inverse
        refreshed += [k] if inverse is not last else []
        last = inverse
    assert observed == list(range(0, 20, 2))
    assert refreshed == [0, 2, 4, 10, 15]


def test_the_moving_average_starts_as_a_mean():
    model, (x, y) = net(), batch(24)
    opt = fl.NaturalGradient(
        model,
        LIKELIHOOD,
        fl.KFAC(),
        0.0,
        observe_every=1,
        refresh_every=1,
        decay=0.9,
        fisher="true",
    )
    parts = x.split(8)
    for part, labels in zip(parts, y.split(8), strict=True):
        one_step(opt, model, LIKELIHOOD, part, labels)
    mean = [
        torch.stack(
            [fl.estimate(fl.KFAC(), model, LIKELIHOOD, part)["0"].factors[i] for part in parts]
        ).mean(0)
        for i in (0, 1)
    ]
    for found, expected in zip(opt.matrices()["0"].factors, mean, strict=True):
        assert_same(found[0], expected[0])


def naive_average(values, sizes, rho):
    """The moving average of values from observations of some sizes, by its definition."""
    found = values[0]
    for k in range(1, len(values)):
        n, total = sizes[k], sum(sizes[: k + 1])
        left = min(1 - n / total, rho ** (n / (total / (k + 1))))
        found = left * found + (1 - left) * values[k]
    return found


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8, 3), (6, 6, 6, 6, 6, 1, 6, 12)])
def test_observations_weigh_by_their_examples(sizes):
    model, rho = net(), 0.6
    options = {"observe_every": 1, "refresh_every": 100, "decay": rho, "fisher": "true"}
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.0, **options)
    values = []
    for k, n in enumerate(sizes):
        x, y = batch(n, seed=k)
        one_step(opt, model, LIKELIHOOD, x, y)
        values.append(fl.estimate(fl.KFAC(), model, LIKELIHOOD, x)["0"].factors[1])
    assert_same(opt.curvature["0"].moments["A"][0], naive_average(values, sizes, rho)[0])


def test_a_batch_of_one_after_one_of_many_weighs_next_to_nothing():
    model = net()
    opt = optim.KFAC(model, LIKELIHOOD, 0.0, observe_every=1)
    for n in (64, 1):
        one_step(opt, model, LIKELIHOOD, *batch(n))
        A = opt.curvature["0"].moments["A"].clone()
        whole = A if n == 64 else whole  # noqa: F821
    assert float((A - whole).norm() / whole.norm()) < 0.1


@pytest.mark.parametrize("name", ["TNT", "Shampoo"])
def test_observations_of_mean_gradients_weigh_by_the_examples_they_are_means_of(name):
    """Their statistics are one matrix each, whatever the batch."""
    model, sizes = net(), (9, 3)
    opt = preset(name, model, LIKELIHOOD, 0.0, observe_every=1, refresh_every=100)
    alone = []
    for k, n in enumerate(sizes):
        x, y = batch(n, seed=k)
        one_step(opt, model, LIKELIHOOD, x, y)
        g = gradients(model, LIKELIHOOD, x, y)["0"]
        alone.append(n * g @ g.T)
    mode0 = opt.curvature["0"].moments["mode0"]
    if name == "Shampoo":
        assert_same(mode0[0], (9 * alone[0] + 3 * alone[1]) / 12)
    else:  # at sampled labels
        assert float(opt.curvature["0"].past.size) == 6.0


def test_windows_of_mean_gradients_weigh_by_their_examples():
    found = []
    for pieces in ((12,), (8, 4)):
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(
            model, LIKELIHOOD, fl.TN(), 0.0, statistics="mean", fisher="empirical"
        )
        for part, labels in zip(x.split(list(pieces)), y.split(list(pieces)), strict=True):
            with opt.observing(labels):
                z = model(part)
            LIKELIHOOD.loss(z, labels).backward()
            g = gradients(model, LIKELIHOOD, part, labels)["0"]
            found.append(len(part) * g @ g.T)
        opt.step()
    assert_same(opt.curvature["0"].moments["mode0"][0], (8 * found[1] + 4 * found[2]) / 12)


def kept_of(opt, name="0"):
    """Inputs `[kept, d_in]` of the examples that a layer's columns are of, those with a weight."""
    moments = opt.curvature[name].moments
    return moments["a"][moments.weights > 0][:, 0, 0, :-1]


@pytest.mark.filterwarnings("ignore:.*keeps 8 of the 12 examples")
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.5, 0.95])
@pytest.mark.parametrize("n", [8, 12, 3])
def test_tengrad_renews_its_columns_whatever_the_decay(n, decay):
    """At decay >= 0.5 it kept the examples of its first observations for ever; then the newest
    alone, so that nothing was averaged.
    """
    model, most = net(), 8
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.TENGraD(most), 0.0, observe_every=1, decay=decay)
    seen = []
    ages = torch.zeros(30)
    for k in range(30):
        x, y = batch(n, seed=k)
        one_step(opt, model, LIKELIHOOD, x, y)
        seen.append(x[:most])
        weights = opt.curvature["0"].moments.weights
        for row, weight in zip(kept_of(opt), weights[weights > 0], strict=True):
            (then,) = [i for i, part in enumerate(seen) if (part == row).all(1).any()]
            ages[k - then] += weight
    with pytest.warns(RuntimeWarning, match="dropped as non-finite"):
        # examples without weight take nobody's place
        one_step(opt, model, LIKELIHOOD, x * float("nan"), y)
    assert len(kept_of(opt)) == (most if decay else min(n, most))
    # their mean age in the moving average itself; at 0.95 all observations count alike so far
    mean = float((ages * torch.arange(30)).sum() / ages.sum())
    expected = {0.0: 0.0, 0.4: 0.4 / 0.6, 0.5: 1.0}.get(decay, 0.5 * 29 / 2)
    assert mean == pytest.approx(expected, rel=0.35)


@pytest.mark.filterwarnings("ignore:.*keeps 4 of the 8 examples")
def test_tengrad_keeps_the_same_examples_in_every_layer_also_after_a_checkpoint():
    model = net()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.TENGraD(4), 0.0, observe_every=1)
    for k in range(5):
        one_step(opt, model, LIKELIHOOD, *batch(8, seed=k))
    other = fl.NaturalGradient(model, LIKELIHOOD, fl.TENGraD(4), 0.0, observe_every=1)
    other.load_state_dict(opt.state_dict())
    for o in (opt, other):
        torch.manual_seed(3)
        one_step(o, model, LIKELIHOOD, *batch(8, seed=9))
    first, second = opt.curvature["0"].moments, opt.curvature["2"].moments
    assert torch.equal(first["weight"], second["weight"])
    with torch.no_grad():
        hidden = model[:2](first["a"][:, 0, 0, :-1])
    torch.testing.assert_close(hidden, second["a"][:, 0, 0, :-1])
    assert torch.equal(first["a"], other.curvature["0"].moments["a"])


@pytest.mark.parametrize("statistics", ["per_example", "mean"])
def test_a_sub_sample_of_a_batch_is_told_once(statistics):
    """Outside the span of its columns only the damping bounds a step, which kl_clip does
    not see.
    """
    model, (x, y) = net(), batch(12)
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, fl.TENGraD(8), 0.0, observe_every=1, statistics=statistics
    )
    if statistics == "per_example":
        with pytest.warns(RuntimeWarning, match=r"TENGraD\(batch=8\) keeps 8 of the 12 examples"):
            one_step(opt, model, LIKELIHOOD, x, y)
    for _ in range(3):
        one_step(opt, model, LIKELIHOOD, x, y)


def test_the_optimizer_tengrad_keeps_whole_batches_up_to_a_thousand_examples():
    model = net()
    opt = optim.TENGraD(model, LIKELIHOOD, 0.0)
    one_step(opt, model, LIKELIHOOD, *batch(300))
    assert opt.curvature["0"].moments["a"].shape[0] == 300
    assert opt.curvature["0"].approximation.batch == 1000


def test_a_warm_start_is_the_mean_over_the_data_and_then_moves_slowly():
    model, (x, y) = net(), batch(24)
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, fl.TN(), 0.0, observe_every=1, refresh_every=1, decay=0.9, fisher="true"
    )
    opt.warm_start([(part, None) for part in x.split(10)])
    whole = fl.estimate(fl.TN(), model, LIKELIHOOD, x)["0"]
    assert_same(opt.matrices()["0"].dense(), whole.dense())
    old = opt.curvature["0"].moments["mode0"]
    for k in range(3):
        one_step(opt, model, LIKELIHOOD, x[:5], y[:5])
        if k == 0:
            assert torch.equal(opt.curvature["0"].moments["mode0"], old)
        if k == 1:
            new = fl.estimate(fl.TN(), model, LIKELIHOOD, x[:5])["0"].factors[0]
            assert_same(opt.curvature["0"].moments["mode0"][0], 0.9 * old[0] + 0.1 * new[0])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name):
    model, (x, y) = net(torch.float32), batch(64, dtype=torch.float32)
    y = (x.sum(1) > 0) + (x[:, 0] > 0).to(torch.int64)
    losses = train(preset(name, model, LIKELIHOOD, 0.03, damping=0.1), model, LIKELIHOOD, x, y, 60)
    assert losses[-1] < 0.6 * losses[0]


WRONG = [
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": 0.1, "damping": -1.0}, "damping=-1.0"),
    ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
    ({"lr": 0.1, "momentum_order": "never"}, "momentum_order='never'"),
    ({"lr": 0.1, "damping_style": "soft"}, "damping_style='soft'"),
    ({"lr": 0.1, "observe_every": 0}, "observe_every=0"),
    ({"lr": 0.1, "refresh_every": 1.5}, "refresh_every=1.5"),
    ({"lr": 0.1, "decay": 1.0}, "decay=1.0"),
    ({"lr": 0.1, "fisher": "real"}, "fisher='real'"),
    ({"lr": 0.1, "statistics": "median"}, "statistics='median'"),
    ({"lr": 0.1, "statistics": "mean"}, "KFAC needs layer inputs"),
    ({"lr": 0.1, "kl_clip": 0.0}, "kl_clip=0.0"),
    ({"lr": 0.1, "groups": [{"layers": ["9"]}]}, "layer '9'"),
    ({"lr": 0.1, "groups": [{"lr": 1.0}]}, "expected 'layers'"),
    ({"lr": 0.1, "layers": ["7"]}, "layer '7'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_settings_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        fl.NaturalGradient(net(), LIKELIHOOD, fl.KFAC(), **options)
    assert "expected" in str(error.value)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="not its parameters"):
        fl.NaturalGradient(net().parameters(), LIKELIHOOD, fl.KFAC(), 0.1)
    with pytest.raises(TypeError, match=r"an instance such as fl.KFAC\(\)"):
        fl.NaturalGradient(net(), LIKELIHOOD, fl.KFAC, 0.1)
