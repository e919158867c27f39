"""The floors of the step benchmark: one for every optimizer, of the products its docstrings say."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fisher_lab as fl

floors = importlib.import_module("analysis.benchmarks.floors")
optimizers = importlib.import_module("analysis.benchmarks.optimizers")

N, D_IN, D_OUT = 200, 6, 4


@pytest.fixture
def pieces():
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_IN))
    return floors.Pieces(model, fl.Bernoulli().loss, torch.rand(N, D_IN))


def test_every_optimizer_has_a_floor(pieces):
    assert set(floors.FLOORS) == set(optimizers.METHODS)
    for name in floors.FLOORS:
        ticks = iter(range(1000))
        # every call of a piece of work takes one tick: its parts are weighed by their periods
        found = floors.unavoidable(name, pieces, 10, 100, lambda ticks=ticks: next(ticks))
        assert found == pytest.approx(1 + 1 / 10 + 1 / 100)
    assert all(p.grad is None for p in pieces.model.parameters())


def test_floors_count_the_products_of_the_methods(pieces):
    """Twice the multiplications of both layers, with the bias columns."""
    shapes = [(D_OUT, D_IN + 1), (D_IN, D_OUT + 1)]
    both = sum(2 * o * i * (o + i) for o, i in shapes)
    expected = {
        "two_products": both,
        "four_products": 2 * both,
        "one_product": sum(2 * o * i * i for o, i in shapes),
        "mean_gradient": sum(2 * N * o * i for o, i in shapes),
        "input_moments": sum(2 * N * i * i for _, i in shapes),
        "output_moments": sum(2 * N * o * o for o, _ in shapes),
        "squares": sum(2 * N * (o * o + i * i + o * i) for o, i in shapes),
        "backward": 2 * N * D_IN * D_OUT,
        "woodbury": sum(2 * 128 * (2 * o * i + 128) for o, i in shapes),
        # forward, both weights, the input of the second layer
        "second_pass": 5 * 2 * N * D_IN * D_OUT,
    }
    for name, flops in expected.items():
        with FlopCounterMode(display=False) as counter:
            getattr(pieces, name)()
        assert counter.get_total_flops() == flops, name
