"""What README's table says of traces is measured, for one position and for several."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fisher_lab as fl

README = Path(__file__).resolve().parents[2] / "README.md"
ROW = re.compile(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", re.MULTILINE)
CLAIMS = dict(ROW.findall(README.read_text(encoding="utf-8")))
ROUNDING = 1e-9


def trace_error(method: fl.Approximation, positions: int) -> float:
    """Of a linear layer that is used at some positions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, positions, 5, generator=draw, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * positions, 3)]
        model = nn.Sequential(*layers).double()
    question = (model, fl.Categorical(), x)
    exact = fl.exact_fisher(*question, layers=["0"])["0"]
    matrix = fl.estimate(method, *question, layers=["0"])["0"]
    return abs(fl.errors.trace(exact, matrix))


def test_every_default_approximation_has_a_row():
    assert {type(method).__name__ for method in fl.default_approximations()} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_trace_is_kept_where_the_table_says_so(name):
    claim = CLAIMS[name]
    method = getattr(fl, name)()
    kept = {positions: trace_error(method, positions) < ROUNDING for positions in (1, 3)}
    if claim.startswith("yes"):
        assert kept == {1: True, 3: True}
    elif claim == "no":
        assert kept == {1: False, 3: False}
    elif claim.startswith("for one position"):
        assert kept == {1: True, 3: False}
        assert trace_error(fl.TKFAC(spatial="full"), 3) < ROUNDING
    else:
        assert claim == "of its batch"
