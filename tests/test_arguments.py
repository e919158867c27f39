"""Arguments as users may write them: understood where the meaning is plain, else refused in one
sentence of ours.
"""

import inspect
from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab.training import fit

NAN, INF = float("nan"), float("inf")
LOSS, KFAC = nn.CrossEntropyLoss(), fl.KFAC()
X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).eval()


def compare(model, data=(X, Y), approximations=(KFAC,), likelihood=LOSS, **options):
    return fl.compare(model, likelihood, data, approximations, progress=False, **options)


def estimate(model, data=(X, Y), approximation=KFAC, **options):
    return fl.estimate(approximation, model, LOSS, data, **options)


def exact(model, data=(X, Y), **options):
    return fl.exact_fisher(model, LOSS, data, **options)


def train(model, method=fl.NaturalGradient, **options):
    if method is fl.NaturalGradient:
        options = {"approximation": fl.KFAC()} | options
    opt = method(model, LOSS, **{"lr": 0.1} | options)
    with opt.observing():
        z = model(X)
    LOSS(z, Y).backward()
    opt.step()
    return opt


MEASURE = (compare, estimate, exact)
EVERYWHERE = (*MEASURE, train)


def refused(call, message, *arguments, **options):
    """One sentence, ours, with the value."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert message in text
    assert "expected" in text
    assert "\n" not in text


@pytest.mark.parametrize("call", EVERYWHERE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "0"}, "seed='0'"),
        ({"seed": None}, "seed=None"),
        ({"seed": 2**63}, f"seed={2**63}"),
        ({"layers": 0}, "layers=0"),
        ({"layers": "nope"}, "layer 'nope'"),
        ({"layers": [["0"]]}, "layer ['0']"),
        ({"layers": ["0", "2", "0"]}, "layer '0' twice"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"dtype": torch.float16}, "dtype=torch.float16"),
        ({"dtype": torch.int64}, "dtype=torch.int64"),
    ],
)
def test_what_all_functions_take(model, call, options, message):
    refused(call, message, model, **options)


@pytest.mark.parametrize("call", MEASURE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "4"}, "memory='4'"),
        ({"memory": True}, "memory=True"),
        ({"memory": INF}, "memory=inf"),
        ({"device": "cdua"}, "device='cdua'"),
        ({"device": 3.5}, "device=3.5"),
        ({"device": "meta"}, "device meta"),
        ({"data": (X.numpy(), Y.numpy())}, "ndarray"),
        ({"data": [(X.numpy(), Y.numpy())]}, "tuple (ndarray, ndarray)"),
        ({"data": (X, Y.numpy())}, "tuple (Tensor, ndarray)"),
        ({"data": (X, Y, Y)}, "tuple (Tensor, Tensor, Tensor)"),
        ({"data": (list(X), list(Y))}, "list (Tensor, Tensor, Tensor, Tensor)"),
        ({"data": torch.utils.data.TensorDataset(X, Y)}, "wrap a Dataset in a DataLoader"),
    ],
)
def test_what_measuring_takes(model, call, options, message):
    refused(call, message, model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampings": -1}, "dampings=-1"),
        ({"dampings": NAN}, "dampings=nan"),
        ({"dampings": [0.1, NAN]}, "dampings=[0.1, nan]"),
        ({"dampings": "0.1"}, "dampings='0.1'"),
        ({"dampings": ["0.1"]}, "dampings=['0.1']"),
        ({"approximations": fl.KFAC}, "the class KFAC"),
        ({"approximations": [fl.KFAC]}, "the class KFAC"),
        ({"approximations": {"a": fl.KFAC}}, "the class KFAC"),
        ({"approximations": "KFAC"}, "'KFAC'"),
        ({"approximations": 3}, "Got 3"),
        ({"approximations": {1: fl.KFAC()}}, "Got 1"),
        ({"approximations": {"a": None}}, "Got None"),
        ({"errors": "frobenios"}, "'frobenios'"),
        ({"errors": ["trace", "x"]}, "'x'"),
        ({"errors": None}, "errors=None"),
        ({"errors": 3}, "errors=3"),
    ],
)
def test_what_compare_takes(model, options, message):
    refused(compare, message, model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximation": fl.KFAC}, "the class KFAC"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": None}, "lr=None"),
        ({"damping": "1"}, "damping='1'"),
        ({"damping": [1.0]}, "damping=[1.0]"),
        ({"momentum": None}, "momentum=None"),
        ({"weight_decay": "x"}, "weight_decay='x'"),
        ({"kl_clip": "x"}, "kl_clip='x'"),
        ({"decay": None}, "decay=None"),
        ({"fallback_lr": -1}, "fallback_lr=-1"),
        ({"groups": {"layers": ["0"]}}, "groups={'layers': ['0']}"),
        ({"groups": [{"layers": []}]}, "layers=[]"),
        ({"groups": [{"layers": ["0"], "approximation": fl.KFAC}]}, "the class KFAC"),
        ({"groups": [{"layers": ["0"], "lr": "x"}]}, "lr='x'"),
    ],
)
def test_what_the_optimizers_take(model, options, message):
    refused(train, message, model, **options)


def test_what_the_papers_optimizers_take(model):
    refused(train, "dtype='float64'", model, fl.optim.MBF, dtype="float64")
    refused(train, "damping='1'", model, fl.optim.KBFGS, damping="1")


@pytest.mark.parametrize("y", [Y.tolist(), Y.numpy(), 3])
def test_labels_of_a_window_are_a_tensor(model, y):
    opt = train(model, observe_every=1)

    def window():
        with opt.observing(y):
            model(X)

    refused(window, type(y).__name__)


def test_what_matrices_and_errors_take(model):
    F, v = exact(model)["0"], torch.ones(3, 5, dtype=torch.float64)
    refused(F.solve, "damping='x'", v, "x")
    refused(F.solve, "torch.float32", v.float(), 0.1)
    refused(F.solve, "ndarray", v.numpy(), 0.1)
    refused(fl.errors.frobenius, "dict", exact(model), exact(model))
    refused(fl.errors.damped_spectral, "NoneType", F, None)
    refused(fl.errors.damped_spectral, "damping='x'", F, F, damping="x")
    refused(fl.Gaussian, "variance='x'", "x")


def test_what_approximations_take():
    for batch in (0, 1.5, "x", None, True):
        refused(fl.TENGraD, f"batch={batch!r}", batch)
    for modes in (1, 2.5, "x"):
        refused(fl.TN, f"modes={modes!r}", modes)
    refused(fl.Corrected, "the class KFAC", fl.KFAC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": True}, "epochs=True"),
        ({"batch": "x"}, "batch='x'"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"seed": "a"}, "seed='a'"),
        ({"optimizer": "KFAC"}, "'KFAC' as optimizer"),
        ({"optimizer": fl.optim.KFAC}, "as optimizer"),
    ],
)
def test_what_fit_takes(model, options, message):
    options = {
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "epochs": 1,
        "batch": 5,
    } | options
    refused(fit, message, model, likelihood=LOSS, data=(X, Y), progress=False, **options)


def test_what_tables_and_figures_take(model):
    found = compare(model)
    refused(found.table, "'nope'", errors=["nope"])
    refused(found.table, "errors=3", errors=3)
    refused(fl.plots.errors, "fl.load_comparison", "run.json")
    refused(fl.plots.errors, "layers=0", found, layers=0)
    assert found.table("trace") == found.table(["trace"]) != found.table(["trace", "trace_ratio"])
    assert [
        t.get_text() for t in fl.plots.errors(found, layers="(all)").axes[0].get_xticklabels()
    ] == ["all layers"]


def test_what_has_a_plain_meaning_is_understood(model):
    for call in EVERYWHERE:
        call(model, layers="2", seed=np.int64(3))
    assert list(exact(model, layers="2")) == ["2"]
    assert train(model, groups=[{"layers": "2", "lr": 0.5}]).param_groups[0]["layers"] == ["2"]
    assert (
        exact(model, seed=np.int64(3), fisher="mc")["0"].trace()
        == exact(model, seed=3, fisher="mc")["0"].trace()
    )
    for damping in (0.5, np.float32(0.5), [0.5], torch.tensor([0.5])):
        assert compare(model, dampings=damping, errors="damped_spectral").rows[0].damping == 0.5
    assert compare(model, approximations=fl.KFAC()).approximations == ["KFAC"]
    found = compare(model, errors=["default", "spectrum", "trace"]).errors
    assert [name for name in found if name != "spectrum"] == compare(model).errors
    assert found.count("spectrum") == 1
    for data in ((X,), [(X, Y)], ([X, Y],)):
        fisher = "true" if len(data[0]) == 10 else "empirical"
        compare(model, data, fisher=fisher)


def questions():
    """Public functions that ask about a model, a loss and data."""
    found = []
    for value in vars(fl).values():
        if inspect.isfunction(value):
            names = inspect.signature(value).parameters
            if {"model", "likelihood", "data"} <= names.keys():
                found.append(value)
    return found


def test_every_question_has_the_arguments_of_all():
    """A new attribute of a Setup is an argument of every function that asks, with one default."""
    assert {f.__name__ for f in questions()} == {
        "budget",
        "compare",
        "estimate",
        "exact_fisher",
        "network",
    }
    for function in questions():
        given = inspect.signature(function).parameters
        for field in fields(Setup):
            if (function.__name__, field.name) == ("exact_fisher", "on_unknown"):
                continue  # torch.func needs no adapter
            assert field.name in given, f"{function.__name__} lacks {field.name}"
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            assert given[field.name].default == default, f"{function.__name__}: {field.name}"


def test_a_question_is_taken_from_arguments_by_name(model):
    arguments = {field.name: field.default for field in fields(Setup)}
    arguments |= {"model": model, "likelihood": LOSS, "data": X, "seed": 3, "own": "not asked"}
    setup = Setup.of(arguments, on_unknown="flatten")
    assert (setup.seed, setup.on_unknown, setup.data) == (3, "flatten", X)
