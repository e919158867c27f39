"""Popular claims that are false, each with a stored counterexample (X1-X9, X11, X12).

X10 ("a better F^ trains faster") is about training runs and has no counterexample of this size.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fisher_lab as fl
from fisher_lab.statistics import LayerStats
from tests.helpers import (
    assert_differs,
    assert_same,
    build,
    columns_at,
    dense,
    dense_fisher,
    explicit_stats,
    fisher_of,
    frobenius,
    gradients,
    linear_stats,
    outer,
    random_orthogonal,
    random_stats,
    spectral,
    stats_with_block,
)
from tests.naive import kron

# Each claim's counterexample: inputs a_n and gradients g_n of four examples, one direction, F their
# mean.
X1 = ([(-2, 0), (0, -2), (0, 2), (0, 1)], [(0, 1), (1, 0), (0, -1), (1, 0)])
X2_SPECTRAL = ([(2, 2), (2, -1), (-2, 1), (-1, 0)], [(0, -1), (1, 2), (1, 2), (-2, 2)])
X2_INVERSE = ([(0, 1), (-2, -2), (1, 1), (-1, 0)], [(-2, 1), (-2, 2), (1, 0), (-2, 1)])
X2_DIRECTION = ([(-1, 1), (0, -1), (-2, -2), (2, -2)], [(1, 1), (0, -1), (2, 2), (-1, 1)])
X3_TEKFAC = ([(0, 1), (1, 2), (-2, 1), (1, 2)], [(-1, 2), (0, 2), (2, 1), (-1, 1)])
X3_EKFAC = ([(-2, 0), (1, 1), (0, 0), (-1, 0)], [(0, 2), (0, 1), (-2, -1), (1, 0)])
X3_DIAGONAL = ([(2, 0), (-1, 0), (0, -1), (0, 0)], [(2, 0), (2, 0), (0, 1), (-1, -2)])
X5 = ([(1, 0), (1, 1), (0, 2), (2, -1)], [(1, 1), (0, 2), (1, -1), (1, 2)])
# gradients P of two examples, [2, 4] each
X11 = [[(-1, -1, 1, 1), (1, 1, -1, -1)], [(1, 0, 1, 1), (0, -1, 0, 1)]]
X4 = ([(1, 2), (2, 1), (0, 2), (-1, 2)], [(0, 0), (0, -2), (1, 0), (2, 0)])


def errors(case: tuple, norm=frobenius) -> dict[str, float]:
    """{approximation: |F - F^|} of a stored case."""
    stats = linear_stats(*case)
    names = ("KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "Diagonal")
    return {name: norm(dense_fisher(stats) - dense(name, stats)) for name in names}


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_x1_tkfac_is_not_always_better_than_kfac() -> None:
    """X1: "TKFAC always has a smaller error than KFAC" is false: 0.7692 against 0.7289 here."""
    stats = linear_stats(*X1)
    assert_same(dense_fisher(stats), diagonal(0, 1.25, 1, 1))
    assert_same(dense("KFAC", stats), diagonal(0.5, 1.125, 0.5, 1.125))
    assert_same(dense("TKFAC", stats), diagonal(5 / 13, 11.25 / 13, 8 / 13, 18 / 13))
    found = errors(X1)
    assert found["KFAC"] == pytest.approx(0.728869, abs=1e-6)
    assert found["TKFAC"] == pytest.approx(0.769231, abs=1e-6)


def test_x2_ekfac_is_not_better_in_spectral_norm() -> None:
    """X2: "EKFAC is better than KFAC" is about the Frobenius norm; here it is worse in the spectral
    norm.
    """
    found = errors(X2_SPECTRAL, spectral)
    assert found["EKFAC"] > 1.2 * found["KFAC"]
    assert errors(X2_SPECTRAL)["EKFAC"] <= errors(X2_SPECTRAL)["KFAC"]


def damped_inverses(case: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """(F + c)^-1 for the exact block, KFAC and EKFAC with c = 0.1 tr F / d."""
    stats = linear_stats(*case)
    F = dense_fisher(stats)
    shift = 0.1 * torch.trace(F) / 4 * torch.eye(4, dtype=F.dtype)
    blocks = F, dense("KFAC", stats), dense("EKFAC", stats)
    return tuple(torch.linalg.inv(M + shift) for M in blocks)  # type: ignore[return-value]


def test_x2_ekfac_is_not_a_better_inverse() -> None:
    """X2: a smaller Frobenius error does not make a better damped inverse."""
    exact, kfac, ekfac = damped_inverses(X2_INVERSE)
    assert frobenius(exact - ekfac) > 1.2 * frobenius(exact - kfac)


def test_x2_ekfac_is_not_a_better_direction() -> None:
    """X2: nor a better damped direction: here KFAC's has the larger cosine with the exact one."""
    g = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    exact, kfac, ekfac = (inverse @ g for inverse in damped_inverses(X2_DIRECTION))
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(exact, ekfac, dim=0)) < float(cosine(exact, kfac, dim=0)) - 0.03


def test_x3_tekfac_can_be_worse_than_ekfac() -> None:
    """X3: "TEKFAC <= EKFAC" is false: the eigenbases differ."""
    found = errors(X3_TEKFAC)
    assert found["TEKFAC"] > 2 * found["EKFAC"]


def test_x3_ekfac_can_be_worse_than_tkfac_and_kpsvd() -> None:
    """X3: "EKFAC <= TKFAC" and "EKFAC <= KPSVD" are false: F is nearly a Kronecker product, but not
    of KFAC's basis.
    """
    found = errors(X3_EKFAC)
    assert found["EKFAC"] > 10 * found["TKFAC"]
    assert found["EKFAC"] > 10 * found["KPSVD"]


def test_x3_kfac_can_be_worse_than_the_diagonal() -> None:
    """X3: "KFAC <= diagonal" is false: here F is diagonal."""
    found = errors(X3_DIAGONAL)
    assert found["Diagonal"] < 1e-9
    assert found["KFAC"] > 1.0


def test_x4_the_optimal_kronecker_product_is_not_best_in_spectral_norm() -> None:
    """X4: KPSVD is optimal in the Frobenius norm; TKFAC beats it in the spectral norm here."""
    found = errors(X4, spectral)
    assert found["KPSVD"] > 1.5 * found["TKFAC"]
    assert errors(X4)["KPSVD"] <= errors(X4)["TKFAC"]


def test_x5_kfac_and_kpsvd_do_not_keep_the_trace() -> None:
    """X5: "KFAC preserves the trace", "KPSVD preserves the trace": false."""
    stats = linear_stats(*X5)
    assert float(torch.trace(dense_fisher(stats))) == pytest.approx(10.75)
    assert float(torch.trace(dense("KFAC", stats))) == pytest.approx(9.75)
    assert float(torch.trace(dense("KPSVD", stats))) == pytest.approx(9.783410, abs=1e-6)


def test_x6_shampoo_is_not_exact_on_kronecker_products() -> None:
    """X6: Shampoo is not exact where F is a Kronecker product (but for projectors), and it is not
    F^2.
    """
    F = kron(diagonal(1, 4), diagonal(1, 9))
    stats = stats_with_block(F, 2, 2)
    for options in ({"match_trace": True}, {"match_trace": False}):
        assert_differs(dense("Shampoo", stats, **options), F, 0.1)
        assert_differs(dense("Shampoo", stats, **options), F @ F, 0.1)
    projector = kron(diagonal(1, 0), diagonal(1, 1))
    assert_same(dense("Shampoo", stats_with_block(projector, 2, 2)), projector, 1e-7)
    one = linear_stats([(1, 2)], [(3, -1)])  # factors of rank one
    assert_same(dense("Shampoo", one, match_trace=False), dense_fisher(one), 1e-6)


def test_x7_kfac_is_not_exact_for_linear_nets_with_the_empirical_fisher() -> None:
    """X7: "KFAC is exact for linear nets" holds for the label expectation of the squared error only
    (P17).
    """
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False)).double()
    model[0].weight.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for fisher, exact in (("true", True), ("empirical", False)):
        F = fl.exact_fisher(model, fl.Gaussian(), (x, y), fisher=fisher)["0"].dense()
        kfac = fl.estimate(fl.KFAC(), model, fl.Gaussian(), (x, y), fisher=fisher)["0"].dense()
        assert (frobenius(F - kfac) < 1e-9) == exact
        assert exact or frobenius(F - kfac) > 0.1 * frobenius(F)


@pytest.mark.parametrize("name", ["KFAC", "TN", "TKFAC"])
def test_x8_one_example_is_not_enough_with_positions(name: str) -> None:
    """X8: "exact for one example" is false where the weight is shared: [1 0; 0 2] is no rank-one
    gradient.
    """
    a = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)
    g = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).reshape(1, 1, 2, 1, 2)
    stats = LayerStats(a, g)
    assert_differs(dense(name, stats), dense_fisher(stats), 0.3)


# ---------------------------------------------------------------- batch-mean gradients, by
# enumerating all labels


def softmax_layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs a `[m, d_in]` of one linear layer, and its class probabilities p `[m, C]`."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return a, (a @ weight.T).softmax(1)


def mean_gradient(a: Tensor, p: Tensor, labels: tuple[int, ...]) -> Tensor:
    """Gradient of the mean cross-entropy over the batch `[C, d_in]`."""
    total = torch.zeros(p.shape[1], a.shape[1], dtype=a.dtype)
    for n, label in enumerate(labels):
        residual = p[n].clone()
        residual[label] -= 1
        total += outer(residual, a[n]) / len(labels)
    return total


def expectation(a: Tensor, p: Tensor, function) -> Tensor:
    """Mean of `function(batch-mean gradient)` over all label combinations, with their model
    probabilities.
    """
    m, C = p.shape
    total = 0.0
    for labels in itertools.product(range(C), repeat=m):
        probability = 1.0
        for n, label in enumerate(labels):
            probability = probability * p[n, label]
        total = total + probability * function(mean_gradient(a, p, labels))
    return total  # type: ignore[return-value]


def true_stats(a: Tensor, p: Tensor) -> LayerStats:
    """Statistics of the layer with the categorical factor of the library."""
    return LayerStats(
        a[:, None, None, :], columns_at(fl.Categorical(), p.log(), "true")[:, :, None, None, :]
    )


@pytest.mark.parametrize("seed", range(5))
def test_x9_batch_mean_gradients_with_sampled_labels(seed: int) -> None:
    """X9, the true part: with labels drawn from the model, E[gbar gbar^T] = F / m, by enumeration
    of all labels.
    """
    a, p = softmax_layer(seed)
    F = dense_fisher(true_stats(a, p))
    mean = expectation(a, p, lambda gbar: outer(gbar.reshape(-1), gbar.reshape(-1)))
    assert_same(3 * mean, F)


@pytest.mark.parametrize("seed", range(5))
def test_x9_batch_mean_gradients_with_true_labels(seed: int) -> None:
    """X9: with true labels it is F_emp / m + (1 - 1/m) gradL gradL^T (batches of m independent
    examples).
    """
    a, p = softmax_layer(seed)
    labels, m = (0, 2, 1), 2
    per_example = torch.stack(
        [mean_gradient(a[n : n + 1], p[n : n + 1], (labels[n],)) for n in range(3)]
    )
    empirical = fisher_of(per_example[None])
    whole = mean_gradient(a, p, labels).reshape(-1)
    mean = torch.zeros_like(empirical)
    # all batches drawn with replacement from the three examples
    for batch in itertools.product(range(3), repeat=m):
        gbar = per_example[list(batch)].mean(0).reshape(-1)
        mean += outer(gbar, gbar) / 3**m
    assert_same(mean, empirical / m + (1 - 1 / m) * outer(whole, whole))
    assert_differs(m * mean, dense_fisher(true_stats(a, p)), 0.1)
    assert_differs(m * mean, empirical, 0.05)


def test_x11_more_modes_are_not_a_refinement() -> None:
    """X11: TN with three modes is a coarser model than with two, but neither is always better."""
    worse = random_stats(0, N=6, d_out=2, kernel=(2, 2))
    F = dense_fisher(worse)
    assert frobenius(F - dense("TN", worse, modes=3)) > 1.01 * frobenius(
        F - dense("TN", worse, modes=2)
    )
    better = explicit_stats(X11, kernel=(2, 2))
    F = dense_fisher(better)
    assert frobenius(F - dense("TN", better, modes=2)) == pytest.approx(2.577210, abs=1e-6)
    assert frobenius(F - dense("TN", better, modes=3)) == pytest.approx(2.535411, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_x12_eigenvalues_from_batch_mean_gradients(seed: int) -> None:
    """X12: squared batch-mean gradients in a fixed basis are EKFAC's s only times m, in expectation
    over labels.
    """
    a, p = softmax_layer(seed)
    left, right = random_orthogonal(3, seed), random_orthogonal(2, seed + 1)
    basis = kron(left, right)
    s = torch.diagonal(basis.T @ dense_fisher(true_stats(a, p)) @ basis)
    mean = expectation(a, p, lambda gbar: (left.T @ gbar @ right).reshape(-1) ** 2)
    assert_same(3 * mean, s)
    one_draw = (left.T @ mean_gradient(a, p, (0, 1, 2)) @ right).reshape(-1) ** 2
    assert_differs(3 * one_draw, s, 0.1)


def test_stored_cases_are_not_degenerate() -> None:
    """The counterexamples do not rest on the choice of an eigenbasis: eigenvalues are distinct."""
    for case in (X2_SPECTRAL, X2_INVERSE, X2_DIRECTION, X3_TEKFAC, X3_EKFAC, X3_DIAGONAL, X4):
        stats = linear_stats(*case)
        P = gradients(stats)[0, :, 0]
        a, g = stats.a[:, 0, 0], stats.g[0, :, 0, 0]
        for M in (
            a.T @ a,
            g.T @ g,
            torch.einsum("noi,npi->op", P, P),
            torch.einsum("noi,noj->ij", P, P),
        ):
            low, high = torch.linalg.eigvalsh(M)
            assert high - low > 0.1
    assert build("KFAC", linear_stats(*X1)).shape == (2, 2)
