"""A named optimizer is written in one place; the list of names, the command line and the tests
follow from it.
"""

import inspect

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import cli, optim, training
from fisher_lab.optim.base import LayerOptimizer
from tests.optim.support import PRESETS, batch, net, train, weights

LIKELIHOOD = fl.Categorical()


@pytest.fixture
def forgets(monkeypatch):
    """Optimizers that a test defines are known only within it."""
    monkeypatch.setattr(LayerOptimizer, "_registry", optim.registry())


def test_the_table_names_the_papers_methods():
    names = ["TNT", "KFAC", "EKFAC", "TKFAC", "TEKFAC", "MBF", "TENGraD", "Shampoo", "KBFGS"]
    assert [
        name for name, cls in optim.registry().items() if cls.__module__.startswith("fisher_lab.")
    ] == names
    assert all(getattr(fl.optim, name) is optim.registry()[name] for name in names)
    assert list(PRESETS) == names[:-1]
    assert set(names) < set(training.optimizer_names())


def test_the_optimizers_signature_shows_the_approximations_arguments():
    parameters = inspect.signature(optim.KFAC).parameters
    assert list(parameters) == ["model", "likelihood", "lr", "spatial", "options"]
    assert parameters["lr"].default == 0.01
    assert parameters["spatial"].default == "expand"
    assert parameters["spatial"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(optim.Shampoo).parameters) == [
        "model",
        "likelihood",
        "lr",
        "options",
    ]


def test_arguments_reach_the_approximation_and_defaults_give_way():
    opt = optim.TNT(net(), LIKELIHOOD, 0.1, modes=2, decay=0.5)
    assert opt.approximation == fl.TN(2)
    assert (opt.decay, opt.statistics) == (0.5, "mean")
    assert opt.param_groups[0]["damping_style"] == "factored"


OWN = '''
import torch
import fisher_lab as fl


class HalfKFAC(fl.optim.Method, damping=0.5, momentum=0.0):
    """KFAC with half the damping."""

    @staticmethod
    def build(spatial="reduce"):
        return fl.KFAC(spatial)


def problem(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), (torch.randn(20, 4), torch.arange(20) % 3)
'''


def test_an_optimizer_of_a_users_own_is_known_by_its_name(forgets, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    arguments = [
        "--problem",
        f"{file}:problem",
        "--optimizer",
        "HalfKFAC",
        "--epochs",
        "1",
        "--batch",
        "10",
    ]
    cli.main(["train", *arguments])
    assert "epoch    1" in capsys.readouterr().out
    assert "HalfKFAC" in training.optimizer_names()
    model = net()
    opt = training.make_optimizer("HalfKFAC", model, LIKELIHOOD, 0.1, seed=3)
    assert opt.approximation == fl.KFAC("reduce")
    assert (opt.seed, opt.param_groups[0]["damping"], opt.param_groups[0]["momentum"]) == (
        3,
        0.5,
        0.0,
    )
    x, y = batch()
    losses = train(opt, model, LIKELIHOOD, x, y, 10)
    assert losses[-1] < losses[0]
    assert repr(opt).startswith("HalfKFAC, step 10")


def test_a_method_of_a_method_keeps_its_defaults(forgets):
    class CalmTNT(optim.TNT, damping=3.0):
        """TNT with a large damping."""

    opt = CalmTNT(net(), LIKELIHOOD, 0.1)
    assert (opt.param_groups[0]["damping"], opt.decay) == (3.0, 0.9)
    assert optim.TNT(net(), LIKELIHOOD, 0.1).param_groups[0]["damping"] == 0.003


def test_a_method_without_settings_has_one_set_of_defaults():
    for name in PRESETS:
        opt = getattr(optim, name)(net(), LIKELIHOOD)
        own = optim.registry()[name].own_defaults
        assert opt.param_groups[0]["lr"] == own["lr"]
        assert opt.param_groups[0]["momentum_order"] == "before"
        assert opt.kl_clip == own["kl_clip"]
        assert (opt.observe_every, opt.refresh_every) == (2, 20)
    assert optim.KFAC(net(), LIKELIHOOD, 0.5).param_groups[0]["lr"] == 0.5
    assert optim.KBFGS(net(), LIKELIHOOD).param_groups[0]["lr"] == 0.3


def test_a_name_of_the_librarys_is_taken(forgets):
    with pytest.raises(
        ValueError, match=r"named KFAC is part of fisher_lab .* expected a new name"
    ):

        class KFAC(optim.TNT):
            """Not KFAC."""


def test_a_method_without_an_approximation_is_refused(forgets):
    with pytest.raises(TypeError, match=r"Empty has no `build`, expected"):

        class Empty(optim.Method):
            """Nothing."""


def test_a_rule_may_choose_the_approximation_of_each_layer():
    class SmallExact(optim.ByLayer):
        def choose(self, layer, dtype):
            return fl.Exact() if layer.shape[0] < 4 else fl.KFAC()

    groups = [{"layers": ["4"], "approximation": fl.Diagonal()}]
    opt = fl.NaturalGradient(net(widths=(4, 5, 3, 3)), LIKELIHOOD, SmallExact(), 0.1, groups=groups)
    labels = {name: c.approximation.label for name, c in opt.curvature.items()}
    assert labels == {"0": "KFAC", "2": "Exact", "4": "Diagonal"}


def test_an_overridden_choice_still_decides():
    class Mine(fl.NaturalGradient, register=False):
        def choose(self, layer, approximation):
            return fl.Diagonal() if layer.name == "0" else approximation

    opt = Mine(net(), LIKELIHOOD, fl.KFAC(), 0.1)
    assert [c.approximation.label for c in opt.curvature.values()] == ["Diagonal", "KFAC"]


def test_options_are_frozen_and_checked_anew_when_an_attribute_is_set():
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, fisher="true")
    with pytest.raises(ValueError, match=r"kl_clip=-1, expected"):
        opt.kl_clip = -1
    with pytest.raises(AttributeError):
        opt.options.kl_clip = 1.0
    train(opt, model, LIKELIHOOD, x, y, 1)
    opt.kl_clip = 1e-12
    before = weights(model)
    train(opt, model, LIKELIHOOD, x, y, 1)
    assert all(float((W - before[name]).norm()) < 1e-5 for name, W in weights(model).items())


def test_settings_of_a_group_are_checked_like_the_defaults():
    for setting, value in (
        ("lr", -1.0),
        ("momentum", 1.0),
        ("damping_style", "soft"),
        ("weight_decay", float("nan")),
    ):
        with pytest.raises(ValueError, match=f"Got {setting}=.*expected"):
            optim.KFAC(net(), LIKELIHOOD, 0.1, groups=[{"layers": ["0"], setting: value}])
    with pytest.raises(ValueError, match=r"damping=0.0, expected a positive number"):
        optim.KBFGS(net(), LIKELIHOOD, 0.1, groups=[{"layers": ["0"], "damping": 0.0}])


@pytest.mark.parametrize("setting", ["approximation", "damping_style"])
def test_a_group_of_kbfgs_has_no_settings_that_nothing_reads(setting):
    with pytest.raises(ValueError, match=f"Got a group with .*{setting}.*expected 'layers'"):
        optim.KBFGS(net(), LIKELIHOOD, 0.1, groups=[{"layers": ["0"], setting: "exact"}])


def test_what_is_no_list_of_groups_is_refused():
    for groups in ({"layers": ["0"]}, "0", [["0"]]):
        with pytest.raises(TypeError, match=r"Got .* expected a (list of dicts|dict)"):
            optim.KFAC(net(), LIKELIHOOD, 0.1, groups=groups)


def test_the_seed_goes_to_those_that_draw():
    assert isinstance(
        training.make_optimizer("KBFGS", nn.Linear(2, 2), LIKELIHOOD, 0.1, seed=4), optim.KBFGS
    )
    assert training.make_optimizer("KFAC", nn.Linear(2, 2), LIKELIHOOD, 0.1, seed=4).seed == 4
    assert isinstance(
        training.make_optimizer("SGD", nn.Linear(2, 2), LIKELIHOOD, 0.1, seed=4), torch.optim.SGD
    )


@pytest.mark.parametrize("given", ["parameters", "model"])
def test_who_calls_a_method_as_torchs_optimizers_is_told_what_to_write(given):
    model = net()
    first = model.parameters() if given == "parameters" else model
    with pytest.raises(TypeError, match=r"write KFAC\(model, nn.CrossEntropyLoss\(\), lr=...\)"):
        optim.KFAC(first, lr=0.1)


def test_a_method_that_says_its_arguments_itself_may_know_its_likelihood(forgets):
    class Fixed(optim.Method):
        build = staticmethod(fl.KFAC)

        def __init__(self, model):
            super().__init__(model, LIKELIHOOD)

    assert Fixed(net()).likelihood is not None


def test_people_and_tools_see_the_arguments_of_a_method():
    for cls in (optim.Method, optim.KFAC):
        assert list(inspect.signature(cls).parameters)[:3] == ["model", "likelihood", "lr"]
