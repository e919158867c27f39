"""Pinchings F^ = sum_i P_i F P_i with orthogonal projectors P_i: EKFAC, TEKFAC, diagonal,
mini-blocks (P6-P8).
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    SLACK,
    assert_psd,
    dense,
    dense_fisher,
    frobenius,
    gradients,
    lambda_max,
    linear_stats,
    random_case,
    random_stats,
    spectral,
)
from tests.naive import left_of, right_of

SEEDS = range(9)
PINCHINGS = [
    ("EKFAC", {}),
    ("TEKFAC", {}),
    ("Diagonal", {}),
    ("MiniBlock", {"linear": "row"}),
    ("MiniBlock", {"linear": "col"}),
]
CONVOLUTION = [
    ("MiniBlock", {"conv": "kernel"}),
    ("MiniBlock", {"conv": "filter"}),
    ("EKFAC", {}),
    ("Diagonal", {}),
]


def cases() -> list:
    """Every pinching on plain layers (T = 1 and T = 3), and those of convolutions (two groups,
    bias).
    """
    plain = [
        pytest.param(
            name,
            options,
            lambda T=T, seed=seed: random_case(seed, T=T),
            id=f"{name}{options}-T{T}-{seed}",
        )
        for name, options in PINCHINGS
        for T in (1, 3)
        for seed in SEEDS
    ]

    def convolution(seed: int):
        return random_stats(
            seed, "relu", T=3, Q=2, N=4, d_out=2, kernel=(2, 1, 2), bias=seed % 2 == 0
        )

    return plain + [
        pytest.param(
            name, options, lambda seed=seed: convolution(seed), id=f"{name}{options}-conv-{seed}"
        )
        for name, options in CONVOLUTION
        for seed in range(4)
    ]


def number_of_blocks(name: str, options: dict, stats) -> int:
    """How many projectors the pinching has."""
    d = stats.Q * stats.d_out * stats.d_in
    convolution = stats.kernel is not None and len(stats.kernel) > 1
    if name != "MiniBlock":
        return d
    if convolution:
        kernels = stats.kernel[0] + (1 if stats.bias else 0)
        return stats.Q * stats.d_out * (kernels if options["conv"] == "kernel" else 1)
    return stats.d_out if options["linear"] == "row" else stats.d_in


@pytest.mark.parametrize(("name", "options", "make"), cases())
def test_p6_pythagoras(name: str, options: dict, make) -> None:
    """P6: |F - F^|^2 = |F|^2 - |F^|^2: a pinching is the orthogonal projection of F on a linear
    subspace.
    """
    stats = make()
    F, approximate = dense_fisher(stats), dense(name, stats, **options)
    norm = frobenius(F) ** 2
    expected = norm - frobenius(approximate) ** 2
    assert frobenius(F - approximate) ** 2 == pytest.approx(expected, rel=1e-9, abs=1e-12 * norm)


@pytest.mark.parametrize(("name", "options", "make"), cases())
def test_p7_eigenvalues_are_majorised(name: str, options: dict, make) -> None:
    """P7: PSD; partial sums of ordered eigenvalues are at most those of F; log det(F^ + c) >= log
    det(F + c).
    """
    stats = make()
    F, approximate = dense_fisher(stats), dense(name, stats, **options)
    slack = SLACK * frobenius(F)
    assert_psd(approximate)
    ordered = [torch.linalg.eigvalsh(M).flip(0).cumsum(0) for M in (F, approximate)]
    assert bool((ordered[1] <= ordered[0] + slack).all())
    # majorised, not only sub-majorised
    assert float(ordered[0][-1]) == pytest.approx(float(ordered[1][-1]), rel=1e-9)
    shift = 0.1 * torch.eye(len(F), dtype=F.dtype) * torch.trace(F) / len(F)
    assert torch.logdet(approximate + shift) >= torch.logdet(F + shift) - 1e-9


@pytest.mark.parametrize(("name", "options", "make"), cases())
def test_p7_bounds_with_the_number_of_blocks(name: str, options: dict, make) -> None:
    """P7: with m blocks F <= m F^, so lambda_max(F - F^) <= (1 - 1/m) lambda_max(F); and |F - F^|_2
    <= |F|_2.
    """
    stats = make()
    F, approximate = dense_fisher(stats), dense(name, stats, **options)
    m, slack = number_of_blocks(name, options, stats), SLACK * frobenius(F)
    assert_psd(m * approximate - F, scale=frobenius(F))
    assert lambda_max(F - approximate) <= (1 - 1 / m) * lambda_max(F) + slack
    assert spectral(F - approximate) <= spectral(F) + slack


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
def test_p8_largest_eigenvalue_of_tkfac(T: int, seed: int) -> None:
    """P8: lambda_max(TKFAC) <= min(lambda_max(U1), lambda_max(U2)) <= tr F, for T = 1 or spatial =
    full.
    """
    stats = random_case(seed, T=T)
    F, P = dense_fisher(stats), gradients(stats)[:, :, 0]
    bound = min(lambda_max(left_of(P)), lambda_max(right_of(P)))
    assert lambda_max(dense("TKFAC", stats, spatial="full")) <= bound + SLACK * frobenius(F)
    assert bound <= float(torch.trace(F)) + SLACK * frobenius(F)


def test_p8_kfac_has_no_such_bound() -> None:
    """P8: lambda_max(KFAC) can exceed tr F by any factor, when large inputs meet small
    gradients.
    """
    stats = linear_stats([[10.0, 0.0], [0.1, 0.0]], [[0.1, 0.0], [10.0, 0.0]])
    F = dense_fisher(stats)
    assert float(torch.trace(F)) == pytest.approx(1.0)
    assert lambda_max(dense("KFAC", stats)) == pytest.approx(50.005**2)
