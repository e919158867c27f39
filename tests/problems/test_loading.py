"""Problems by name, by module, by file; and their settings."""

import sys

import pytest
import torch
from torch import nn

from fisher_lab import problems
from fisher_lab.likelihoods import Categorical
from fisher_lab.problems import registry
from fisher_lab.problems.loading import typed_settings

OWN = """
import torch
from torch import nn
from fisher_lab.problems import Problem

def triple(width: int = 3, scale: float = 1.0):
    model = nn.Linear(width, 2)
    return model, nn.CrossEntropyLoss(), (scale * torch.ones(5, width), torch.zeros(5, dtype=torch.long))

def whole(n=4):
    model = nn.Linear(3, 2)
    return Problem("mine", model, nn.MSELoss(), (torch.ones(n, 3), torch.ones(n, 2)), {"origin": (1, 2)}, "mc")

def nothing():
    return None

def pair():
    return nn.Linear(3, 2), nn.MSELoss()

def no_model():
    return "net", nn.MSELoss(), None

def a_class():
    return nn.Linear(3, 2), nn.MSELoss, None

def needed(size: int):
    return nn.Linear(size, 2), nn.MSELoss(), (torch.ones(1, size), torch.ones(1, 2))

def broken():
    import not_installed_anywhere

number = 3
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own_problems.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def clean_register(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


def test_the_problems_of_the_main_job_are_listed_with_a_line_and_their_settings():
    assert {"martens_grosse", "digits_mlp", "mnist_autoencoder", "iris_regression"} <= set(
        problems.names()
    )
    described = problems.describe()
    assert list(described) == problems.names()
    for summary, settings in described.values():
        assert 20 < len(summary) < 120
        assert {"examples", "steps", "seed", "lr", "batch"} <= set(settings)
    assert described["martens_grosse"].settings["examples"] == 1000


def test_a_function_of_a_file_that_returns_a_tuple_becomes_a_problem(own_file):
    made = problems.load(f"{own_file}:triple", width="4", scale="2.5")
    assert isinstance(made, problems.Problem)
    assert made.name == f"{own_file}:triple"
    assert made.data[0].shape == (5, 4)
    assert made.data[0][0, 0] == 2.5
    assert made.settings == {"name": made.name, "width": 4, "scale": 2.5}


def test_a_problem_of_a_file_keeps_its_name_kind_and_settings(own_file):
    made = problems.load(f"{own_file}:whole", n=6)
    assert (made.name, made.fisher) == ("mine", "mc")
    assert made.settings == {"name": "mine", "n": 6, "origin": [1, 2]}


def test_a_relative_path_and_a_module_of_the_working_directory_can_be_loaded(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    assert problems.load("own_problems.py:whole").name == "mine"
    before = list(sys.path)
    try:
        assert problems.load("own_problems:whole").name == "mine"
        assert sys.path == before
    finally:
        sys.modules.pop("own_problems", None)


def test_a_module_in_a_package_can_be_loaded():
    made = problems.load("fisher_lab.problems.digits_mlp:digits_mlp", steps="1")
    assert (made.name, made.settings["steps"]) == ("digits_mlp", 1)


def test_a_file_may_import_its_neighbours(own_file):
    (own_file.parent / "neighbour.py").write_text("from own_problems import whole")
    try:
        assert problems.load(f"{own_file.parent}/neighbour.py:whole").name == "mine"
    finally:
        sys.modules.pop("own_problems", None)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("nothing", TypeError, "an object of type NoneType, expected a Problem or a tuple"),
        ("pair", TypeError, "a tuple of 2 entries"),
        ("no_model", TypeError, "expected a torch.nn.Module"),
        ("a_class", TypeError, r"write MSELoss\(\)"),
        ("needed", TypeError, "needs the setting 'size'"),
        ("tripel", ValueError, r"no function 'tripel' \(did you mean 'triple'\?\)"),
        ("number", ValueError, "'number' in .* is of type int, not a function"),
        ("not a name", ValueError, "cannot read the problem"),
        ("broken", ModuleNotFoundError, "not_installed_anywhere"),
    ],
)
def test_what_a_users_function_gets_wrong_is_said_in_one_sentence(own_file, function, error, words):
    with pytest.raises(error, match=words) as caught:
        problems.load(f"{own_file}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("martens_gross", ValueError, r"\(did you mean 'martens_grosse'\?\).*digits_mlp"),
        ("zzz", ValueError, "there is no problem named 'zzz'"),
        ("", ValueError, "there is no problem named ''"),
        ("no/such/file.py:f", ValueError, "there is no file"),
        ("fisher_lab/problems:f", ValueError, "there is no file"),
        ("no_such_module_at_all:f", ValueError, "there is no module"),
        ("fisher_lab.no_such:f", ValueError, "there is no module"),
        ("..x:f", ValueError, "cannot read the module name"),
        (":f", ValueError, "cannot read the problem"),
        (3, TypeError, "given by a string, got int"),
    ],
)
def test_a_problem_that_cannot_be_found_is_refused_in_one_sentence(spec, error, words):
    with pytest.raises(error, match=words) as caught:
        problems.load(spec)
    assert "\n" not in str(caught.value)


def test_a_setting_without_default_is_converted_by_its_annotation(own_file):
    assert problems.load(f"{own_file}:needed", size="3").data[0].shape == (1, 3)


def example(count=1, rate=0.1, flag=False, word="a", widths=(1, 2), rates=(0.1,), maybe=None):
    """For the settings tests."""


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"count": "12"}, 12),
        ({"count": torch.tensor(3)}, 3),
        ({"rate": "1e-3"}, 1e-3),
        ({"rate": 2}, 2.0),
        ({"flag": "Yes"}, True),
        ({"flag": "false"}, False),
        ({"word": "12"}, "12"),
        ({"widths": "20,30"}, (20, 30)),
        ({"widths": "(20, 30,)"}, (20, 30)),
        ({"widths": [5]}, (5,)),
        ({"widths": ""}, ()),
        ({"rates": "1,2.5"}, (1.0, 2.5)),
        ({"maybe": "3"}, 3),
        ({"maybe": "plain"}, "plain"),
    ],
)
def test_settings_take_the_type_of_their_default(given, value):
    (converted,) = typed_settings(example, "example", given).values()
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"count": "1.5"},
            ValueError,
            r"count='1.5': expected a whole number, such as the default 1",
        ),
        ({"count": 1.5}, TypeError, "count=1.5 of type float: expected a whole number"),
        ({"count": True}, TypeError, "expected a whole number"),
        ({"rate": "fast"}, ValueError, "expected a number"),
        ({"rate": [1]}, TypeError, "expected a number"),
        ({"flag": "maybe"}, ValueError, "expected true or false"),
        ({"flag": 1}, TypeError, "expected true or false"),
        ({"word": 3}, TypeError, "expected a string"),
        ({"widths": "1,b"}, ValueError, "expected a whole number"),
        ({"widths": 3}, TypeError, "expected several values"),
        (
            {"coutn": "1"},
            ValueError,
            r"no setting 'coutn' \(did you mean 'count'\?\): its settings are count, rate",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_in_one_sentence(given, error, words):
    with pytest.raises(error, match=words) as caught:
        typed_settings(example, "example", given)
    assert "\n" not in str(caught.value)
    assert "'example'" in str(caught.value)


@pytest.mark.usefixtures("clean_register")
def test_a_function_outside_the_package_can_be_registered():
    @problems.problem
    def outside(width=(2,)):
        """A problem of a test."""
        return nn.Linear(2, 2), Categorical(), (torch.ones(1, 2), torch.zeros(1, dtype=torch.long))

    assert problems.describe()["outside"] == ("A problem of a test.", {"width": (2,)})
    assert problems.load("outside", width="5").settings == {"name": "outside", "width": [5]}
    assert outside().settings == {"name": "outside", "width": [2]}


@pytest.mark.usefixtures("clean_register")
def test_a_name_can_be_taken_only_once():
    def digits_mlp():
        """Not the one of the library."""

    with pytest.raises(ValueError, match="Got a second problem named 'digits_mlp'"):
        problems.problem(digits_mlp)


def test_an_unknown_kind_of_fisher_is_refused():
    with pytest.raises(ValueError, match="fisher='exact', expected one of true, mc, empirical"):
        problems.Problem("p", nn.Linear(1, 1), nn.MSELoss(), None, {}, "exact")
