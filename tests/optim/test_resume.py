"""Resuming from a state is exact bit by bit, at any point, and loads with weights_only=True."""

import copy
import dataclasses
import gc
import io

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from fisher_lab.optim import saving
from tests.optim.support import PRESETS, batch, net, one_step, preset

LIKELIHOOD = fl.Categorical()
APPROXIMATIONS = [
    fl.KFAC(),
    fl.EKFAC(),
    fl.TEKFAC(),
    fl.TN(),
    fl.MiniBlock(),
    fl.TENGraD(4),
    fl.KPSVD(),
    fl.Exact(),
    fl.Diagonal(),
    fl.LNGD(),
]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def net_with_fallback(dtype):
    model = nn.Sequential(net(dtype), nn.LayerNorm(3, dtype=dtype))
    return model


def make(name, model, **options):
    periods = {"observe_every": 2, "refresh_every": 5, "weight_decay": 0.01, **options}
    if isinstance(name, str):
        return preset(name, model, LIKELIHOOD, 0.01, **periods)
    return fl.NaturalGradient(model, LIKELIHOOD, name, 0.01, damping=0.1, **periods)


def go_on(opt, model, x, y, steps):
    for k in range(steps):
        one_step(opt, model, LIKELIHOOD, x.roll(k, 0), y.roll(k, 0))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_resuming_between_steps_is_exact(name, dtype, steps):
    model, (x, y) = net_with_fallback(dtype), batch(dtype=dtype)
    opt = make(name, model)
    go_on(opt, model, x, y, steps)
    twin = copy.deepcopy(model)
    other = make(name, twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 9), go_on(other, twin, x, y, 9), strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*of the 12 examples of a batch")
@pytest.mark.parametrize("approximation", APPROXIMATIONS, ids=lambda a: a.label)
def test_resuming_is_exact_for_every_approximation(approximation):
    model, (x, y) = net_with_fallback(torch.float64), batch()
    opt = make(approximation, model, statistics="per_example")
    go_on(opt, model, x, y, 4)
    twin = copy.deepcopy(model)
    other = make(approximation, twin, statistics="per_example")
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 7), go_on(other, twin, x, y, 7), strict=True)
    )


def finish(opt, model, x, y):
    """The rest of a step whose forward pass was observed and whose loss was not yet
    differentiated.
    """
    opt.zero_grad()
    LIKELIHOOD.loss(model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_resuming_right_after_observing_is_exact(name, dtype):
    model, (x, y) = net_with_fallback(dtype), batch(dtype=dtype)
    opt = make(name, model)
    go_on(opt, model, x, y, 2)
    with opt.observing():
        model(x)
    twin = copy.deepcopy(model)
    other = make(name, twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for o, m in ((opt, model), (other, twin)):
        finish(o, m, x, y)
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 7), go_on(other, twin, x, y, 7), strict=True)
    )


@pytest.mark.parametrize("kl_clip", [None, 1e-4])
@pytest.mark.parametrize("name", PRESETS)
def test_resuming_inside_an_accumulation_window_is_exact(name, kl_clip):
    model, (x, y) = net_with_fallback(torch.float64), batch()
    opt = make(name, model, kl_clip=kl_clip)
    go_on(opt, model, x, y, 2)

    def half(o, m, part):
        with o.observing():
            z = m(x[part])
        (LIKELIHOOD.loss(z, y[part]) / 2).backward()

    opt.zero_grad()
    half(opt, model, slice(0, 6))
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    other = make(name, twin, kl_clip=kl_clip)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for o, m in ((opt, model), (other, twin)):
        half(o, m, slice(6, 12))
        o.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 5), go_on(other, twin, x, y, 5), strict=True)
    )


def test_float32_factors_and_momentum_are_not_cast_to_bfloat16():
    model, (x, y) = net_with_fallback(torch.bfloat16), batch(dtype=torch.bfloat16)
    opt = make("KFAC", model)
    go_on(opt, model, x, y, 2)
    twin = copy.deepcopy(model)
    other = make("KFAC", twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    c = other.curvature["0.0"]
    assert c.moments["A"].dtype == c.inverse.dtype == torch.float32
    assert other.state[twin[0][0].weight]["momentum_buffer"].dtype == torch.float32
    assert other.state[twin[1].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("saved", "now"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_a_state_of_another_precision_is_converted(name, saved, now):
    model, (x, y) = net_with_fallback(saved), batch(dtype=saved)
    opt = make(name, model)
    go_on(opt, model, x, y, 4)
    twin = copy.deepcopy(model).to(now)
    other = make(name, twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for c in other.curvature.values():
        assert {t.dtype for t in (*c.inverse.tensors().values(), *c.matrix.tensors().values())} == {
            now
        }
    assert other.state[twin[0][0].weight]["momentum_buffer"].dtype == now
    go_on(opt, model, x, y, 3)
    go_on(other, twin, x.to(now), y, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=2e-2, atol=1e-3)


def test_a_state_of_a_later_version_is_refused():
    opt = optim.KFAC(net(), LIKELIHOOD, 0.01)
    state = opt.state_dict()
    state["fisher_lab"]["version"] = 99
    with pytest.raises(ValueError, match=r"version 99, expected 2 or an earlier one; install"):
        opt.load_state_dict(state)


def test_a_state_without_sizes_of_its_observations_goes_on_as_if_they_were_equal():
    """States of version 1."""
    model, (x, y) = net(), batch()
    opt = make("KFAC", model)
    go_on(opt, model, x, y, 3)
    state = opt.state_dict()
    del state["fisher_lab"]["version"]
    for layer in state["fisher_lab"]["layers"].values():
        del layer["size"]
    twin = copy.deepcopy(model)
    other = make("KFAC", twin)
    other.load_state_dict(through_a_file(state))
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 9), go_on(other, twin, x, y, 9), strict=True)
    )


def test_schedulers_and_counters_come_back():
    model, (x, y) = net_with_fallback(torch.float64), batch()
    opt = make("KFAC", model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    one_step(opt, model, LIKELIHOOD, x, y)
    schedule.step()
    x[0, 0] = float("nan")
    one_step(opt, model, LIKELIHOOD, x, y)
    other = make("KFAC", net_with_fallback(torch.float64))
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [g["lr"] for g in other.param_groups] == [0.005, 0.005]
    assert other.troubles() == opt.troubles()
    assert other.steps == 2


def test_a_warm_start_is_saved():
    model, (x, y) = net(), batch()
    opt = optim.TNT(model, LIKELIHOOD, 0.01)
    opt.warm_start((x, y))
    twin = copy.deepcopy(model)
    other = optim.TNT(twin, LIKELIHOOD, 0.01)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 3), go_on(other, twin, x, y, 3), strict=True)
    )


def test_a_state_of_something_else_is_refused():
    opt = optim.KFAC(net(), LIKELIHOOD, 0.01)
    with pytest.raises(ValueError, match="not one of a KFAC"):
        opt.load_state_dict(torch.optim.SGD(net().parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="not one of a KFAC"):
        opt.load_state_dict(optim.KFAC(net(), LIKELIHOOD, 0.01, layers=["0"]).state_dict())
    with pytest.raises(ValueError, match="is one of TKFAC, expected one of KFAC"):
        opt.load_state_dict(optim.TKFAC(net(), LIKELIHOOD, 0.01).state_dict())


def test_copying_or_pickling_is_refused_with_the_cure():
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optim.KFAC(net(), LIKELIHOOD, 0.01))


NAMES = (
    "stats",
    "matrix",
    "fields",
    "moments",
    "a",
    "g",
    "w",
    "weight",
    "block",
    "s",
    "S",
    "row",
    "ones",
    "named",
)


class AnyNames(fl.Approximation, register=False):
    """The diagonal of F under many names at once."""

    def moments(self, sums):
        squares = sums.squares().flatten(0, 1)
        return {name: squares * (k + 1) for k, name in enumerate(NAMES)}

    def assemble(self, moments):
        return fl.matrices.DiagonalMatrix(sum(moments[name] for name in NAMES))


class OneName(fl.Approximation, register=False):
    """The diagonal of F under one name."""

    def __init__(self, name):
        self.name = name

    def moments(self, sums):
        return {self.name: sums.squares().flatten(0, 1)}

    def assemble(self, moments):
        return fl.matrices.DiagonalMatrix(moments[self.name])


@pytest.mark.parametrize(
    "approximation", [AnyNames(), *map(OneName, NAMES)], ids=lambda a: getattr(a, "name", "all")
)
def test_moments_of_any_name_load(approximation):
    """A moment called `stats` was taken for LayerStats."""
    model, (x, y) = net_with_fallback(torch.float64), batch()
    opt = make(approximation, model)
    go_on(opt, model, x, y, 4)
    twin = copy.deepcopy(model)
    other = make(approximation, twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(go_on(opt, model, x, y, 5), go_on(other, twin, x, y, 5), strict=True)
    )


# -- classes of one's own --------------------------------------------------------------------------
def own_means(name: str, module: str = __name__) -> type[fl.approximations.Means]:
    """A class of moments under any name."""
    found = type(name, (fl.approximations.Means,), {"__module__": module, "__qualname__": name})
    return dataclasses.dataclass(frozen=True, eq=False)(found)


def restored(encoded: object) -> object:
    return saving.decode(encoded, torch.device("cpu"), torch.float64)


@pytest.fixture
def forgotten():
    """Classes that a test defines are gone after it."""
    yield
    gc.collect()


@pytest.mark.usefixtures("forgotten")
def test_a_class_of_ones_own_does_not_take_the_place_of_ours() -> None:
    ours = fl.approximations.Means({"A": torch.ones(2)}, (1, 2))
    encoded = saving.encode(ours)
    assert encoded["moments"] == "Means"  # as in older checkpoints
    Means = own_means("Means")
    assert type(restored(encoded)) is fl.approximations.Means
    mine = Means({"A": torch.ones(2)}, (1, 2))
    assert type(restored(saving.encode(mine))) is Means


@pytest.mark.usefixtures("forgotten")
def test_classes_of_one_name_in_two_modules_are_told_apart() -> None:
    first = own_means("Twice", "one")
    second = own_means("Twice", "two")
    for cls in (first, second):
        value = cls({"A": torch.ones(2)}, (1, 2))
        assert type(restored(saving.encode(value))) is cls
    # as older checkpoints name them
    encoded = dict(saving.encode(first({"A": torch.ones(2)}, (1, 2))), moments="Twice")
    with pytest.raises(ValueError, match="holds a Twice, which one:Twice and two:Twice"):
        restored(encoded)


@pytest.mark.usefixtures("forgotten")
def test_a_class_that_moved_or_was_saved_by_its_bare_name_is_found() -> None:
    Moved = own_means("Moved", "package.module")
    encoded = saving.encode(Moved({"A": torch.ones(2)}, (1, 2)))
    for name in ("Moved", "__main__:Moved"):
        assert type(restored(dict(encoded, moments=name))) is Moved
    with pytest.raises(ValueError, match="holds a Unknown, expected one of"):
        restored(dict(encoded, moments="Unknown"))
