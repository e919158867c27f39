"""The observing window: what it records, what it leaves untouched, what it refuses."""

import shutil

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from fisher_lab.statistics import contractions
from tests.helpers import assert_same
from tests.optim.support import batch, layer_stats, net, one_step, train, weights

LIKELIHOOD = fl.Categorical()


def hooks(model):
    """Every hook of every kind on every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_no_hook_stays_on_the_model():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    assert hooks(model) == 0
    with opt.observing():
        assert hooks(model) > 0
        z = model(x)
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), opt.observing():
        _ = 1 / 0
    assert hooks(model) == 0
    LIKELIHOOD.loss(z, y).backward()
    opt.step()
    with opt.observing():  # not due: nothing is installed at all
        assert hooks(model) == 0
        model(x)


def test_the_extra_backward_touches_no_gradient_and_leaves_the_graph_to_the_loss():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    calls = []
    for p in model.parameters():
        p.register_hook(lambda g: calls.append(1))
    with opt.observing():
        z = model(x)
    assert all(p.grad is None for p in model.parameters())
    assert not calls
    LIKELIHOOD.loss(z, y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_global_state_and_the_models_own_randomness_are_untouched(restores_global_state):
    model, (x, _) = net(), batch()
    for fisher in ("mc", "true"):
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, fisher=fisher)
        with opt.observing():
            model(x)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_statistics_equal_those_made_by_hand(fisher):
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.Exact(), 0.1, fisher=fisher)
    with opt.observing(y if fisher == "empirical" else None):
        model(x)
    opt._refresh()
    for name, stats in layer_stats(model, LIKELIHOOD, x, fisher, y).items():
        assert_same(opt.matrices()[name].dense(), contractions.dense(stats))


def test_labels_given_make_this_window_empirical():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.TN(), 0.1)
    with opt.observing(y):
        model(x)
    opt._refresh()
    expected = fl.estimate(fl.TN(), model, LIKELIHOOD, (x, y), fisher="empirical")
    for name, matrix in opt.matrices().items():
        assert_same(matrix.dense(), expected[name].dense())


def test_ignored_labels_are_left_out_only_where_the_window_is_given_labels():
    loss, (x, y) = nn.CrossEntropyLoss(reduction="sum"), batch()
    kept = y.clone()
    kept[::3] = loss.ignore_index
    for fisher, given, data in (
        ("true", None, (x, y)),
        ("true", kept, (x, kept)),
        ("mc", kept, (x, kept)),
    ):
        model = net()
        opt = fl.NaturalGradient(model, loss, fl.Exact(), 0.1, fisher=fisher)
        with opt.observing(given):
            model(x)
        opt._refresh()
        kind = "true" if given is None else "empirical"
        for name, matrix in fl.exact_fisher(model, loss, data, fisher=kind).items():
            assert_same(opt.matrices()[name].dense(), matrix.dense())


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (nn.CrossEntropyLoss(), lambda y, z: y),
        (nn.CrossEntropyLoss(reduction="sum"), lambda y, z: y),
        (nn.MSELoss(), lambda y, z: torch.zeros_like(z)),
        (nn.BCEWithLogitsLoss(), lambda y, z: torch.ones_like(z)),
        (fl.Gaussian(2.0), lambda y, z: torch.zeros_like(z)),
        (fl.Bernoulli(), lambda y, z: torch.ones_like(z)),
    ],
)
def test_matrices_are_on_the_scale_of_the_losss_own_fisher(loss, make):
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, loss, fl.Exact(), 1e-3, fisher="true")
    one_step(opt, model, opt.likelihood, x, make(y, model(x)))
    fresh = net()
    for name, matrix in fl.exact_fisher(fresh, loss, (x, make(y, fresh(x).detach()))).items():
        assert_same(opt.matrices()[name].dense(), matrix.dense())


def test_sampled_labels_come_from_the_optimizers_own_generator():
    found = []
    for seed in (0, 0, 1):
        model, (x, _) = net(), batch()
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.TN(), 0.1, seed=seed)
        torch.manual_seed(len(found))
        with opt.observing():
            model(x)
        found.append(opt.curvature["0"].moments["mode0"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_in_place_activations_are_right():
    found = []
    for inplace in (False, True):
        model, (x, y) = net(), batch()
        model[1] = nn.ReLU(inplace=inplace)
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.EKFAC(), 0.1, fisher="true", observe_every=1)
        train(opt, model, LIKELIHOOD, x, y, 3)
        found.append(weights(model))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


def test_a_layer_used_twice_and_convolutions_are_observed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.twice, self.head = nn.Conv2d(1, 2, 3), nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            h = self.conv(x).tanh()
            h = self.twice(self.twice(h.flatten(2)).tanh())
            return self.head(h.flatten(1))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.Exact(), 0.1, fisher="true")
    with opt.observing():
        model(x)
    opt._refresh()
    for name, matrix in fl.exact_fisher(model, LIKELIHOOD, (x, None)).items():
        assert_same(opt.matrices()[name].dense(), matrix.dense())


def test_an_observation_under_no_grad_is_refused():
    model, (x, _) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    for off in (torch.no_grad(), torch.inference_mode()):
        with pytest.raises(ValueError, match="without a graph"), opt.observing(), off:
            model(x)


def test_an_observation_that_recorded_nothing_is_refused():
    model, (x, _) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    for forward in (lambda: None, lambda: net()(x), lambda: model[0](x)):
        with pytest.raises(ValueError, match="recorded no forward pass"), opt.observing():
            forward()


def test_backward_inside_the_window_is_refused_with_the_cure():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    with pytest.raises(ValueError, match=r"after the `with` block"), opt.observing():
        LIKELIHOOD.loss(model(x), y).backward()


def test_empirical_statistics_need_labels_of_the_right_number():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, fisher="empirical")
    with pytest.raises(ValueError, match="needs labels"), opt.observing():
        model(x)
    with pytest.raises(ValueError, match="got 3 labels for 12 examples"), opt.observing(y[:3]):
        model(x)


def test_forgetting_observing_is_an_error_and_not_plain_sgd():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"observed nothing yet.*opt.observing\(\)"):
        one_step(opt, model, LIKELIHOOD, x, y, observe=False)
    assert all(torch.equal(before[name], W) for name, W in weights(model).items())


def test_forgetting_observing_later_on_is_an_error_too():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 1e-3, observe_every=2)
    one_step(opt, model, LIKELIHOOD, x, y)

    def forget(steps: int) -> None:
        for _ in range(steps):
            one_step(opt, model, LIKELIHOOD, x, y, observe=False)

    with pytest.warns(RuntimeWarning, match="step 4: nothing was observed since step 0"):
        forget(22)
    with pytest.raises(ValueError, match="The last observation was 23 steps ago"):
        one_step(opt, model, LIKELIHOOD, x, y, observe=False)


def test_a_skipped_due_step_is_made_up_for():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 1e-3, observe_every=3)
    for k in range(8):
        one_step(opt, model, LIKELIHOOD, x, y, observe=k not in (3, 4))
    assert opt.observed_at == 5


class AtPositions(nn.Module):
    """A layer at positions, which sees examples and positions in one dimension, or apart."""

    def __init__(self, flat):
        super().__init__()
        self.layer, self.flat = nn.Linear(2, 2), flat

    def forward(self, x):
        x = x.unflatten(1, (-1, 2))
        if self.flat:
            return self.layer(x.flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1)
        return self.layer(x).flatten(1)


@pytest.mark.parametrize("method", ["KFAC", "TNT", "TENGraD"])
def test_a_layer_that_flattens_its_examples_is_put_in_order(method):
    found = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = AtPositions(flat).double()
        opt = getattr(optim, method)(model, fl.Gaussian(), 0.1)
        for _ in range(3):
            x = torch.randn(3, 4, dtype=torch.float64)
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            z.square().mean().backward()
            opt.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def test_a_layer_that_is_not_always_used_waits():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.extra, self.skip = nn.Linear(4, 3), nn.Linear(3, 3), True

        def forward(self, x):
            h = self.first(x)
            return h if self.skip else h + self.extra(h)

    torch.manual_seed(0)
    model, (x, y) = Sometimes().double(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=2)
    before = weights(model)["extra"]
    one_step(opt, model, LIKELIHOOD, x, y)
    assert torch.equal(weights(model)["extra"], before)
    model.skip = False
    with pytest.raises(ValueError, match="'extra' has a gradient but was never observed"):
        one_step(opt, model, LIKELIHOOD, x, y)
    opt.steps += 1
    one_step(opt, model, LIKELIHOOD, x, y)
    assert not torch.equal(weights(model)["extra"], before)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_observed_and_trains_alike(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    found = []
    for compiled in (False, True):
        model, (x, y) = net(), batch()
        run = torch.compile(model, backend=backend) if compiled else model
        opt = optim.KFAC(run, LIKELIHOOD, 0.1, observe_every=2, fisher="true")
        train(opt, run, LIKELIHOOD, x, y, 4)
        found.append(weights(model))
    for name in found[0]:
        assert_same(found[1][name], found[0][name])


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_in_place_is_observed_too():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=2)
    model.compile(backend="eager")
    train(opt, model, LIKELIHOOD, x, y, 3)
    assert hooks(model) == 0
    assert opt.observed_at == 2


def test_a_step_inside_the_window_is_told_what_it_is():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    with (
        pytest.raises(
            ValueError, match=r"step\(\) was called inside .*observing\(\).*expected after it"
        ),
        opt.observing(),
    ):
        one_step(opt, model, LIKELIHOOD, x, y, observe=False)
    one_step(opt, model, LIKELIHOOD, x, y)  # nothing is left of it
    assert opt.steps == 1


class Positions(nn.Module):
    """`[N, 4, 5]` -> classes second, `[N, 3, 5]`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(4, 3, 1)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("fisher", ["true", "mc"])
@pytest.mark.parametrize("index", [-100, 1, 0])
def test_the_mask_of_kept_labels_makes_the_statistics_those_of_the_loss(fisher, index):
    """Exactly for the closed form, on average for labels that are drawn."""
    torch.manual_seed(0)
    model, x = Positions().double(), torch.randn(6, 4, 5).double()
    y = torch.randint(0, 3, (6, 5))
    y = torch.where(torch.rand(6, 5) < 0.5, index, y)
    loss = nn.CrossEntropyLoss(ignore_index=index)
    expected = fl.estimate(fl.Diagonal(), model, loss, (x, y))["layer"].dense()
    found = []
    for seed in range(1 if fisher == "true" else 300):
        opt = fl.NaturalGradient(
            model, loss, fl.Diagonal(), 0.0, fisher=fisher, seed=seed, momentum=0.0
        )
        with opt.observing(kept=y != index):
            z = model(x)
        loss(z, y).backward()
        opt.step()
        found.append(opt.curvature["layer"].matrix.dense())
    assert_same(sum(found) / len(found), expected, 1e-10 if fisher == "true" else 0.15)


def test_masks_that_say_nothing_are_refused():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    with pytest.raises(ValueError, match="keeps all labels"), opt.observing(kept=y > 0):
        model(x)
    opt = optim.KFAC(model, nn.CrossEntropyLoss(), 0.1)
    with pytest.raises(TypeError, match="a tensor of booleans"):
        opt.observing(kept=y)
    with pytest.raises(ValueError, match="leave kept out"):
        opt.observing(y, kept=y > 0)
    opt = optim.KFAC(model, nn.CrossEntropyLoss(weight=torch.ones(3)), 0.1)
    with pytest.raises(ValueError, match=r"use observing\(y\)"), opt.observing(kept=y > 0):
        model(x)


def test_outputs_that_the_loss_cannot_read_are_told_at_the_first_observation():
    model, (x, _) = net(), batch()
    opt = optim.KFAC(model, nn.NLLLoss(), 0.1)
    with pytest.raises(ValueError, match="expected log-probabilities"), opt.observing():
        model(x)
