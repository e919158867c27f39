"""Large vocabularies hold the memory they are given, or are refused before anything is computed."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import fisher_lab as fl


def head(V, d=4, tied=False):
    """Logits `[N, L, V]` of indices `[N, L]`."""
    torch.manual_seed(0)
    encode = nn.Embedding(V, d)
    decode = nn.Linear(d, V, bias=not tied)
    if tied:
        decode.weight = encode.weight
    return nn.Sequential(encode, nn.Tanh(), decode)


def refused(ask):
    """The sentence, which must come at once."""
    started = time.process_time()
    with pytest.raises(ValueError, match=r"expected at most|fit") as error:
        ask()
    assert time.process_time() - started < 1
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_all_directions_are_refused_at_once(tied):
    V = 50_257
    model = head(V, tied=tied)
    x = torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(0))
    layer = "0" if tied else "2"
    asked = {"fisher": "true", "memory": 4.0, "layers": [layer]}
    likelihood = fl.Categorical()
    for ask in (
        lambda: fl.compare(model, likelihood, x, [fl.KFAC()], progress=False, **asked),
        lambda: fl.estimate(fl.KFAC(), model, likelihood, x, **asked),
    ):
        sentence = refused(ask)
        assert ("W 201028 x 1" if tied else "R = 804096 directions") in sentence
        assert 'use fisher="mc"' in sentence
    sentence = refused(lambda: fl.exact_fisher(model, likelihood, x, **asked))
    assert "use compare, which needs no dense block" in sentence


def test_what_needs_more_than_a_diagonal_is_refused_or_left_out():
    V = 5000
    model = head(V)
    x = torch.randint(V, (3, 2), generator=torch.Generator().manual_seed(0))
    asked = {"fisher": "mc", "layers": ["2"]}
    with pytest.raises(ValueError, match=r"MiniBlock needs more than a diagonal over the 5,000"):
        fl.estimate(fl.MiniBlock(), model, fl.Categorical(), x, **asked)
    found = fl.compare(
        model,
        fl.Categorical(),
        x,
        [fl.KFAC(), fl.MiniBlock(), fl.KFAC(spatial="reduce")],
        errors=["trace", "damped_cosine"],
        progress=False,
        **asked,
    )
    left_out = found.settings["left_out"]
    assert "diagonal over the rows" in left_out["MiniBlock of layer '2'"]
    assert "diagonal over the rows" in left_out["KFAC(spatial=reduce) of layer '2'"]
    assert "damped inverse" in left_out["damped errors of layer '2'"]
    assert {(row.approximation, row.error) for row in found.rows} == {("KFAC", "trace")}


def test_columns_that_do_not_fit_are_refused():
    V = 5000
    x = torch.randint(V, (64, 64), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 300), nn.Linear(300, V))
    asked = {"fisher": "mc", "layers": ["2"], "memory": 0.03}
    likelihood = fl.Categorical()
    for ask in (
        lambda: fl.compare(model, likelihood, x, [fl.KFAC()], progress=False, **asked),
        lambda: fl.estimate(fl.KFAC(), model, likelihood, x, **asked),
    ):
        assert "more inputs than fit a quarter of the memory" in refused(ask)


SCRIPT = """
import resource, sys
import torch
from torch import nn
import fisher_lab as fl
from tests.vocabulary.test_memory import head
V, L, N, tied, route, memory = eval(sys.argv[1])
model = head(V, 16, tied)
x = torch.randint(V, (N, L), generator=torch.Generator().manual_seed(0))
layer = "0" if tied else "2"
asked = dict(fisher="mc", layers=[layer], memory=memory)
fl.estimate(fl.KFAC(), head(50, 16, tied), fl.Categorical(), x[:2, :2] % 50, **asked)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if route == "compare":
    fl.compare(model, fl.Categorical(), x, [fl.KFAC(), fl.EKFAC(), fl.TN()], progress=False, **asked)
else:
    fl.estimate(fl.KFAC(), model, fl.Categorical(), x, **asked)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 2**20)
"""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("V", "L", "N", "route", "memory"),
    [
        pytest.param(8000, 16, 32, "estimate", 0.25),
        pytest.param(8000, 16, 32, "compare", 0.25),
        pytest.param(20_000, 128, 64, "estimate", 1.0, marks=pytest.mark.slow),
        pytest.param(20_000, 128, 64, "compare", 1.0, marks=pytest.mark.slow),
    ],
)
def test_peak_memory(V, L, N, tied, route, memory):
    """The outputs of all examples alone are 33 MB and 1.3 GB."""
    asked = repr((V, L, N, tied, route, memory))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert float(done.stdout) < memory
