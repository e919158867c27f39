"""Bad input, models whose examples interact and wrong matrices: found, and refused in one
sentence.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from tests.diagnose.support import batch, labels, net


def with_nan(x: torch.Tensor, value: float = math.nan) -> torch.Tensor:
    x = x.clone()
    x[2, 1] = value
    return x


def nan_model() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


X, Y = batch()
CE = nn.CrossEntropyLoss
BAD = {
    "empty data": (lambda: (net(), CE(), (X[:0], Y[:0])), "at least one example"),
    "no batches": (lambda: (net(), CE(), []), "no batches"),
    "NaN inputs": (lambda: (net(), CE(), (with_nan(X), Y)), "NaN or infinite inputs in 1 examples"),
    "infinite inputs": (
        lambda: (net(), CE(), (with_nan(X, math.inf), Y)),
        "NaN or infinite inputs",
    ),
    "NaN parameters": (lambda: (nan_model(), CE(), (X, Y)), "Parameter '0.weight' has NaN"),
    "labels out of range": (
        lambda: (net(), CE(), (X, Y + 1)),
        "labels from 1 to 3, expected 0 to 2",
    ),
    "negative labels": (lambda: (net(), fl.Categorical(), (X, Y - 1)), "expected 0 to 2"),
    "ignored labels": (
        lambda: (net(), CE(), (X, torch.full_like(Y, -100))),
        "keeps none of the 12 labels",
    ),
    "wrong label shape": (lambda: (net(), CE(), (X, Y[:, None])), "labels|expected"),
    "fewer labels": (lambda: (net(), CE(), (X, Y[:-1])), "12 inputs and labels of shape"),
    "wrong input width": (lambda: (net(), CE(), (X[:, :4], Y)), "expected|shapes"),
    "class weights": (lambda: (net(), CE(weight=-torch.ones(3)), (X, Y)), "weights >= 0"),
    "weighted labels out of range": (
        lambda: (net(), CE(weight=torch.ones(3)), (X, Y + 1)),
        "labels from 1 to 3, expected 0 to 2",
    ),
    "reduction none": (lambda: (net(), CE(reduction="none"), (X, Y)), "reduction='none'"),
    "no curvature": (lambda: (net(), nn.L1Loss(), (X, Y)), "L1Loss has no curvature"),
    "unknown loss": (
        lambda: (net(), nn.MultiMarginLoss(), (X, Y)),
        "Got MultiMarginLoss as likelihood",
    ),
    "likelihood class": (lambda: (net(), fl.Categorical, (X, Y)), "write Categorical"),
    "one logit": (lambda: (nn.Linear(5, 1), fl.Categorical(), (X, None)), "at least 2 classes"),
    "scalar output": (
        lambda: (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), fl.Gaussian(), (X, None)),
        r"\[N, \*output\]",
    ),
    "bernoulli labels": (
        lambda: (net(), fl.Bernoulli(), (X, 3 * labels("binary", 12))),
        r"values in \[0, 1\]",
    ),
    "batch norm": (
        lambda: (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), fl.Gaussian(), X),
        "model.eval()",
    ),
    "dropout": (
        lambda: (nn.Sequential(nn.Linear(5, 4), nn.Dropout()), fl.Gaussian(), X),
        "model.eval()",
    ),
    "no parameters": (lambda: (nn.Tanh(), fl.Gaussian(), X), "no trainable parameters"),
    "not a model": (lambda: (torch.tanh, fl.Gaussian(), X), "expected a torch.nn.Module"),
    "arrays": (
        lambda: (net(), CE(), (X.numpy(), Y.numpy())),
        "expected a tensor x|torch.as_tensor",
    ),
    "a list of two": (lambda: (net(), CE(), [X, Y]), "two batches of inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_sentence(case: str, tmp_path) -> None:
    make, message = BAD[case]
    model, likelihood, data = make()
    path = tmp_path / "run.json"
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        fl.compare(model, likelihood, data, resume=path)
    assert not path.exists()
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, TypeError), match=message):
        fl.exact_fisher(model, likelihood, data)


ARGUMENTS = {
    "unknown layer": ({"layers": ["9"]}, "Got layer '9', expected one of '0', '2', '4'"),
    "layer without parameters": ({"layers": ["1"]}, "'1'"),
    "no layers": ({"layers": []}, "expected at least one"),
    "unknown error": ({"errors": "frobnicate"}, "Got error 'frobnicate'"),
    "no errors": ({"errors": []}, "expected"),
    "unknown fisher": ({"fisher": "false"}, "fisher='false'"),
    "no dampings": ({"errors": "all", "dampings": []}, "dampings"),
    "negative damping": ({"errors": "all", "dampings": [-1.0]}, "positive"),
    "negative memory": ({"memory": -1}, "memory=-1"),
    "unknown exact": ({"exact": "magic"}, "exact='magic'"),
    "not an approximation": ({"approximations": [fl.KFAC]}, "an instance such as fl.KFAC"),
    "twice": ({"approximations": [fl.KFAC(), fl.KFAC()]}, "twice"),
    "no approximations": ({"approximations": []}, "at least one"),
    "missing ready layer": ({"approximations": {"mine": {}}}, "mine has none for layer '0'"),
    "unwritable resume": ({"resume": "/proc/nothing/run.json"}, "cannot be"),
    "wrong resume ending": ({"resume": "run.txt"}, "expected one ending in .json"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_get_one_clear_sentence(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        fl.compare(net(), CE(), (X, Y), **arguments)


def test_a_layer_named_as_the_totals_is_refused_unless_left_out() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("(all)", nn.Linear(5, 4))
            self.out = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.get_submodule("(all)")(x)
            return self.out(torch.tanh(hidden))

    with pytest.raises(ValueError, match=r"^Got a layer named '\(all\)'"):
        fl.compare(Called(), CE(), (X, Y), [fl.KFAC()])
    found = fl.compare(Called(), CE(), (X, Y), [fl.KFAC()], layers=["out"])
    assert found.layers == ["out"]


def test_examples_that_interact_are_found_by_the_check() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(model, CE(), (X, Y))


def test_a_random_model_is_found_by_the_check() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand_like(x)

    model = nn.Sequential(nn.Linear(5, 4), Noisy(), nn.Linear(4, 3))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(model, CE(), (X, Y))
    assert torch.equal(state, torch.get_rng_state())


def test_a_shuffling_loader_is_refused() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        fl.compare(net(), CE(), loader)


def test_monte_carlo_labels_follow_the_seed() -> None:
    first, same, other = (
        fl.compare(net(), CE(), (X, Y), fl.KFAC(), fisher="mc", seed=s) for s in (1, 1, 2)
    )
    assert [r.value for r in first.rows] == [r.value for r in same.rows]
    assert [r.value for r in first.rows] != [r.value for r in other.rows]
    assert {r.fisher for r in first.rows} == {"mc"}


def test_func_blocks_do_not_hide_examples_that_interact() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(
            nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3)), CE(), (X, Y), exact="func"
        )


def test_a_layer_called_with_a_named_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.l(input=x)

    assert fl.compare(Named(), CE(), (X, Y), fl.KFAC()).rows[0].checked < 1e-10


class Wrong(fl.Approximation, register=False):
    """Assembles something else."""

    def __init__(self, result: object) -> None:
        self.result = result

    def moments(
        self, stats: fl.LayerStats, matrix: fl.FisherMatrix | None = None
    ) -> dict[str, torch.Tensor]:
        return {}

    def assemble(
        self, moments: dict[str, torch.Tensor], matrix: fl.FisherMatrix | None = None
    ) -> object:
        return self.result


def test_a_wrong_matrix_is_named() -> None:
    for result in (torch.zeros(3), fl.estimate(fl.KFAC(), net(), CE(), (X, Y))["2"]):
        with pytest.raises(
            ValueError,
            match=r"(?s)Wrong.* assembled .* on layer '0', expected a FisherMatrix over \(4, 6\)",
        ):
            fl.compare(net(), CE(), (X, Y), Wrong(result), layers=["0"])
