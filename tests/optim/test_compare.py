"""What the optimizer is really using, measured: the joint of the two halves of the library."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.optim.support import PRESETS, batch, net, one_step, preset, train

LIKELIHOOD = fl.Categorical()


@pytest.mark.parametrize("name", PRESETS)
def test_opt_compare_equals_compare_with_the_ready_matrices(name):
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01)
    train(opt, model, LIKELIHOOD, x, y, 3)
    found = opt.compare((x, y))
    label = opt.curvature["0"].approximation.label
    expected = fl.compare(model, LIKELIHOOD, (x, y), {label: opt.matrices()})
    assert [tuple(vars(row).values()) for row in found.rows] == [
        tuple(vars(row).values()) for row in expected.rows
    ]
    assert found.settings["problem"]["optimizer"] == name
    assert found.settings["problem"]["step"] == 3


def test_fresh_true_statistics_have_the_errors_of_the_approximation_itself():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.0, fisher="true")
    one_step(opt, model, LIKELIHOOD, x, y)
    expected = fl.compare(model, LIKELIHOOD, (x, y), [fl.KFAC()])
    for row in opt.compare((x, y)).rows:
        assert row.value == pytest.approx(
            expected.value(row.layer, "KFAC", row.error, row.damping), rel=1e-9, abs=1e-12
        )


def test_staleness_is_measured():
    """The weights moved on since the last refresh, and the errors show it."""
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.Exact(), 0.05, fisher="true", observe_every=50)
    one_step(opt, model, LIKELIHOOD, x, y)
    fresh = fl.NaturalGradient(model, LIKELIHOOD, fl.Exact(), 0.0, fisher="true")
    one_step(fresh, model, LIKELIHOOD, x, y)
    assert fresh.compare((x, y)).value("0", "Exact", "frobenius") < 1e-7
    train(opt, model, LIKELIHOOD, x, y, 5)
    assert opt.compare((x, y)).value("0", "Exact", "frobenius") > 0.1


def test_a_model_in_training_mode_is_measured_as_a_copy_in_evaluation_mode():
    model, (x, y) = nn.Sequential(net(), nn.Dropout(0.5)), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    found = opt.compare((x, y), errors=["trace"])
    assert found.settings["problem"]["mode"] == "copy in evaluation mode"
    assert model.training
    assert {row.error for row in found.rows} == {"trace"}


def test_measuring_changes_neither_model_nor_optimizer(restores_global_state):
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = [p.detach().clone() for p in model.parameters()], opt.generator.get_state()
    opt.compare((x, y))
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert torch.equal(before[1], opt.generator.get_state())


def test_before_the_first_step_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="Nothing was observed yet"):
        optim.KFAC(net(), LIKELIHOOD, 0.01).matrices()


def test_a_users_own_approximation_trains_and_is_measured():
    from dataclasses import dataclass

    from fisher_lab.matrices import DiagonalMatrix

    @dataclass(frozen=True)
    class MyDiagonal(fl.Approximation):
        listed = False

        def moments(self, stats, matrix=None):
            return {"mean": stats.squares().flatten(0, 1)}

        def assemble(self, moments, matrix=None):
            return DiagonalMatrix(moments["mean"])

    try:
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(model, LIKELIHOOD, MyDiagonal(), 0.01, damping=0.1)
        losses = train(opt, model, LIKELIHOOD, x, y, 20)
        assert losses[-1] < losses[0]
        assert "MyDiagonal" in repr(opt)
        assert list(opt.compare((x, y)).approximations) == ["MyDiagonal"]
    finally:
        fl.Approximation._registry.pop("MyDiagonal", None)
