"""The order of Frobenius errors that is guaranteed, and closed forms of errors (P9-P15)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    REL,
    SLACK,
    assert_psd,
    build,
    columns,
    dense,
    dense_fisher,
    frobenius,
    gradients,
    random_case,
    random_stats,
)
from tests.naive import kron, left_of, rearranged, right_of

SEEDS = range(9)
CONVOLUTION = range(6)
KRONECKER = [
    ("KFAC", {}),
    ("KFAC", {"spatial": "reduce"}),
    ("TKFAC", {}),
    ("TKFAC", {"spatial": "full"}),
    ("TN", {}),
    ("LNGD", {}),
    ("Shampoo", {}),
    ("Shampoo", {"match_trace": False}),
    ("MiniBlock", {"linear": "row_avg"}),
    ("MiniBlock", {"linear": "col_avg"}),
]


def error(stats, name: str, **options) -> float:
    """|F - F^| in the Frobenius norm."""
    return frobenius(dense_fisher(stats) - dense(name, stats, **options))


def assert_at_most(stats, one: float, other: float) -> None:
    """`one <= other` up to rounding at the scale of F."""
    assert one <= other + SLACK * frobenius(dense_fisher(stats))


def convolution(seed: int):
    """A convolution with two groups, with and without bias."""
    return random_stats(
        seed, "norm-dependent", T=3, Q=2, N=5, d_out=2, kernel=(2, 1, 2), bias=seed % 2 == 0
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("spatial", ["expand", "reduce"])
def test_p9_ekfac_is_at_least_as_good_as_kfac(spatial: str, T: int, seed: int) -> None:
    """P9: |F - EKFAC| <= |F - KFAC|: the optimal diagonal in a basis beats any other."""
    stats = random_case(seed, T=T)
    assert_at_most(
        stats, error(stats, "EKFAC", spatial=spatial), error(stats, "KFAC", spatial=spatial)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("spatial", ["expand", "full"])
def test_p10_tekfac_is_at_least_as_good_as_tkfac(spatial: str, T: int, seed: int) -> None:
    """P10: |F - TEKFAC| <= |F - TKFAC|."""
    stats = random_case(seed, T=T)
    assert_at_most(
        stats, error(stats, "TEKFAC", spatial=spatial), error(stats, "TKFAC", spatial=spatial)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("name", "options"), KRONECKER)
def test_p11_kpsvd_is_the_best_kronecker_product(
    name: str, options: dict, T: int, seed: int
) -> None:
    """P11: |F - KPSVD| <= |F - S (x) T| for every Kronecker product."""
    stats = random_case(seed, T=T)
    assert_at_most(stats, error(stats, "KPSVD"), error(stats, name, **options))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
def test_p11_error_of_kpsvd(T: int, seed: int) -> None:
    """P11: |F - KPSVD|^2 = sum over k >= 2 of sigma_k(Z(F))^2, and no other Kronecker product tried
    is better.
    """
    stats = random_case(seed, T=T)
    F = dense_fisher(stats)
    tail = torch.linalg.svdvals(rearranged(F, stats.d_out, stats.d_in))[1:]
    best = error(stats, "KPSVD")
    assert best == pytest.approx(float(tail.norm()), rel=1e-8, abs=1e-8 * frobenius(F))
    generator = torch.Generator().manual_seed(seed)
    S, A = left_of(gradients(stats)[:, :, 0]), right_of(gradients(stats)[:, :, 0])
    for _ in range(5):
        noisy = [
            M + 0.1 * M.norm() * torch.randn(M.shape, generator=generator, dtype=M.dtype)
            for M in (S, A)
        ]
        assert_at_most(stats, best, frobenius(F - kron(*noisy) / torch.trace(S)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("coarse", ["row", "col"])
def test_p12_coarser_masks_win(coarse: str, T: int, seed: int) -> None:
    """P12: |F - mini-blocks| <= |F - diag|; row blocks are also at least as good as LNGD, which
    lives on them.
    """
    stats = random_case(seed, T=T)
    blocks = error(stats, "MiniBlock", linear=coarse)
    assert_at_most(stats, blocks, error(stats, "Diagonal"))
    if coarse == "row":
        assert_at_most(stats, blocks, error(stats, "LNGD"))
        assert_at_most(stats, blocks, error(stats, "MiniBlock", linear="row_avg"))
    else:
        assert_at_most(stats, blocks, error(stats, "MiniBlock", linear="col_avg"))


@pytest.mark.parametrize("seed", CONVOLUTION)
def test_p12_coarser_masks_win_on_convolutions(seed: int) -> None:
    """P12: filter blocks <= kernel blocks <= diagonal, in Frobenius error."""
    stats = convolution(seed)
    kernels = error(stats, "MiniBlock", conv="kernel")
    assert_at_most(stats, kernels, error(stats, "Diagonal"))
    assert_at_most(stats, error(stats, "MiniBlock", conv="filter"), kernels)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("T", [1, 3])
def test_p13_tkfac_is_quasi_optimal(T: int, seed: int) -> None:
    """P13: |F - TKFAC| <= k1 k2 e (1 + e sqrt(d)/tr KPSVD) and <= t sqrt((1 - |U1/t|^2)(1 -
    |U2/t|^2)) <= t.

    e is the error of KPSVD, k1 = sqrt(d_out) |U1| / t, k2 = sqrt(d_in) |U2| / t. T = 1, or spatial
    = full.
    """
    stats = random_case(seed, T=T)
    F, P = dense_fisher(stats), gradients(stats)[:, :, 0]
    U1, U2, t = left_of(P), right_of(P), float(torch.trace(F))
    tkfac, best = error(stats, "TKFAC", spatial="full"), error(stats, "KPSVD")
    k1 = math.sqrt(stats.d_out) * frobenius(U1) / t
    k2 = math.sqrt(stats.d_in) * frobenius(U2) / t
    assert 1 - 1e-12 <= k1 <= math.sqrt(stats.d_out) + 1e-12
    assert 1 - 1e-12 <= k2 <= math.sqrt(stats.d_in) + 1e-12
    size = math.sqrt(stats.d_out * stats.d_in)
    trace = float(torch.trace(dense("KPSVD", stats)))
    assert_at_most(stats, tkfac, k1 * k2 * best * (1 + best * size / trace))
    if T == 1:  # the second bound needs features of unit trace, which rank-one gradients have
        spread = max(0.0, 1 - frobenius(U1 / t) ** 2) * max(0.0, 1 - frobenius(U2 / t) ** 2)
        # 1 - |.|^2 loses half the digits near rank one
        assert tkfac <= t * math.sqrt(spread) + 1e-7 * t
        assert_at_most(stats, tkfac, t)


def as_matrix(matrix, damping: float, style: str, p: float = -1.0) -> Tensor:
    """Dense `[d, d]` of a damped power, one unit vector after the other."""
    d = matrix.shape[0] * matrix.shape[1]
    units = torch.eye(d, dtype=torch.float64).reshape(d, *matrix.shape)
    return matrix.power(units, p, damping=damping, style=style).reshape(d, d)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "options"), [("KFAC", {}), ("TKFAC", {}), ("TN", {}), ("KPSVD", {})]
)
def test_p14_factored_damping_dominates_exact_damping(name: str, options: dict, seed: int) -> None:
    """P14: (G + g/pi)(x)(A + pi g) >= G (x) A + g^2, so the factored inverse is the smaller one in
    the PSD order.
    """
    stats = random_case(seed)
    matrix = build(name, stats, **options)
    damping = 0.1 * float(matrix.trace()) / (stats.d_out * stats.d_in)
    exact, factored = (as_matrix(matrix, damping, style) for style in ("exact", "factored"))
    assert_psd(exact - factored, scale=frobenius(exact))
    inverses = torch.linalg.inv(exact), torch.linalg.inv(factored)
    assert_psd(inverses[1] - inverses[0], slack=1e-9, scale=frobenius(inverses[1]))


@pytest.mark.parametrize("seed", range(4))
def test_p14_three_modes(seed: int) -> None:
    """P14 for TN with three modes."""
    matrix = build("TN", random_stats(seed, T=2, d_out=2, kernel=(2, 1, 3)))
    damping = 0.1 * float(matrix.trace()) / 12
    exact, factored = (as_matrix(matrix, damping, style) for style in ("exact", "factored"))
    assert_psd(exact - factored, scale=frobenius(exact))


@pytest.mark.parametrize("seed", SEEDS)
def test_p14_the_pi_split(seed: int) -> None:
    """P14: KFAC's factored damping is (G + gamma/pi)(x)(A + pi gamma), gamma^2 = damping, pi^2 the
    ratio of means.
    """
    stats = random_case(seed)
    X, D = columns(stats)
    A, G = X.T @ X / stats.R / stats.N, D.T @ D
    damping = 0.3
    pi = math.sqrt((torch.trace(A) / stats.d_in) / (torch.trace(G) / stats.d_out))
    eye_g, eye_a = (torch.eye(n, dtype=torch.float64) for n in (stats.d_out, stats.d_in))
    damped = kron(G + math.sqrt(damping) / pi * eye_g, A + math.sqrt(damping) * pi * eye_a)
    got = as_matrix(build("KFAC", stats), damping, "factored")
    assert frobenius(got @ damped - torch.eye(len(damped), dtype=torch.float64)) < 1e-8


@pytest.mark.parametrize("seed", SEEDS)
def test_p15_error_of_kfac(seed: int) -> None:
    """P15: |F - KFAC|^2 = 1/N^2 sum of (H K_G H) o (H K_A H), the HSIC of g g^T and a a^T over
    examples (T = 1).
    """
    stats = random_case(seed)
    N = stats.N
    G = torch.einsum("rno,rnp->nop", stats.g[:, :, 0, 0], stats.g[:, :, 0, 0]).reshape(N, -1)
    K_G, K_A = G @ G.T, (stats.a[:, 0, 0] @ stats.a[:, 0, 0].T) ** 2
    H = torch.eye(N, dtype=torch.float64) - 1 / N
    closed = ((H @ K_G @ H) * (H @ K_A @ H)).sum() / N**2
    assert error(stats, "KFAC") == pytest.approx(math.sqrt(max(float(closed), 0.0)), rel=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_p15_error_of_tkfac(seed: int) -> None:
    """P15: TKFAC is KFAC of the norm-weighted directions: weights |x|^2|d|^2/t, unit vectors,
    prefactor t^2 (T = 1).
    """
    stats = random_case(seed)
    X, D = columns(stats)
    w = X.square().sum(1) * D.square().sum(1)
    t = w.sum()
    keep = w > 1e-12 * t
    X, D, w = X[keep], D[keep], w[keep] / t
    X, D = X / X.norm(dim=1, keepdim=True), D / D.norm(dim=1, keepdim=True)
    H = torch.eye(len(w), dtype=torch.float64) - w[None, :]  # weighted centring: k - E_w k
    K_X, K_D = (H @ (M @ M.T) ** 2 @ H.T for M in (X, D))
    closed = t**2 * (w[:, None] * w[None, :] * K_X * K_D).sum()
    scale = frobenius(dense_fisher(stats))
    assert error(stats, "TKFAC") == pytest.approx(
        math.sqrt(max(float(closed), 0.0)), rel=1e-7, abs=1e-7 * scale
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_p15_error_of_row_blocks(seed: int) -> None:
    """P15: |F - row blocks|^2 = sum_{r,s} (x_r.x_s)^2 [(d_r.d_s)^2 - sum_i d_ri^2 d_si^2]
    (T = 1).
    """
    stats = random_case(seed)
    X, D = columns(stats)
    closed = ((X @ X.T) ** 2 * ((D @ D.T) ** 2 - D.square() @ D.square().T)).sum()
    scale = frobenius(dense_fisher(stats))
    expected = math.sqrt(max(float(closed), 0.0))
    assert error(stats, "MiniBlock", linear="row") == pytest.approx(
        expected, rel=REL, abs=1e-7 * scale
    )
