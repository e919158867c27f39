"""Matrix-free quantities against dense formulas; totals; noise floors; cancellation; equal
matrices; routes.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab import errors
from fisher_lab._ground.linalg import Lanczos, lanczos
from fisher_lab.approximations import build, default_approximations
from fisher_lab.errors import Pair, total
from fisher_lab.matrices import Dense, Kronecker, LowRank
from fisher_lab.matrices.centred import kronecker_difference
from fisher_lab.statistics import LayerStats, Sums, contractions
from tests.helpers import random_stats

SHAPES = {
    "linear": {"N": 9, "R": 3, "d_out": 4, "d_in": 5},
    "positions": {"N": 4, "T": 6, "R": 2, "d_out": 3, "d_in": 4},
    "few positions, large weight": {"N": 4, "T": 2, "R": 2, "d_out": 12, "d_in": 11},
    "groups": {"N": 4, "T": 3, "Q": 2, "R": 2, "d_out": 3, "d_in": 4},
    "convolution": {"N": 5, "T": 4, "R": 2, "d_out": 3, "kernel": (2, 2, 2), "bias": True},
}


@pytest.fixture(params=SHAPES)
def stats(request: pytest.FixtureRequest) -> LayerStats:
    return random_stats(4, "relu", **SHAPES[request.param])


DEFAULTS = [m for m in errors.chosen("default") if not m.damped]  # of a pair of matrices alone


def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the routes of large layers on small ones, in many pieces."""
    monkeypatch.setattr("fisher_lab.errors.pair.DENSE_DIM", 0)
    monkeypatch.setattr("fisher_lab.statistics.pieces.CHUNK_BYTES", 1500)
    monkeypatch.setattr("fisher_lab.statistics.pieces.STREAM_BYTES", 700)
    monkeypatch.setattr("fisher_lab.statistics.pieces.KEPT_BYTES", 6000)


def dense_errors(F: Tensor, A: Tensor) -> dict[str, float]:
    """Every undamped measure from its definition."""
    D = A - F
    cosine = float((A * F).sum() / (A.norm() * F.norm()))
    return {
        "trace": float((A.trace() - F.trace()) / F.trace()),
        "trace_ratio": float(A.trace() / F.trace()),
        "frobenius": float(D.norm() / F.norm()),
        "frobenius_rescaled": math.sqrt(max(0.0, 1 - cosine**2)),
        "cosine": cosine,
        "spectral": float(torch.linalg.eigvalsh(D).abs().max() / torch.linalg.eigvalsh(F).max()),
    }


@pytest.mark.parametrize("held", [False, True])
def test_every_default_error_equals_its_dense_definition(
    stats: LayerStats, held: bool, monkeypatch
) -> None:
    large(monkeypatch)
    sums = Sums(stats)
    if held:
        sums.form_gradients(1e9)
    exact = LowRank(sums)
    F = contractions.dense(stats)
    made = {a.label: build(a, sums) for a in default_approximations()}
    pairs = errors.pairs(exact, made)
    errors.advance(pairs.values(), 1e6)
    for label, pair in pairs.items():
        expected = dense_errors(F, made[label].dense())
        for m in DEFAULTS:
            value, noise = m.formula(pair)
            slack = 2e-3 if m.name == "spectral" else 2e-7
            assert abs(value - expected[m.name]) < slack * (1 + abs(expected[m.name])) + noise, (
                label,
                m.name,
            )


def test_totals_are_those_of_the_block_diagonal_matrix() -> None:
    layers = [random_stats(seed, N=5, R=2, d_out=2 + seed, d_in=3) for seed in range(3)]
    pairs = [Pair(LowRank(s), build(fl.KFAC(), s)) for s in layers]
    needed = [name for m in DEFAULTS for name in m.needs]
    together = total(pair.asked(needed) for pair in pairs)
    F = torch.block_diag(*(contractions.dense(s) for s in layers))
    A = torch.block_diag(*(pair.approx.dense() for pair in pairs))
    for name, value in dense_errors(F, A).items():
        assert math.isclose(errors.MEASURES[name].formula(together).value, value, rel_tol=1e-9), (
            name
        )


def test_equal_matrices_share_one_pair() -> None:
    stats = random_stats(0, N=6, R=2, d_out=3, d_in=4)
    pairs = errors.pairs(
        LowRank(stats), {a.label: build(a, stats) for a in (fl.TKFAC(), fl.KFAC(), fl.TN())}
    )
    assert pairs["TKFAC"] is pairs["TN"]
    assert pairs["TKFAC"] is not pairs["KFAC"]


def test_a_sub_sample_of_the_columns_is_recognised_and_only_then() -> None:
    stats = random_stats(0, N=8, R=2, d_out=3, d_in=4)
    part = build(fl.TENGraD(batch=3), stats)
    X = torch.randn(*stats.shape, dtype=torch.float64)
    expected = LowRank(stats) @ X - part @ X
    assert torch.allclose(LowRank(stats).minus(part)(X), expected)
    copied = LowRank(stats.like(stats.a[:3].clone(), 2 * stats.g[:, :3]))
    assert torch.allclose(LowRank(stats).minus(copied)(X), LowRank(stats) @ X - copied @ X)


# -- cancellation ----------------------------------------------------------------------------------
def nearly_kronecker(distance: float, N: int = 6) -> LayerStats:
    """Columns whose block is a Kronecker product up to about `distance`: equal g for all examples,
    but for a little.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, 1, 1, 5, dtype=torch.float64, generator=generator)
    g = (
        torch.randn(3, 1, 1, 1, 4, dtype=torch.float64, generator=generator)
        .expand(3, N, 1, 1, 4)
        .clone()
    )
    return LayerStats(
        a, g + distance * torch.randn(g.shape, dtype=torch.float64, generator=generator)
    )


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize(
    "approximation", [fl.KFAC(), fl.TKFAC(), fl.KPSVD(), fl.LNGD()], ids=lambda a: a.label
)
def test_centred_features_do_not_cancel(distance: float, approximation: fl.Approximation) -> None:
    stats = nearly_kronecker(distance)
    matrix = build(approximation, stats)
    assert isinstance(matrix, Kronecker)
    G, A = (f[0] if f.ndim == 3 else f[0].diag() for f in matrix.factors)
    F = contractions.dense(stats)
    expected = float((F - torch.kron(G.contiguous(), A.contiguous())).norm())
    found = math.sqrt(max(0.0, kronecker_difference(stats, G, A)))
    assert abs(found - expected) < 1e-6 * expected + 2e-15 * float(F.norm())


@pytest.mark.parametrize("distance", [1e-5, 1e-7, 1e-10, 0.0])
def test_a_tiny_error_is_right_within_its_floor_where_the_expansion_sees_nothing(
    distance: float, monkeypatch
) -> None:
    large(monkeypatch)
    stats = nearly_kronecker(distance)
    matrix = build(fl.KFAC(), stats)
    F = contractions.dense(stats)
    expected = float((F - matrix.dense()).norm() / F.norm())
    value, noise = errors.MEASURES["frobenius"].formula(Pair(LowRank(stats), matrix))
    assert noise < 1e-13 or noise < 1e-2 * expected
    assert abs(value - expected) < max(1e-5 * expected, 4 * noise)


def test_where_nothing_better_is_allowed_the_floor_of_the_expansion_is_stated(monkeypatch) -> None:
    large(monkeypatch)
    monkeypatch.setattr("fisher_lab.errors.pair.DIRECT_FLOPS", 0)
    stats = nearly_kronecker(1e-10)
    value, noise = errors.MEASURES["frobenius"].formula(
        Pair(LowRank(stats), build(fl.KFAC(), stats))
    )
    assert value == 0 or noise > 1e-9
    assert noise < 1e-6


# -- Lanczos ---------------------------------------------------------------------------------------
def test_lanczos_finds_the_dominating_end_within_its_residual_and_its_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=generator))[0]
    values = torch.linspace(-3, 2, 300, dtype=torch.float64)
    M = (Q * values) @ Q.T
    run = Lanczos(torch.randn(300, dtype=torch.float64, generator=generator), 1e-6)
    while run.found is None:
        run.feed(M @ run.vector)
    assert abs(run.found.norm - 3) <= run.found.residual + 1e-12
    assert float((M @ run.ritz_vector + 3 * run.ritz_vector).norm()) < 1e-4
    ends = lanczos(lambda v: M @ v, torch.ones(300, dtype=torch.float64), 1e-3)
    assert abs(ends.norm - 3) <= ends.residual


def test_the_route_of_every_exact_block_is_reported() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 20), nn.Linear(20, 2)
    ).eval()
    x = torch.randn(4, 2, 6, 6)
    found = fl.compare(model, nn.CrossEntropyLoss(), x, [fl.KFAC()]).settings["layers"]
    assert {name: about["route"] for name, about in found.items()} == {
        "0": "dense", "3": "columns", "4": "dense",
    }  # fmt: skip
    wide = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 2)).eval()
    about = fl.compare(
        wide, nn.CrossEntropyLoss(), torch.randn(4, 8, 6, 6), [fl.KFAC()], layers=["0"]
    )
    assert about.settings["layers"]["0"]["route"] == "columns, gradients formed once"


def test_exact_block_of_pieces_equals_that_of_one_batch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 40), nn.Linear(40, 3)
    ).eval()
    x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    names = ["trace", "frobenius", "spectral"]
    whole = fl.compare(model, nn.CrossEntropyLoss(), x, errors=names)
    chosen = [a for a in default_approximations() if a.label != "TENGraD"]
    pieces = fl.compare(
        model,
        nn.CrossEntropyLoss(),
        list(x.split(5)),
        chosen,
        errors=["trace", "frobenius", "spectral"],
    )
    for row in pieces.rows:
        value = whole.value(row.layer, row.approximation, row.error)
        slack = 2e-3 if row.error == "spectral" else 1e-8
        assert abs(row.value - value) < slack * (1 + abs(value)) + row.noise, row


def test_dense_and_low_rank_exact_blocks_give_the_same(stats: LayerStats) -> None:
    approximation = build(fl.KFAC(), stats)
    one = Pair(Dense(contractions.dense(stats), stats.shape), approximation)
    two = Pair(LowRank(stats), approximation)
    for m in DEFAULTS:
        assert math.isclose(m.formula(one).value, m.formula(two).value, rel_tol=1e-8, abs_tol=1e-12)
