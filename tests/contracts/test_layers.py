"""What every layer adapter promises, for everything in the registry, and one written here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.layers import Layer, WeightBias, registry, select
from tests.helpers import assert_same, captured, gradients
from tests.layers.cases import CASES, FACTOR_FORM
from tests.layers.oracle import normal, randomised

# torch's note on its speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Cosine(nn.Module):
    """A user's own layer, written outside of the package: y = cos(x) W^T + b."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(outputs, inputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.cos(), self.weight, self.bias)


class CosineLayer(WeightBias):
    """Its adapter: all it takes."""

    types = (Cosine,)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, 1, 1, inputs + 1]`."""
        return self.with_bias(x.cos()[:, None, None])

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, 1, 1, outputs]`."""
        return g[:, :, None, None]


Layer._registry.pop(Cosine)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The user's layer is known while these tests run."""
    Layer._registry[Cosine] = CosineLayer
    yield
    Layer._registry.pop(Cosine)


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    """`shape`, `kernel`, `groups` and `bias` fit the parameters and the captured statistics."""
    case = CASES[name]()
    layers = select(case.model, [case.layer]).layers
    layer, stats = (
        layers[case.layer],
        captured(case.model, layers, fl.Gaussian(), case.x, "true")[case.layer],
    )
    assert layer.shape == stats.shape
    assert layer.kernel == stats.kernel
    assert layer.groups == stats.Q
    assert math.prod(layer.kernel) + layer.bias == layer.shape[1]
    lost = (
        layer.module.embedding_dim * (layer.module.padding_idx is not None)
        if "Embedding" in name
        else 0
    )
    assert (
        layer.shape[0] * layer.shape[1] == sum(p.numel() for p in layer.parameters.values()) - lost
    )


@pytest.mark.parametrize("name", FACTOR_FORM)
def test_sum_of_positions_is_the_gradient(name: str) -> None:
    """P = sum over t of g a^T, packed, is autograd's gradient of every example."""
    case = FACTOR_FORM[name]()
    layers = select(case.model, [case.layer]).layers
    layer = layers[case.layer]
    S = normal(2, *case.model(case.x).shape, seed=7)
    likelihood = fl.Gaussian()
    likelihood.factor = lambda z: S  # type: ignore[method-assign]  # any columns will do
    stats = captured(case.model, layers, likelihood, case.x, "true")[case.layer]
    P = gradients(stats).flatten(2, 3)  # R columns of N examples each
    for n in range(len(case.x)):
        z = case.model(case.x[n : n + 1])
        for r in range(2):
            found = torch.autograd.grad(
                z, list(layer.parameters.values()), S[r, n : n + 1], retain_graph=True
            )
            assert_same(P[r, n], layer.pack(dict(zip(layer.parameters, found, strict=True))), 1e-10)


@pytest.mark.parametrize("name", FACTOR_FORM)
def test_unrolled_input_is_a_new_tensor(name: str) -> None:
    """Statistics survive an in-place change of the input."""
    case = FACTOR_FORM[name]()
    layer = select(case.model, [case.layer]).layers[case.layer]
    before = case.x.clone()
    a = layer.unroll_input(case.x)
    kept = a.clone()
    case.x.mul_(0)
    assert torch.equal(a, kept)
    case.x.copy_(before)


def test_the_users_layer_in_compare() -> None:
    """A layer type and its adapter written here work in compare, exact_fisher and every
    approximation.
    """
    model, x = randomised(nn.Sequential(Cosine(3, 4), nn.Tanh(), nn.Linear(4, 2))), normal(6, 3)
    assert registry()[Cosine] is CosineLayer
    comparison = fl.compare(model, nn.CrossEntropyLoss(), (x, torch.arange(6) % 2))
    assert comparison.settings["layers"]["0"]["type"] == "Cosine"
    assert all(row.checked < 1e-10 for row in comparison.rows)
    exact = fl.exact_fisher(model, fl.Gaussian(), x)["0"]
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["0"].dense(), exact.dense(), 1e-10)
    assert tuple(exact.shape) == (4, 4)
