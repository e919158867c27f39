"""Traces: which approximations keep tr F (P1-P5)."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    REL,
    assert_same,
    columns,
    dense,
    dense_fisher,
    explicit_stats,
    frobenius,
    gradients,
    linear_stats,
    random_case,
    random_stats,
)
from tests.naive import left_of, right_of

SEEDS = range(9)
KEEP_TRACE_ALWAYS = [
    ("TKFAC", {"spatial": "full"}),
    ("TN", {}),
    ("LNGD", {}),
    ("EKFAC", {}),
    ("EKFAC", {"spatial": "reduce"}),
    ("TEKFAC", {}),
    ("TEKFAC", {"spatial": "full"}),
    ("Diagonal", {}),
    ("MiniBlock", {"linear": "row"}),
    ("MiniBlock", {"linear": "col"}),
    ("MiniBlock", {"linear": "row_avg"}),
    ("MiniBlock", {"linear": "col_avg"}),
    ("Shampoo", {}),
]
CONVOLUTION = [
    ("TN", {}),
    ("MiniBlock", {"conv": "kernel"}),
    ("MiniBlock", {"conv": "filter"}),
    ("LNGD", {}),
]


def trace(M: torch.Tensor) -> float:
    return float(torch.trace(M))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("name", "options"), KEEP_TRACE_ALWAYS)
def test_p1_trace_is_kept(name: str, options: dict, T: int, seed: int) -> None:
    """P1: tr F^ = tr F for TKFAC full, TN, LNGD, EKFAC, TEKFAC, diag, mini-blocks (and
    trace-matched Shampoo).
    """
    stats = random_case(seed, T=T)
    assert trace(dense(name, stats, **options)) == pytest.approx(
        trace(dense_fisher(stats)), rel=REL
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_p1_tkfac_expand_keeps_the_trace_at_one_position(seed: int) -> None:
    """P1: tr TKFAC(expand) = tr F for T = 1; for T > 1 it keeps the trace of the expand surrogate
    instead.
    """
    stats = random_case(seed)
    assert trace(dense("TKFAC", stats)) == pytest.approx(trace(dense_fisher(stats)), rel=REL)
    shared = random_case(seed, T=3)
    surrogate = (shared.a.square().sum(-1)[None] * shared.g.square().sum(-1)).sum() / shared.N
    assert trace(dense("TKFAC", shared)) == pytest.approx(float(surrogate), rel=REL)
    assert trace(dense("TKFAC", shared)) != pytest.approx(trace(dense_fisher(shared)), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "options"), CONVOLUTION)
def test_p1_trace_is_kept_on_convolutions(name: str, options: dict, bias: bool, seed: int) -> None:
    """P1: tr F^ = tr F for TN with three modes and for blocks of kernels and filters,
    two groups.
    """
    stats = random_stats(seed, T=3, Q=2, d_out=2, kernel=(2, 1, 2), bias=bias)
    assert trace(dense(name, stats, **options)) == pytest.approx(
        trace(dense_fisher(stats)), rel=REL
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_p2_trace_of_kfac(seed: int) -> None:
    """P2: for T = 1, tr KFAC = tr F - Cov_n(|a_n|^2, |g_n|^2), population covariance."""
    stats = random_case(seed)
    size_a, size_g = stats.a.square().sum((1, 2, 3)), stats.g.square().sum((0, 2, 3, 4))
    covariance = (size_a * size_g).mean() - size_a.mean() * size_g.mean()
    assert abs(covariance) > 1e-3  # otherwise the test says nothing
    expected = torch.trace(dense_fisher(stats)) - covariance
    assert trace(dense("KFAC", stats)) == pytest.approx(float(expected), rel=REL)


def test_p2_fails_with_several_positions() -> None:
    """P2 is about T = 1: with T = 3 the trace of KFAC expand is another number."""
    stats = random_stats(0, T=3)
    size_a, size_g = stats.a.square().sum((1, 2, 3)), stats.g.square().sum((0, 2, 3, 4))
    formula = torch.trace(dense_fisher(stats)) - (
        (size_a * size_g).mean() - size_a.mean() * size_g.mean()
    )
    assert trace(dense("KFAC", stats)) != pytest.approx(float(formula), rel=1e-3)


def test_p3_kpsvd_does_not_keep_the_trace() -> None:
    """P3: for F = diag(1, 1, 1, 0), d_out = d_in = 2, tr KPSVD = 3.0652 > 3 = tr F."""
    P = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    P[0, 0, 0, 0] = P[1, 0, 0, 1] = P[2, 0, 1, 0] = 1.0
    stats = explicit_stats(P)
    assert_same(
        dense_fisher(stats), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    )
    # [[1, 1], [1, 0]] has top eigenvalue phi (the golden ratio) and eigenvector (phi, 1) / sqrt(1 +
    # phi^2)
    phi = (1 + 5**0.5) / 2
    expected = phi * (phi + 1) ** 2 / (1 + phi**2)
    assert expected == pytest.approx(3.0652, abs=5e-5)
    assert trace(dense("KPSVD", stats)) == pytest.approx(expected, rel=REL)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
def test_p4_raw_shampoo_overestimates_the_trace(T: int, seed: int) -> None:
    """P4: the trace of raw Shampoo (c = 1) is at least tr F."""
    stats = random_case(seed, T=T)
    F = dense_fisher(stats)
    assert trace(dense("Shampoo", stats, match_trace=False)) >= trace(F) - 1e-7 * frobenius(F)


def test_p4_equality_for_rank_one_factors() -> None:
    """P4: equality if and only if all factors have rank one, which one gradient of rank
    one gives.
    """
    stats = linear_stats([[1.0, 2.0, -1.0]], [[0.5, -2.0]])
    F = dense_fisher(stats)
    assert trace(dense("Shampoo", stats, match_trace=False)) == pytest.approx(trace(F), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("name", "options"), [("TKFAC", {"spatial": "full"}), ("TN", {})])
def test_p5_partial_traces(name: str, options: dict, T: int, seed: int) -> None:
    """P5: TKFAC (T = 1 or full) and two-mode TN have the partial traces U1 and U2 of F, which
    determine them.
    """
    stats = random_case(seed, T=T)
    P = gradients(stats)[:, :, 0]
    d_out, d_in = P.shape[-2:]
    F = dense_fisher(stats).reshape(d_out, d_in, d_out, d_in)
    assert_same(torch.einsum("aibi->ab", F), left_of(P))  # the partial traces of F are U1 and U2
    assert_same(torch.einsum("aiaj->ij", F), right_of(P))
    approximate = dense(name, stats, **options).reshape(d_out, d_in, d_out, d_in)
    assert_same(torch.einsum("aibi->ab", approximate), left_of(P))
    assert_same(torch.einsum("aiaj->ij", approximate), right_of(P))


@pytest.mark.parametrize("seed", SEEDS)
def test_p5_tkfac_of_one_position(seed: int) -> None:
    """P5 for T = 1: sum |x_r|^2 d_r d_r^T and sum |d_r|^2 x_r x_r^T are the partial traces of
    default TKFAC.
    """
    stats = random_case(seed)
    X, D = columns(stats)
    approximate = dense("TKFAC", stats).reshape(stats.d_out, stats.d_in, stats.d_out, stats.d_in)
    assert_same(torch.einsum("aibi->ab", approximate), (D * X.square().sum(1, keepdim=True)).T @ D)
    assert_same(torch.einsum("aiaj->ij", approximate), (X * D.square().sum(1, keepdim=True)).T @ X)
