"""What a change of scale, of coordinates or of the examples does to an approximation (P26-P29)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisher_lab.statistics import LayerStats, contractions
from tests.helpers import (
    assert_differs,
    assert_same,
    dense,
    dense_fisher,
    frobenius,
    random_orthogonal,
    random_stats,
)
from tests.naive import kron

SEEDS = range(6)
FUNCTIONS_OF_F = [
    ("TKFAC", {}),
    ("TEKFAC", {}),
    ("TN", {}),
    ("KPSVD", {}),
    ("Shampoo", {}),
    ("Shampoo", {"match_trace": False}),
    ("LNGD", {}),
    ("Diagonal", {}),
    ("MiniBlock", {"linear": "row"}),
    ("MiniBlock", {"linear": "col"}),
    ("MiniBlock", {"linear": "row_avg"}),
    ("MiniBlock", {"linear": "col_avg"}),
    ("TENGraD", {}),
]
SHARED = [("TKFAC", {"spatial": "full"}), ("TEKFAC", {"spatial": "full"}), *FUNCTIONS_OF_F[2:]]
ALL = [
    *FUNCTIONS_OF_F,
    ("KFAC", {}),
    ("KFAC", {"spatial": "reduce"}),
    ("EKFAC", {}),
    ("TKFAC", {"spatial": "full"}),
]


def rescaled(stats: LayerStats, s: Tensor) -> LayerStats:
    """a_n / s_n and s_n g_n: the same gradients from other factors."""
    return LayerStats(stats.a / s[:, None, None, None], stats.g * s[None, :, None, None, None])


def scales(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


# ---------------------------------------------------------------- P26


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options"), FUNCTIONS_OF_F)
def test_p26_rescaling_within_examples(name: str, options: dict, seed: int) -> None:
    """P26: a -> a/s_n, g -> s_n g leaves F and every function of F unchanged (T = 1)."""
    stats = random_stats(seed, N=8, d_out=3, d_in=3)
    other = rescaled(stats, scales(8, seed))
    assert_same(dense_fisher(other), dense_fisher(stats))
    assert_same(dense(name, other, **options), dense(name, stats, **options), 1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options"), SHARED)
def test_p26_with_several_positions(name: str, options: dict, seed: int) -> None:
    """P26 for T = 3, where TKFAC is a function of F only with spatial = full; scales may differ by
    position.
    """
    stats = random_stats(seed, N=8, T=3, d_out=3, d_in=3)
    s = scales(24, seed).reshape(8, 3, 1, 1)
    other = LayerStats(stats.a / s, stats.g * s[None])
    assert_same(dense_fisher(other), dense_fisher(stats))
    assert_same(dense(name, other, **options), dense(name, stats, **options), 1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "rel"), [("KFAC", 0.05), ("EKFAC", 1e-3)])
def test_p26_changes_kfac(name: str, rel: float, seed: int) -> None:
    """P26: KFAC and EKFAC are not functions of F: the same rescaling changes them."""
    stats = random_stats(seed, N=8, d_out=3, d_in=3)
    assert_differs(dense(name, rescaled(stats, scales(8, seed))), dense(name, stats), rel)


# ---------------------------------------------------------------- P27

ORTHOGONAL = ("orthogonal", "orthogonal")
EQUIVARIANT = [
    ("KFAC", {}, ("general", "general")),
    ("Exact", {}, ("general", "general")),
    ("TENGraD", {}, ("general", "general")),
    ("EKFAC", {}, ORTHOGONAL),
    ("TKFAC", {}, ORTHOGONAL),
    ("TEKFAC", {}, ORTHOGONAL),
    ("KPSVD", {}, ORTHOGONAL),
    ("TN", {}, ORTHOGONAL),
    ("Shampoo", {}, ORTHOGONAL),
    ("MiniBlock", {"linear": "row"}, ("scaled permutation", "general")),
    ("MiniBlock", {"linear": "col"}, ("general", "scaled permutation")),
    ("MiniBlock", {"linear": "row_avg"}, ("orthogonal", "general")),
    ("MiniBlock", {"linear": "col_avg"}, ("general", "orthogonal")),
    ("Diagonal", {}, ("scaled permutation", "scaled permutation")),
    ("LNGD", {}, ("signed permutation", "orthogonal")),
]
NOT_EQUIVARIANT = [
    ("EKFAC", {}, ("general", "general")),
    ("TKFAC", {}, ("general", "general")),
    ("TEKFAC", {}, ("general", "general")),
    ("KPSVD", {}, ("general", "general")),
    ("TN", {}, ("general", "general")),
    ("Shampoo", {}, ("general", "general")),
    ("MiniBlock", {"linear": "row"}, ("orthogonal", "identity")),
    ("MiniBlock", {"linear": "row_avg"}, ("general", "identity")),
    ("Diagonal", {}, ("identity", "orthogonal")),
    ("Diagonal", {}, ("orthogonal", "identity")),
    ("LNGD", {}, ("orthogonal", "identity")),
    ("LNGD", {}, ("identity", "general")),
]


def transformation(kind: str, n: int, seed: int) -> Tensor:
    """A random invertible `[n, n]` of the named kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if kind == "identity":
        return torch.eye(n, dtype=torch.float64)
    if kind == "orthogonal":
        return random_orthogonal(n, seed)
    if kind == "general":
        return noise + 2 * torch.eye(n, dtype=torch.float64)
    permutation = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return permutation * (
        noise[0].sign() if kind == "signed permutation" else noise[0] + noise[0].sign()
    )


def transformed(
    stats: LayerStats, name: str, options: dict, kinds: tuple[str, str], seed: int
) -> tuple[Tensor, Tensor]:
    """(approximation in new coordinates, old approximation carried over)."""
    Q, P = (
        transformation(kinds[0], stats.d_out, seed),
        transformation(kinds[1], stats.d_in, seed + 50),
    )
    other = LayerStats(stats.a @ P.T, stats.g @ Q.T, stats.kernel)
    change = kron(Q, P)
    assert_same(dense_fisher(other), change @ dense_fisher(stats) @ change.T)
    return dense(name, other, **options), change @ dense(name, stats, **options) @ change.T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("name", "options", "kinds"), EQUIVARIANT)
def test_p27_equivariance(
    name: str, options: dict, kinds: tuple[str, str], T: int, seed: int
) -> None:
    """P27: x -> P x, d -> Q d carries F^ to (Q (x) P) F^ (Q (x) P)^T, for the transformations of
    the master table.
    """
    stats = random_stats(seed, N=8, T=T, d_out=3, d_in=4)
    got, expected = transformed(stats, name, options, kinds, seed)
    assert_same(got, expected, 1e-8)


@pytest.mark.parametrize(("name", "options", "kinds"), NOT_EQUIVARIANT)
def test_p27_not_equivariant(name: str, options: dict, kinds: tuple[str, str]) -> None:
    """P27: outside of its column of the master table the equivariance fails visibly."""
    got, expected = transformed(random_stats(0, N=8, d_out=3, d_in=4), name, options, kinds, 0)
    assert_differs(got, expected, 0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_p27_kernel_blocks_and_modes(seed: int) -> None:
    """P27 on a convolution: kernel blocks carry over P = I (x) P_k, three-mode TN rotations of
    every mode.
    """
    stats = random_stats(seed, N=8, T=3, d_out=2, kernel=(2, 1, 3))
    Q, channels, area = (
        random_orthogonal(2, seed),
        random_orthogonal(2, seed + 1),
        random_orthogonal(3, seed + 2),
    )
    general = transformation("general", 3, seed)
    eye = torch.eye(2, dtype=torch.float64)
    for name, Q_out, P in [("MiniBlock", eye, kron(eye, general)), ("TN", Q, kron(channels, area))]:
        other = LayerStats(stats.a @ P.T, stats.g @ Q_out.T, stats.kernel)
        change = kron(Q_out, P)
        assert_same(dense(name, other), change @ dense(name, stats) @ change.T, 1e-9)


# ---------------------------------------------------------------- P28


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_p28_homogeneity_and_order_of_examples(name: str, options: dict, T: int, seed: int) -> None:
    """P28: scaling F by c scales F^ by c, and the order of the examples is nothing."""
    stats = random_stats(seed, "norm-dependent", N=7, T=T, d_out=3, d_in=4)
    before, c = dense(name, stats, **options), 37.0
    assert_same(dense(name, LayerStats(stats.a, stats.g * c**0.5), **options), c * before, 1e-8)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_same(dense(name, LayerStats(stats.a[order], stats.g[:, order]), **options), before, 1e-8)


# ---------------------------------------------------------------- P29


def halves(
    seed: int, T: int, kind: str = "norm-dependent"
) -> tuple[LayerStats, LayerStats, LayerStats]:
    """(all 8 examples, the first 3, the last 5)."""
    stats = random_stats(seed, kind, N=8, T=T, d_out=3, d_in=2)
    return stats, *(
        LayerStats(stats.a[part], stats.g[:, part]) for part in (slice(0, 3), slice(3, 8))
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Exact", {}),
        ("Diagonal", {}),
        ("MiniBlock", {"linear": "row"}),
        ("MiniBlock", {"linear": "col"}),
        ("MiniBlock", {"linear": "row_avg"}),
        ("MiniBlock", {"linear": "col_avg"}),
    ],
)
def test_p29_additive_matrices(name: str, options: dict, T: int, seed: int) -> None:
    """P29: diagonal and mini-blocks (matrices linear in F) are additive over examples."""
    together, first, second = halves(seed, T)
    mixed = 3 / 8 * dense(name, first, **options) + 5 / 8 * dense(name, second, **options)
    assert_same(dense(name, together, **options), mixed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3])
def test_p29_additive_contractions(T: int, seed: int) -> None:
    """P29: U1, U2 and the squares in a fixed basis are additive over examples."""
    together, first, second = halves(seed, T)
    basis = (random_orthogonal(3, seed)[None], random_orthogonal(2, seed)[None])
    for contraction in (
        contractions.left,
        contractions.right,
        lambda stats: contractions.squares(stats, basis),
    ):
        assert_same(
            contraction(together)[0], 3 / 8 * contraction(first)[0] + 5 / 8 * contraction(second)[0]
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["KFAC", "TKFAC", "TN", "KPSVD", "EKFAC", "LNGD", "Shampoo"])
def test_p29_products_are_not_additive(name: str, seed: int) -> None:
    """P29: Kronecker products are not additive: average the factors, never the products."""
    together, first, second = halves(seed, 1, "independent")
    mixed = 3 / 8 * dense(name, first) + 5 / 8 * dense(name, second)
    assert frobenius(mixed - dense(name, together)) > 1e-3 * frobenius(mixed)
