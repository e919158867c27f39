"""When an approximation is the exact block (P16-P23).

P24 (K-BFGS keeps its inverse positive and contracts) belongs to the tests of that optimizer. P25
(iEF) is about something the library does not have.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.statistics import LayerStats
from tests.helpers import (
    assert_differs,
    assert_same,
    build,
    dense,
    dense_fisher,
    fisher_of,
    frobenius,
    gradients,
    linear_stats,
    random_case,
    random_orthogonal,
    random_stats,
    stats_with_block,
)
from tests.naive import kron

SEEDS = range(6)
KRONECKER_EXACT = ["KFAC", "EKFAC", "TKFAC", "TEKFAC", "TN", "KPSVD"]


def network(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """A float64 network with random weights drawn from `seed`, the global random state
    untouched.
    """
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p.shape[-1])
    return model


def inputs(*shape: int, seed: int = 100) -> Tensor:
    """Gaussian float64 inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(
    name: str, model: nn.Module, likelihood, data, options: dict | None = None, **settings
) -> dict:
    """{layer: (exact block, approximation)}, dense."""
    approximation = getattr(fl, name)(**(options or {}))
    exact = fl.exact_fisher(model, likelihood, data, **settings)
    estimate = fl.estimate(approximation, model, likelihood, data, **settings)
    assert list(exact) == list(estimate)
    return {layer: (exact[layer].dense(), estimate[layer].dense()) for layer in exact}


# ---------------------------------------------------------------- P16


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KRONECKER_EXACT)
def test_p16_one_example(name: str, seed: int) -> None:
    """P16: Linear, T = 1, N = 1, any number of directions: F = (sum d d^T) (x) x x^T and these
    methods are exact.
    """
    stats = random_stats(seed, N=1, R=1 + seed % 3, d_out=3, d_in=4)
    assert_same(dense(name, stats), dense_fisher(stats), 1e-8)


@pytest.mark.parametrize("name", ["KFAC", "TKFAC", "TN", "KPSVD"])
def test_p16_needs_one_position(name: str) -> None:
    """P16 fails for T > 1: one per-example gradient is then not of rank one."""
    stats = random_stats(0, N=1, R=1, T=3)
    assert_differs(dense(name, stats), dense_fisher(stats), 0.05)


# ---------------------------------------------------------------- P17


@pytest.mark.parametrize("name", KRONECKER_EXACT)
@pytest.mark.parametrize("bias", [False, True])
def test_p17_deep_linear_network(bias: bool, name: str) -> None:
    """P17: deep linear net, squared error, label expectation: exact at every layer."""
    model = network(
        nn.Linear(4, 3, bias=bias), nn.Linear(3, 3, bias=bias), nn.Linear(3, 2, bias=bias)
    )
    blocks = both(name, model, fl.Gaussian(), (inputs(7, 4), inputs(7, 2, seed=3)))
    assert len(blocks) == 3
    for exact, approximate in blocks.values():
        assert frobenius(exact) > 0
        assert_same(approximate, exact, 1e-8)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_p17_needs_the_label_expectation(fisher: str) -> None:
    """P17 fails for the empirical Fisher and for one Monte-Carlo draw: the gradients then depend on
    the example.
    """
    model = network(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    data = (inputs(7, 4), inputs(7, 2, seed=3))
    for exact, approximate in both(
        "KFAC", model, fl.Gaussian(), data, fisher=fisher, seed=0
    ).values():
        assert_differs(approximate, exact, 0.05)


def test_p17_needs_the_squared_error() -> None:
    """P17 fails for softmax: d depends on the example through its probabilities."""
    model = network(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    data = (3 * inputs(7, 4), torch.arange(7) % 3)
    for exact, approximate in both("KFAC", model, fl.Categorical(), data).values():
        assert_differs(approximate, exact, 0.01)


# ---------------------------------------------------------------- P18

LAST_LAYER_EXACT = [(name, {}) for name in [*KRONECKER_EXACT, "LNGD"]]
LAST_LAYER_EXACT += [("MiniBlock", {"linear": "row"}), ("MiniBlock", {"linear": "row_avg"})]


def tanh_network(outputs: int = 3) -> nn.Sequential:
    return network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


@pytest.mark.parametrize(("name", "options"), LAST_LAYER_EXACT)
def test_p18_last_layer_with_squared_error(name: str, options: dict) -> None:
    """P18: last layer, squared error, any nonlinearity below: F = I (x) A, and these methods are
    exact.
    """
    model, x = tanh_network(), inputs(8, 4)
    exact, approximate = both(name, model, fl.Gaussian(), (x, inputs(8, 3, seed=1)), options)["2"]
    hidden = torch.cat([model[:2](x).detach(), torch.ones(8, 1, dtype=torch.float64)], 1)
    assert_same(exact, kron(torch.eye(3, dtype=torch.float64), hidden.T @ hidden / 8))
    assert_same(approximate, exact, 1e-8)


@pytest.mark.parametrize("name", ["Shampoo", "Diagonal"])
def test_p18_not_exact(name: str) -> None:
    """P18: Shampoo and the diagonal are not exact at the last layer with squared error."""
    exact, approximate = both(
        name, tanh_network(), fl.Gaussian(), (inputs(8, 4), inputs(8, 3, seed=1))
    )["2"]
    assert_differs(approximate, exact, 0.05)


def test_p18_last_layer_with_bernoulli_outputs() -> None:
    """P18: last layer with independent Bernoulli outputs: row blocks are exact, KFAC is not."""
    data = (inputs(8, 4), (inputs(8, 3, seed=1) > 0).double())
    exact, rows = both("MiniBlock", tanh_network(), fl.Bernoulli(), data)["2"]
    assert_same(rows, exact)
    exact, kfac = both("KFAC", tanh_network(), fl.Bernoulli(), data)["2"]
    assert_differs(kfac, exact)


@pytest.mark.parametrize(
    ("name", "options"), [*LAST_LAYER_EXACT, ("Diagonal", {}), ("Shampoo", {})]
)
def test_p18_softmax_is_not_exact(name: str, options: dict) -> None:
    """P18: with softmax none of them is exact at the last layer."""
    exact, approximate = both(
        name, tanh_network(), fl.Categorical(), (inputs(8, 4), torch.arange(8) % 3), options
    )["2"]
    assert_differs(approximate, exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_p18_logit_shift_is_in_the_null_space(seed: int) -> None:
    """P18: with softmax, 1 (x) v is in the null space of the last block for every v."""
    exact = fl.exact_fisher(tanh_network(), fl.Categorical(), (inputs(8, 4), torch.arange(8) % 3))[
        "2"
    ]
    shift = torch.ones(3, 1, dtype=torch.float64) * inputs(1, 6, seed=seed)
    assert frobenius(exact @ shift) <= 1e-12 * frobenius(exact.dense()) * frobenius(shift)
    assert frobenius(exact @ inputs(3, 6, seed=seed)) > 1e-3 * frobenius(exact.dense())


# ---------------------------------------------------------------- P19, P20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [{"d_out": 1, "d_in": 4}, {"d_out": 4, "d_in": 1}])
@pytest.mark.parametrize("name", ["TKFAC", "TEKFAC", "TN", "KPSVD"])
def test_p19_a_side_of_size_one(name: str, sizes: dict, seed: int) -> None:
    """P19: with d_out = 1 or d_in = 1 and T = 1, TKFAC, TEKFAC, TN and KPSVD are exact."""
    stats = random_stats(seed, "norm-dependent", N=6, **sizes)
    assert_same(dense(name, stats), dense_fisher(stats), 1e-8)


def test_p19_kfac_is_not_exact() -> None:
    """P19: KFAC and EKFAC are not exact there in general, row blocks are for d_out = 1."""
    stats = random_stats(0, "norm-dependent", N=6, d_out=1, d_in=4)
    F = dense_fisher(stats)
    assert_differs(dense("KFAC", stats), F, 0.05)
    assert_differs(dense("EKFAC", stats), F, 0.01)
    assert_same(dense("MiniBlock", stats, linear="row"), F)


@pytest.mark.parametrize("seed", SEEDS)
def test_p20_kfac_exact_means_kronecker(seed: int) -> None:
    """P20: where KFAC is exact, F is a Kronecker product and TKFAC, TN and KPSVD are exact."""
    one = random_stats(seed, N=1, R=3)
    F = dense_fisher(one)
    for name in ("KFAC", "TKFAC", "TN", "KPSVD"):
        assert_same(dense(name, one), F, 1e-8)


def test_p20_the_converse_is_false() -> None:
    """P20: examples with g = 0 change A but not the directions of F: F stays Kronecker, KFAC is
    wrong, TKFAC is not.
    """
    X, G = (
        torch.eye(2, dtype=torch.float64),
        torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64),
    )
    # [R = 2, N = 2, 2]: every example has the same directions, so F = G' (x) A
    D = torch.stack([G, G], 1)
    assert_same(dense("KFAC", linear_stats(X, D)), dense_fisher(linear_stats(X, D)))
    X = torch.cat([X, torch.tensor([[3.0, 1.0]], dtype=torch.float64)])
    D = torch.cat([D, torch.zeros(2, 1, 2, dtype=torch.float64)], 1)
    stats = linear_stats(X, D)
    F = dense_fisher(stats)
    assert_differs(dense("KFAC", stats), F, 0.1)
    for name in ("TKFAC", "TN", "KPSVD"):
        assert_same(dense(name, stats), F)


# ---------------------------------------------------------------- P21


def spd(n: int, seed: int) -> Tensor:
    """A random positive definite matrix `[n, n]`."""
    basis = random_orthogonal(n, seed)
    return basis @ torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("seed", SEEDS)
def test_p21_tensor_normal_block(seed: int) -> None:
    """P21: F = B1 (x) B2 (x) B3: TN with these three modes is exact, and so is TN with two modes
    (B1, B2 (x) B3).
    """
    B1, B2, B3 = spd(2, seed), spd(3, seed + 10), spd(2, seed + 20)
    F = kron(B1, B2, B3)
    stats = stats_with_block(F, 2, 6, kernel=(3, 2))
    assert_same(dense_fisher(stats), F, 1e-10)
    assert_same(dense("TN", stats), F, 1e-11)
    assert_same(dense("TN", stats, modes=2), F, 1e-11)


def test_p21_convolution_modes() -> None:
    """P21 with the default modes of a convolution (C_out, C_in, kh kw)."""
    F = kron(spd(2, 0), spd(2, 1), spd(4, 2))
    assert_same(dense("TN", stats_with_block(F, 2, 8, kernel=(2, 2, 2))), F, 1e-11)


def test_p21_with_samples() -> None:
    """P21: with S samples of a tensor-normal gradient, TN is off by O(1/sqrt S), far less than the
    sample F itself.
    """
    F = kron(spd(2, 0), spd(3, 1))
    root = torch.linalg.cholesky(F)
    errors = []
    for S in (400, 40_000):
        P = (inputs(S, 6, seed=S) @ root.T).reshape(1, S, 1, 2, 3)
        estimate = dense("TN", LayerStats.of_gradients(P))
        errors.append(frobenius(estimate - F) / frobenius(F))
    assert errors[0] < 0.3
    assert errors[1] < 0.03
    assert errors[1] < errors[0]


# ---------------------------------------------------------------- P22


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
def test_p22_tengrad_is_exact_on_its_batch(T: int, seed: int) -> None:
    """P22: TENGraD's direction is (F_B + lambda)^-1 V with the dense block F_B of its own batch."""
    stats = random_stats(seed, N=6, R=1, T=T, d_out=3, d_in=4)
    batch = 4
    F = fisher_of(gradients(stats)[:, :batch])
    V, damping = inputs(3, 4, seed=seed), 0.3
    expected = torch.linalg.solve(
        F + damping * torch.eye(12, dtype=torch.float64), V.reshape(-1)
    ).reshape(3, 4)
    assert_same(build("TENGraD", stats, batch=batch).solve(V, damping=damping), expected)
    assert_same(dense("TENGraD", stats), dense_fisher(stats))


# ---------------------------------------------------------------- P23


class Pooled(nn.Module):
    """A deep linear net on sequences: two layers at every position, a pooling over positions, a
    last layer.
    """

    def __init__(self, pooling: str):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, 3]` -> `[N, 2]`, or `[N, T, 2]` without pooling."""
        hidden = self.second(self.first(x))
        hidden = {"mean": hidden.mean(1), "sum": hidden.sum(1), "none": hidden}[self.pooling]
        return self.last(hidden)


def pooled(pooling: str) -> Pooled:
    model = Pooled(pooling).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def test_p23_expand_is_exact_with_a_loss_per_position() -> None:
    """P23: deep linear net on sequences with squared error at every position: KFAC expand is exact,
    reduce is not.
    """
    data = (inputs(6, 3, 3), inputs(6, 3, 2, seed=5))
    for exact, expand in both(
        "KFAC", pooled("none"), fl.Gaussian(), data, {"spatial": "expand"}
    ).values():
        assert_same(expand, exact, 1e-9)
    for exact, reduce in both(
        "KFAC", pooled("none"), fl.Gaussian(), data, {"spatial": "reduce"}
    ).values():
        assert_differs(reduce, exact, 0.1)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_p23_reduce_is_exact_with_pooling(pooling: str) -> None:
    """P23: with mean or sum pooling over positions KFAC reduce is exact, expand is not (below the
    pooling).
    """
    data = (inputs(6, 3, 3), inputs(6, 2, seed=5))
    for exact, reduce in both(
        "KFAC", pooled(pooling), fl.Gaussian(), data, {"spatial": "reduce"}
    ).values():
        assert_same(reduce, exact, 1e-9)
    blocks = both("KFAC", pooled(pooling), fl.Gaussian(), data, {"spatial": "expand"})
    for layer in ("first", "second"):
        assert_differs(blocks[layer][1], blocks[layer][0], 0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_p18_row_blocks_when_outputs_are_independent(seed: int) -> None:
    """P18, at the level of statistics: directions along single outputs make row blocks exact."""
    stats = random_case(seed)
    one_hot = torch.eye(stats.d_out, dtype=torch.float64)[torch.arange(stats.R) % stats.d_out]
    g = stats.g * one_hot[:, None, None, None, :]
    single = LayerStats(stats.a, g)
    assert_same(dense("MiniBlock", single), dense_fisher(single))
