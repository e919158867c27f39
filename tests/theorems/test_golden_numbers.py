"""Golden numbers, computed once by independent code (algorithms B.1, B.2, B.3, B.5).

B.4 (double damping of K-BFGS) belongs to the tests of that optimizer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisher_lab as fl
from fisher_lab.statistics import contractions
from tests.helpers import (
    assert_same,
    build,
    dense,
    dense_fisher,
    explicit_stats,
    frobenius,
    gradients,
    lambda_max,
    linear_stats,
    spectral,
)
from tests.naive import left_of, naive_tn, rearranged, right_of

A = [(1, 0), (1, 1), (0, 2), (2, -1)]
G = [(1, 1), (0, 2), (1, -1), (1, 2)]
VECTOR = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
DAMPING = 0.1
PRINTED = 1.01e-6  # six decimals were printed

# approximation, options: trace, |F - F^|, |F - F^|_2, lambda_max, cosine and efficiency of the
# damped direction
TABLE = {
    "KFAC": ("KFAC", {}, 9.750000, 3.742701, 2.812647, 4.607369, 0.951239, 0.398497),
    "EKFAC": ("EKFAC", {}, 10.750000, 3.509671, 2.364042, 5.832921, 0.912972, 0.290655),
    "TKFAC": ("TKFAC", {}, 10.750000, 2.886580, 1.684903, 5.894910, 0.953062, 0.414957),
    "TN": ("TN", {}, 10.750000, 2.886580, 1.684903, 5.894910, 0.953062, 0.414957),
    "TEKFAC": ("TEKFAC", {}, 10.750000, 2.505192, 1.647298, 6.611910, 0.868737, 0.270486),
    "KPSVD": ("KPSVD", {}, 9.783410, 2.445476, 2.194035, 6.806409, 0.861446, 0.297815),
    "LNGD": ("LNGD", {}, 10.750000, 3.871718, 2.620594, 5.563953, 0.922381, 0.278772),
    "rows": (
        "MiniBlock",
        {"linear": "row"},
        10.750000,
        3.824265,
        2.575184,
        5.630199,
        0.935720,
        0.296514,
    ),
    "diagonal": ("Diagonal", {}, 10.750000, 4.138236, 3.121298, 5.250000, 0.928779, 0.281639),
    "raw Shampoo": (
        "Shampoo",
        {"match_trace": False},
        19.960178,
        5.604798,
        4.097867,
        7.960545,
        0.907107,
        0.320569,
    ),
}
ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())


def matrix(*rows: tuple) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def stats():
    return linear_stats(A, G)


def test_b1_the_block(stats) -> None:
    """B.1: F, its factors, trace, norm, largest eigenvalue, singular values of its
    rearrangement.
    """
    four_f = matrix((5, -2, 9, -4), (-2, 5, -4, -2), (9, -4, 21, -4), (-4, -2, -4, 12))
    for F in (dense_fisher(stats), contractions.dense(stats), dense("Exact", stats)):
        assert_same(4 * F, four_f)
    P = gradients(stats)[:, :, 0]
    assert_same(4 * left_of(P), matrix((10, 7), (7, 33)))
    assert_same(4 * right_of(P), matrix((26, -6), (-6, 17)))
    assert_same(4 * contractions.left(stats)[0], matrix((10, 7), (7, 33)))
    assert_same(4 * contractions.right(stats)[0], matrix((26, -6), (-6, 17)))
    assert_same(
        16 * dense("KFAC", stats), torch.kron(matrix((3, 2), (2, 10)), matrix((6, -1), (-1, 6)))
    )
    exact = build("Exact", stats)
    assert float(exact.trace()) == pytest.approx(10.75)
    assert float(exact.frobenius_norm()) == pytest.approx(7.537407, abs=PRINTED)
    assert float(exact.spectral_norm()) == pytest.approx(6.876559, abs=PRINTED)
    singular = torch.linalg.svdvals(rearranged(exact.dense(), 2, 2))
    assert singular.tolist() == pytest.approx([7.129667, 2.398891, 0.475055, 0.0], abs=PRINTED)


def test_b1_exact_direction(stats) -> None:
    """B.1: (F + 0.1 I)^-1 g."""
    direction = build("Exact", stats).solve(VECTOR, damping=DAMPING)
    assert direction.reshape(-1).tolist() == pytest.approx(
        [5.167755, 1.350922, -1.605006, 1.689745], abs=PRINTED
    )


def test_b1_eigenvalues(stats) -> None:
    """B.1: the corrected eigenvalues of EKFAC and of TEKFAC."""
    ekfac, tekfac = (build(name, stats).eigenvalues().tolist() for name in ("EKFAC", "TEKFAC"))
    assert ekfac == pytest.approx([0.968479, 1.042079, 2.906521, 5.832921], abs=PRINTED)
    assert tekfac == pytest.approx([0.638090, 1.371182, 2.128818, 6.611910], abs=PRINTED)


def test_b1_pi(stats) -> None:
    """B.1: pi = 0.960769, so factored damping adds gamma/pi to G and pi gamma to A."""
    pi, gamma = 0.960769, DAMPING**0.5
    eye = torch.eye(2, dtype=torch.float64)
    damped = torch.kron(
        matrix((3, 2), (2, 10)) / 4 + gamma / pi * eye,
        matrix((6, -1), (-1, 6)) / 4 + pi * gamma * eye,
    )
    got = build("KFAC", stats).solve(VECTOR, damping=DAMPING, style="factored")
    expected = torch.linalg.solve(damped, VECTOR.reshape(-1)).reshape(2, 2)
    assert_same(got, expected, 1e-5)


@ROWS
def test_b1_table(stats, row: tuple) -> None:
    """B.1: trace, Frobenius and spectral error, largest eigenvalue."""
    name, options, trace, norm, norm2, top, _, _ = row
    F, approximate = dense_fisher(stats), build(name, stats, **options)
    assert float(approximate.trace()) == pytest.approx(trace, abs=PRINTED)
    assert frobenius(F - approximate.dense()) == pytest.approx(norm, abs=PRINTED)
    assert spectral(F - approximate.dense()) == pytest.approx(norm2, abs=PRINTED)
    assert lambda_max(approximate.dense()) == pytest.approx(top, abs=PRINTED)
    assert float(approximate.spectral_norm()) == pytest.approx(top, abs=PRINTED)


@ROWS
def test_b1_damped_directions(stats, row: tuple) -> None:
    """B.1: cosine with the exact damped direction, and efficiency (y.g)^2 / (y'(F + c)y g'(F +
    c)^-1 g).
    """
    name, options, *_, cosine, efficiency = row
    F, g = dense_fisher(stats) + DAMPING * torch.eye(4, dtype=torch.float64), VECTOR.reshape(-1)
    x, y = (
        torch.linalg.solve(F, g),
        build(name, stats, **options).solve(VECTOR, damping=DAMPING).reshape(-1),
    )
    assert float(x @ y / x.norm() / y.norm()) == pytest.approx(cosine, abs=PRINTED)
    assert float((y @ g) ** 2 / ((y @ F @ y) * (g @ x))) == pytest.approx(efficiency, abs=PRINTED)


@ROWS
def test_b1_error_measures(stats, row: tuple) -> None:
    """B.1 through the library's error measures, which are relative to F."""
    name, options, trace, norm, norm2, *_ = row
    exact, approximate = build("Exact", stats), build(name, stats, **options)
    assert fl.errors.trace(exact, approximate) == pytest.approx(
        (trace - 10.75) / 10.75, abs=PRINTED
    )
    assert fl.errors.frobenius(exact, approximate) == pytest.approx(norm / 7.537407, abs=PRINTED)
    assert fl.errors.spectral(exact, approximate) == pytest.approx(norm2 / 6.876559, abs=PRINTED)


def test_b1_who_is_best() -> None:
    """B.1: KPSVD is best in the Frobenius norm, TEKFAC in the spectral norm, TKFAC in direction."""
    best = [min(TABLE, key=lambda name: TABLE[name][column]) for column in (3, 4)]
    assert best == ["KPSVD", "TEKFAC"]
    assert max(TABLE, key=lambda name: TABLE[name][6]) == "TKFAC"


def test_b2_three_modes() -> None:
    """B.2: TN with modes (2, 2, 2) of two gradients."""
    # two directions of one example
    P = matrix(tuple(range(1, 9)), (1, 0, -1, 2, 0, 1, 1, -1)).reshape(2, 1, 2, 4)
    stats = explicit_stats(P, kernel=(2, 2))
    F = dense_fisher(stats)
    U = [torch.zeros(2, 2, dtype=torch.float64) for _ in range(3)]
    for p in P.reshape(2, 2, 2, 2):
        for mode in range(3):
            rows = p.movedim(mode, 0).reshape(2, 4)
            U[mode] += rows @ rows.T
    assert_same(U[0], matrix((36, 67), (67, 177)))
    assert_same(U[1], matrix((68, 92), (92, 145)))
    assert_same(U[2], matrix((87, 97), (97, 126)))
    assert float(torch.trace(F)) == pytest.approx(213)
    assert frobenius(F) == pytest.approx(204.790136, abs=PRINTED)
    for approximate in (naive_tn(stats), dense("TN", stats, modes=3)):
        assert frobenius(F - approximate) == pytest.approx(33.339201, abs=PRINTED)
        assert lambda_max(approximate) == pytest.approx(190.281677, abs=PRINTED)


def test_b3_softmax_root() -> None:
    """B.3: the root with columns sqrt(p_c) (e_c - p) at p = (0.5, 0.3, 0.2), and ours with one
    column less.
    """
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    S = fl.Categorical().factor(p.log())[:, 0]
    expected = matrix(
        (0.353553, -0.212132, -0.141421),
        (-0.273861, 0.383406, -0.109545),
        (-0.223607, -0.134164, 0.357771),
    )
    assert S.shape == (2, 3)
    assert float((S.T @ S - expected.T @ expected).abs().max()) < PRINTED
    assert_same(S.T @ S, torch.diag(p[0]) - p.T @ p)


def test_b5_tkfac_worse_than_kfac() -> None:
    """B.5: the counterexample X1: Frobenius errors 0.728869 and 0.769231, spectral errors 0.5 and
    0.384615.
    """
    stats = linear_stats([(-2, 0), (0, -2), (0, 2), (0, 1)], [(0, 1), (1, 0), (0, -1), (1, 0)])
    F = dense_fisher(stats)
    for name, norm, norm2 in (("KFAC", 0.728869, 0.5), ("TKFAC", 0.769231, 0.384615)):
        assert frobenius(F - dense(name, stats)) == pytest.approx(norm, abs=PRINTED)
        assert spectral(F - dense(name, stats)) == pytest.approx(norm2, abs=PRINTED)
