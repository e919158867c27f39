"""Every approximation is, densely, the transcription of its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from fisher_lab.statistics import LayerStats
from tests import helpers, naive
from tests.helpers import (
    assert_psd,
    assert_same,
    dense,
    dense_fisher,
    explicit_stats,
    gradients,
    random_stats,
)

# approximation, options, naive transcription
TABLE: list[tuple[str, dict, Callable[..., Tensor]]] = [
    ("KFAC", {}, naive.naive_kfac),
    ("KFAC", {"spatial": "reduce"}, naive.naive_kfac),
    ("EKFAC", {}, naive.naive_ekfac),
    ("EKFAC", {"spatial": "reduce"}, naive.naive_ekfac),
    ("TKFAC", {}, naive.naive_tkfac),
    ("TKFAC", {"spatial": "full"}, naive.naive_tkfac),
    ("TEKFAC", {}, naive.naive_tekfac),
    ("TEKFAC", {"spatial": "full"}, naive.naive_tekfac),
    ("TN", {}, naive.naive_tn),
    ("MiniBlock", {}, naive.naive_mini_block),
    ("MiniBlock", {"linear": "col"}, naive.naive_mini_block),
    ("MiniBlock", {"linear": "row_avg"}, naive.naive_mini_block),
    ("MiniBlock", {"linear": "col_avg"}, naive.naive_mini_block),
    ("MiniBlock", {"conv": "filter"}, naive.naive_mini_block),
    ("TENGraD", {}, naive.naive_tengrad),
    ("TENGraD", {"batch": 3}, naive.naive_tengrad),
    ("TENGraD", {"batch": 3, "spatial": "reduce_sum"}, naive.naive_tengrad),
    ("TENGraD", {"spatial": "reduce_mean"}, naive.naive_tengrad),
    ("Shampoo", {}, naive.naive_shampoo),
    ("Shampoo", {"match_trace": False}, naive.naive_shampoo),
    ("KPSVD", {}, naive.naive_kpsvd),
    ("Diagonal", {}, naive.naive_diagonal),
    ("LNGD", {}, naive.naive_lngd),
    ("Exact", {}, lambda stats: dense_fisher(stats)),
]
IDS = [name + ",".join(f" {k}={v}" for k, v in options.items()) for name, options, _ in TABLE]
EVERY = pytest.mark.parametrize(("name", "options", "naive"), TABLE, ids=IDS)

SETTINGS = {
    "T = 1": {},
    "T = 3": {"T": 3},
    "two groups": {"Q": 2},
    "T = 3, two groups": {"T": 3, "Q": 2},
    "bias": {"kernel": (2,), "bias": True},
    "d_out = 1": {"d_out": 1},
    "d_in = 1": {"d_in": 1},
    "d_out = d_in = 1": {"d_out": 1, "d_in": 1},
    "d_out = 1, T = 3": {"d_out": 1, "T": 3},
    "one example": {"N": 1, "R": 3},
    "one column": {"N": 1, "R": 1},
}
CONVOLUTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "two groups": {"Q": 2},
    "two groups, bias": {"Q": 2, "bias": True},
    "one channel out": {"d_out": 1, "bias": True},
    "one position": {"T": 1},
}


def check(name: str, options: dict, naive: Callable[..., Tensor], stats: LayerStats) -> None:
    """Compare one approximation with its formula."""
    got = dense(name, stats, **options)
    assert_psd(got)
    # a root of a singular matrix turns rounding 1e-16 into 1e-8
    assert_same(got, naive(stats, **options), 1e-6 if name == "Shampoo" else 1e-8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("setting", SETTINGS)
@EVERY
def test_definition(
    name: str, options: dict, naive: Callable[..., Tensor], setting: str, seed: int
) -> None:
    """Definition: dense() equals the formula, per group (T = 1, T = 3, Q = 2, sides of size one, N
    = 1).
    """
    sizes = {"N": 6, "R": 2, "d_out": 3, "d_in": 2, **SETTINGS[setting]}
    check(name, options, naive, random_stats(seed, helpers.KINDS[seed % 3], **sizes))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", CONVOLUTIONS)
@EVERY
def test_definition_on_convolutions(
    name: str, options: dict, naive: Callable[..., Tensor], setting: str, seed: int
) -> None:
    """Definition on convolutions: three modes for TN, kernel blocks; the bias is a part of its own
    there.
    """
    sizes = {"N": 12, "R": 2, "T": 3, "d_out": 2, "kernel": (2, 1, 2), **CONVOLUTIONS[setting]}
    check(name, options, naive, random_stats(seed, helpers.KINDS[seed % 2], **sizes))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("modes", [None, 2, 3, 4, 5])
def test_definition_of_modes(modes: int | None, bias: bool, seed: int) -> None:
    """Definition: TN with any number of modes; a weight with fewer uses its own."""
    stats = random_stats(seed, d_out=3, T=2, kernel=(2, 2, 3), bias=bias)
    assert_same(dense("TN", stats, modes=modes), naive.naive_tn(stats, modes))
    plain = random_stats(seed, d_out=3, T=2, kernel=(4,), bias=bias)
    assert_same(dense("TN", plain, modes=modes), naive.naive_tn(plain))


@pytest.mark.parametrize("seed", range(3))
@EVERY
def test_definition_from_explicit_gradients(
    name: str, options: dict, naive: Callable[..., Tensor], seed: int
) -> None:
    """Definition: methods that need P only give the same matrix from explicit gradients; the others
    refuse them.
    """
    stats = random_stats(seed, N=6, T=1, d_out=3, d_in=2)
    explicit = explicit_stats(gradients(stats)[:, :, 0])
    if name in ("KFAC", "EKFAC"):
        with pytest.raises((ValueError, TypeError)):
            dense(name, explicit, **options)
        return
    check(name, options, lambda _, **kwargs: naive(stats, **kwargs), explicit)
