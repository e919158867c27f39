"""Random small architectures: depth, layer types, options, batch sizes and likelihoods; invariants
of every block.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fisher_lab as fl
from tests.helpers import assert_psd, assert_same
from tests.layers.oracle import (
    flattened,
    generator,
    naive_block,
    normal,
    randomised,
    weight_and_bias,
)

KEEPS_TRACE = (
    fl.EKFAC(),
    fl.TEKFAC(),
    fl.TKFAC("full"),
    fl.TN(),
    fl.TN(modes=2),
    fl.MiniBlock(),
    fl.Diagonal(),
    fl.LNGD(),
)
KRONECKER = (fl.KFAC(), fl.TKFAC("full"), fl.LNGD(), fl.TN(modes=2))
few = settings(max_examples=25)


class Residual(nn.Module):
    """x + layer(x), which uses the layer as often as it is asked to."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.layer(x).tanh()
        return x


class Pool(nn.Module):
    """The mean over all positions of `[N, C, *positions]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@st.composite
def convolution(draw: Any, channels: int) -> tuple[nn.Module, int]:
    """A convolution with random options, and its output channels."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    out = groups * draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, (1, 0), "same"]))
    kernel = draw(st.sampled_from([1, 2, (1, 2), (3, 1)]))
    if padding == "same":
        kernel = draw(st.sampled_from([1, 3, (1, 3)]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    mode = (
        "zeros"
        if padding == 0
        else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    )
    options = {
        "padding": padding,
        "stride": stride,
        "padding_mode": mode,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return nn.Conv2d(channels, out, kernel, **options), out


@st.composite
def images(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A small convolutional network: model and input shape."""
    channels = draw(st.integers(1, 4))
    shape, layers = (channels, 5, 6), []
    for _ in range(draw(st.integers(1, 2))):
        layer, channels = draw(convolution(channels))
        layers += [layer, draw(st.sampled_from([nn.Tanh(), nn.ReLU(inplace=True), nn.GELU()]))]
        norm = draw(st.sampled_from(["none", "group", "batch", "transposed"]))
        if norm == "group":
            layers.append(nn.GroupNorm(1, channels))
        elif norm == "batch":
            layers.append(nn.BatchNorm2d(channels))
        elif norm == "transposed":
            layers.append(nn.ConvTranspose2d(channels, channels, 2))
    outputs = draw(st.integers(2, 3))
    return nn.Sequential(*layers, Pool(), nn.Linear(channels, outputs)), shape


@st.composite
def vectors(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A perceptron on vectors or sequences, with norm layers and layers used several times."""
    width = draw(st.integers(1, 4))
    shape = (*draw(st.sampled_from([(), (3,)])), width)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 4))
        layers += [nn.Linear(width, out, bias=draw(st.booleans())), nn.Tanh()]
        width = out
        kind = draw(st.sampled_from(["none", "layer", "rms", "twice", "weight norm"]))
        if kind == "layer" and width > 1:
            layers.append(nn.LayerNorm(width))
        elif kind == "rms":
            layers.append(nn.RMSNorm(width))
        elif kind == "twice":
            layers.append(Residual(nn.Linear(width, width), 2))
        elif kind == "weight norm":
            layers.append(nn.utils.parametrizations.weight_norm(nn.Linear(width, width)))
    outputs = draw(st.integers(2, 3))
    head: list[nn.Module] = [
        nn.Flatten(),
        nn.Linear(width * (3 if len(shape) == 2 else 1), outputs),
    ]
    return nn.Sequential(*layers, *head), shape


@st.composite
def problems(draw: Any) -> tuple[nn.Module, Tensor, Any]:
    """A model with random parameters, inputs and a likelihood."""
    with torch.random.fork_rng():
        model, shape = draw(st.one_of(images(), vectors()))
    seed = draw(st.integers(0, 1000))
    x = normal(draw(st.integers(1, 6)), *shape, seed=seed)
    likelihoods = [
        fl.Categorical(),
        fl.Gaussian(variance=0.7),
        fl.Bernoulli(),
        nn.MSELoss(),
        nn.CrossEntropyLoss(),
    ]
    return randomised(model, seed), x, draw(st.sampled_from(likelihoods))


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: p for key, p in module.named_parameters() if "." not in key or "original" in key}


@few
@given(problems())
def test_exact_agreement(problem: tuple[nn.Module, Tensor, Any]) -> None:
    """Hooks and torch.func give the same blocks, and compare's own check agrees."""
    model, x, likelihood = problem
    captured = fl.estimate(fl.Exact(), model, likelihood, x)
    functional = fl.exact_fisher(model, likelihood, x)
    assert list(captured) == list(functional)
    scale = max(float(block.frobenius_norm()) for block in functional.values())
    for layer, block in functional.items():
        difference = float((captured[layer].dense() - block.dense()).norm())
        assert difference <= 1e-10 * float(block.frobenius_norm()) + 1e-22 * scale
        assert_psd(block.dense())
    comparison = fl.compare(model, likelihood, x, [fl.Diagonal()], errors=["trace_ratio"])
    # larger than elsewhere where gradients cancel
    assert all(row.checked < 1e-8 for row in comparison.rows)


@settings(max_examples=10)
@given(problems())
def test_naive_agreement(problem: tuple[nn.Module, Tensor, Any]) -> None:
    """Loops over plain autograd with the Hessian of -log p give the first layer's block too."""
    model, x, likelihood = problem
    likelihood = fl.likelihoods.as_likelihood(likelihood)
    name, block = next(iter(fl.exact_fisher(model, likelihood, x).items()))
    module = model.get_submodule(name)
    pack = weight_and_bias(module) if isinstance(module, nn.Linear | nn.Conv2d) else flattened
    if hasattr(module, "parametrizations"):
        pack = flattened
    with torch.no_grad():
        y = likelihood.sample(model(x), generator())
        kappa = likelihood.kappa(model(x[:1]))
    expected = naive_block(
        model,
        parameters_of(module),
        pack,
        x,
        lambda z, n: -kappa * likelihood.log_prob(z, y[n : n + 1]).sum(),
    )
    assert float((block.dense() - expected).norm()) <= 1e-10 * float(expected.norm()) + 1e-14


@few
@given(problems())
def test_traces_order_and_psd(problem: tuple[nn.Module, Tensor, Any]) -> None:
    """PSD; traces that are kept; corrected eigenvalues and KPSVD are no worse than their bases in
    Frobenius norm.
    """
    model, x, likelihood = problem
    exact = {name: block.dense() for name, block in fl.exact_fisher(model, likelihood, x).items()}

    def found(approximation: fl.Approximation) -> dict[str, Tensor]:
        return {
            name: M.dense() for name, M in fl.estimate(approximation, model, likelihood, x).items()
        }

    for approximation in KEEPS_TRACE:
        for name, M in found(approximation).items():
            assert_psd(M, scale=float(exact[name].norm()) + 1e-300)
            assert (
                abs(float(M.trace() - exact[name].trace()))
                <= 1e-9 * float(exact[name].trace()) + 1e-24
            )
    error = {
        approximation.label: {
            name: float((exact[name] - M).norm()) for name, M in found(approximation).items()
        }
        for approximation in (
            *KRONECKER,
            fl.EKFAC(),
            fl.TEKFAC("full"),
            fl.KPSVD(),
            fl.Diagonal(),
            fl.MiniBlock("row"),
        )
    }
    for name, F in exact.items():
        slack = 1e-7 * float(F.norm()) + 1e-24
        assert error["EKFAC"][name] <= error["KFAC"][name] + slack
        assert error["TEKFAC(spatial=full)"][name] <= error["TKFAC(spatial=full)"][name] + slack
        assert error["MiniBlock"][name] <= error["Diagonal"][name] + slack
        for kronecker in KRONECKER:
            assert error["KPSVD"][name] <= error[kronecker.label][name] + slack


@settings(max_examples=15)
@given(problems(), st.integers(1, 5))
def test_unequal_batches_are_one(problem: tuple[nn.Module, Tensor, Any], first: int) -> None:
    """Any split of the data gives the matrices of one batch."""
    model, x, likelihood = problem
    batches = [
        (part, None)
        for part in x.split([min(first, len(x)), len(x) - min(first, len(x))])
        if len(part)
    ]
    for approximation in (
        fl.Exact(),
        fl.KFAC(),
        fl.TKFAC("full"),
        fl.TN(),
        fl.MiniBlock(),
        fl.LNGD(),
    ):
        whole = fl.estimate(approximation, model, likelihood, x)
        for name, matrix in fl.estimate(approximation, model, likelihood, batches).items():
            expected = whole[name].dense()
            if float(expected.norm()) > 1e-20:
                assert_same(matrix.dense(), expected, 1e-9)
