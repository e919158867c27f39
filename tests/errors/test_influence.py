"""Standard errors by the infinitesimal jackknife: against finite differences in the weights, and against a bootstrap."""

import math

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import approximations, errors
from fisher_lab.approximations import build
from fisher_lab.diagnose import influence
from fisher_lab.matrices import Dense, LowRank
from fisher_lab.stats import LayerStats
from tests.helpers import random_stats

ERRORS = ["trace", "frobenius", "frobenius_rescaled", "cosine", "spectral"]
CANDIDATES = [
    fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.TEKFAC(), fl.TN(), fl.Shampoo(), fl.KPSVD(), fl.Diagonal(), fl.LNGD(),
    fl.MiniBlock(), fl.MiniBlock(linear="col"), fl.MiniBlock(linear="row_avg"),
]  # fmt: skip


def replicated(stats: LayerStats, copies: int, extra: int) -> LayerStats:
    """Every example `copies` times, one of them once more: weights moved by 1 / (N copies + 1) towards it."""
    index = torch.cat([torch.arange(stats.N).repeat(copies), torch.tensor([extra])])
    return stats.like(stats.a[index], stats.g[:, index])


def error_values(stats: LayerStats, approximation: approximations.Approximation) -> dict[str, float]:
    pair = errors.Pair(Dense(stats.dense(), stats.shape), build(approximation, stats))
    return {m.name: m.formula(pair).value for m in errors.chosen(ERRORS)}


def influences(stats: LayerStats, approximation: approximations.Approximation) -> dict[str, torch.Tensor]:
    exact = LowRank(stats)
    pair = errors.Pair(exact, build(approximation, stats))
    quantities = influence.of_pair(stats, pair, approximation, influence.of_exact(stats, exact), True)
    assert quantities is not None
    return {m.name: influence.of_error(m, pair, quantities) for m in errors.chosen(ERRORS)}


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("approximation", CANDIDATES, ids=lambda a: a.label)
def test_influences_are_derivatives_in_the_weights(approximation: approximations.Approximation, T: int) -> None:
    stats = random_stats(3, "relu", N=7, T=T, R=2, d_out=3, d_in=4)
    found = influences(stats, approximation)
    here = error_values(stats, approximation)
    copies = 3000
    for n in (0, 4):
        there = error_values(replicated(stats, copies, n), approximation)
        for name in ERRORS:
            slope = (there[name] - here[name]) * (stats.N * copies + 1)
            tolerance = 5e-3 * (abs(slope) + float(found[name].abs().max())) + 1e-6
            assert abs(float(found[name][n]) - slope) < tolerance, (name, float(found[name][n]), slope)


def test_the_fixed_matrix_of_a_user_moves_only_with_the_exact_block() -> None:
    stats = random_stats(5, N=6, R=2, d_out=2, d_in=3)
    exact, matrix = LowRank(stats), build(fl.KFAC(), stats)
    pair = errors.Pair(exact, matrix)
    found = influence.of_pair(stats, pair, None, influence.of_exact(stats, exact), True)
    assert found is not None
    assert not found["trace_approx"].any()
    assert not found["square_approx"].any()
    assert found["inner"].any()
