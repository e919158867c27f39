"""Every contraction against its naive form on every route: few and many examples, positions,
groups, P formed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisher_lab.statistics import LayerStats, Sums, contractions
from tests.helpers import dense_fisher, explicit_stats, gradients, random_orthogonal, random_stats
from tests.naive import kfac_factors, tkfac_factors, unfold

SHAPES = {
    "linear": {"N": 9, "R": 3, "d_out": 4, "d_in": 5},
    "linear, one direction": {"N": 9, "R": 1, "d_out": 4, "d_in": 5},
    "linear, many outputs": {"N": 9, "R": 2, "d_out": 9, "d_in": 3},
    "positions": {"N": 4, "T": 6, "R": 2, "d_out": 3, "d_in": 4},
    "many positions, one direction": {"N": 3, "T": 9, "R": 1, "d_out": 2, "d_in": 2},
    "few positions, large weight": {"N": 4, "T": 2, "R": 2, "d_out": 12, "d_in": 11},
    "groups": {"N": 4, "T": 3, "Q": 2, "R": 2, "d_out": 3, "d_in": 4},
    "groups, one position": {"N": 4, "T": 1, "Q": 2, "R": 2, "d_out": 3, "d_in": 4},
    "convolution": {"N": 5, "T": 4, "R": 2, "d_out": 3, "kernel": (2, 2, 2), "bias": True},
}
FORMS = ("factors", "factors, P formed", "P alone")


@pytest.fixture(params=SHAPES)
def factors(request) -> LayerStats:
    """Statistics as inputs and output gradients."""
    return random_stats(4, "relu", **SHAPES[request.param])


@pytest.fixture(params=FORMS)
def stats(request, factors: LayerStats) -> LayerStats:
    """The same in each of the forms that they come in."""
    if request.param == "factors":
        return factors
    if request.param == "factors, P formed":
        return factors.with_gradients()
    return LayerStats.of_gradients(gradients(factors), factors.kernel, factors.bias)


@pytest.fixture(params=["whole", "in pieces"], autouse=True)
def pieces(request, monkeypatch) -> None:
    """Sums in one piece, and in so many that most hold one example."""
    if request.param == "in pieces":
        monkeypatch.setattr("fisher_lab.statistics.pieces.CHUNK_BYTES", 1500)
        monkeypatch.setattr("fisher_lab.statistics.pieces.STREAM_BYTES", 700)
        monkeypatch.setattr("fisher_lab.statistics.pieces.KEPT_BYTES", 6000)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def symmetric(Q: int, n: int) -> Tensor:
    M = torch.randn(Q, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return M + M.mT


def arrays(stats: LayerStats, many: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(many, *stats.shape, generator=generator, dtype=torch.float64)


# -- the noun --------------------------------------------------------------------------------------
def test_gradients_are_sums_over_positions(stats: LayerStats, factors: LayerStats) -> None:
    P = gradients(factors)
    assert_equal(stats.gradients(), P)
    assert_equal(torch.cat([*stats.per_example()], 1), P)
    some = slice(1, 3)
    assert_equal(stats.examples(some).gradients(), P[:, some])
    assert_equal(stats.inputs(some).gradients(), P[..., some])


def test_rotated_gradients(factors: LayerStats) -> None:
    Q, o, i = factors.Q, factors.d_out, factors.d_in
    left = torch.stack([random_orthogonal(o, q) for q in range(Q)])
    right = torch.stack([random_orthogonal(i, q) for q in range(Q)])
    P = gradients(factors)
    assert_equal(factors.rotated(left, right).gradients(), left.mT @ P @ right)
    assert_equal(factors.rotated(None, None).gradients(), P)


def test_factors_are_refused_where_only_their_products_are_known() -> None:
    stats = explicit_stats(torch.randn(3, 2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="explicit gradients"):
        stats.factors()


# -- products --------------------------------------------------------------------------------------
@pytest.mark.parametrize("many", [1, 5])
def test_products(stats: LayerStats, factors: LayerStats, many: int) -> None:
    P = gradients(factors).flatten(2, 3)  # [R, N, rows, d_in]
    X = arrays(stats, many)
    s = torch.einsum("rnoi,boi->brn", P, X)
    assert_equal(contractions.project(stats, X), s)
    assert_equal(contractions.combine(stats, s), torch.einsum("brn,rnoi->boi", s, P))
    weight = torch.rand(
        many, stats.N, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    expected = torch.einsum("brn,bn,rnoi->boi", s, weight, P)
    assert_equal(contractions.apply(stats, X, weight), expected)
    F = dense_fisher(factors)
    assert_equal(contractions.apply(stats, X).flatten(1), X.flatten(1) @ F)


# -- second moments --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "symmetric", "diagonal"])
def test_left_and_right(stats: LayerStats, factors: LayerStats, kind: str) -> None:
    P = gradients(factors)
    N, Q, o, i = stats.N, stats.Q, stats.d_out, stats.d_in
    A, G = {
        "none": (None, None),
        "symmetric": (symmetric(Q, i), symmetric(Q, o)),
        "diagonal": (symmetric(Q, i)[:, 0], symmetric(Q, o)[:, 0]),
    }[kind]
    left = torch.zeros(Q, o, o, dtype=torch.float64)
    right = torch.zeros(Q, i, i, dtype=torch.float64)
    for q in range(Q):
        for p in P[:, :, q].flatten(0, 1):
            left[q] += p @ matrix(A, q, i) @ p.T / N
            right[q] += p.T @ matrix(G, q, o) @ p / N
    assert_equal(contractions.left(stats, A), left)
    assert_equal(contractions.right(stats, G), right)


def matrix(factor: Tensor | None, q: int, n: int) -> Tensor:
    """One group of a factor in full."""
    if factor is None:
        return torch.eye(n, dtype=torch.float64)
    return factor[q] if factor.ndim == 3 else factor[q].diag()


@pytest.mark.parametrize("spatial", ["expand", "reduce"])
def test_input_and_gradient_moments(factors: LayerStats, spatial: str) -> None:
    A, G = contractions.input_and_gradient_moments(factors, spatial)
    for q in range(factors.Q):
        g, a = kfac_factors(factors.a[:, :, q], factors.g[:, :, :, q], spatial)
        T = factors.T if spatial == "expand" else 1  # the naive twin has its 1/T on the other side
        assert_equal(T * A[q], a)
        assert_equal(G[q], T * g)


def test_uncorrelated_positions(factors: LayerStats) -> None:
    U1, U2 = contractions.uncorrelated_positions(factors)
    P = gradients(factors)
    for q in range(factors.Q):
        first, second = tkfac_factors(factors.a[:, :, q], factors.g[:, :, :, q], P[:, :, q])
        assert_equal(U1[q], first)
        assert_equal(U2[q], second)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4), (8,)])
def test_modes(sizes: tuple[int, ...]) -> None:
    stats = random_stats(5, **SHAPES["convolution"])
    P = gradients(stats)[:, :, 0, :, :-1]  # without the bias column
    found = contractions.modes(stats, sizes)
    assert len(found) == 1 + len(sizes)
    for mode, U in enumerate(found):
        expected = torch.zeros_like(U[0])
        for p in P.flatten(0, 1):
            M = unfold(p.reshape(-1, *sizes), mode)
            expected += M @ M.T / stats.N
        assert_equal(U[0], expected)


# -- blocks ----------------------------------------------------------------------------------------
def test_dense(stats: LayerStats, factors: LayerStats) -> None:
    assert_equal(contractions.dense(stats), dense_fisher(factors))


def test_row_and_column_blocks(stats: LayerStats, factors: LayerStats) -> None:
    F = dense_fisher(factors)
    rows, d_in = stats.shape
    for width in {d_in, 1}:
        blocks = contractions.row_blocks(stats, width)
        assert len(blocks) == stats.dim // width
        for k, block in enumerate(blocks):
            own = slice(k * width, (k + 1) * width)
            assert_equal(block, F[own, own])
    F = F.view(rows, d_in, rows, d_in)
    blocks = contractions.column_blocks(stats).view(stats.Q, d_in, stats.d_out, stats.d_out)
    for q in range(stats.Q):
        own = slice(q * stats.d_out, (q + 1) * stats.d_out)
        for i in range(d_in):
            assert_equal(blocks[q, i], F[own, i, own, i])


@pytest.mark.parametrize("turned", ["neither", "left", "right", "both"])
def test_squares(stats: LayerStats, factors: LayerStats, turned: str) -> None:
    left = torch.stack([random_orthogonal(stats.d_out, q) for q in range(stats.Q)])
    right = torch.stack([random_orthogonal(stats.d_in, q) for q in range(stats.Q)])
    basis = {
        "neither": (None, None),
        "left": (left, None),
        "right": (None, right),
        "both": (left, right),
    }[turned]
    P = gradients(factors)
    if basis[0] is not None:
        P = left.mT @ P
    if basis[1] is not None:
        P = P @ right
    assert_equal(contractions.squares(stats, basis), P.square().sum((0, 1)) / stats.N)


# -- Gram matrices ---------------------------------------------------------------------------------
def columns(stats: LayerStats) -> Tensor:
    """Every column of U `[R, N, d]`."""
    return gradients(stats).flatten(2)


def test_gram_matrices(stats: LayerStats, factors: LayerStats) -> None:
    U = columns(factors)
    K = torch.einsum("rnd,smd->rnsm", U, U)
    RN = stats.R * stats.N
    assert_equal(contractions.gram(stats), K.reshape(RN, RN))
    assert_equal(contractions.squared_gram(stats), K.square().sum((0, 2)))
    assert_equal(contractions.squared_gram(stats, K.reshape(RN, RN)), K.square().sum((0, 2)))
    other = stats.examples(slice(1, 3))
    assert_equal(contractions.gram(stats, other), K[:, :, :, 1:3].reshape(RN, 2 * stats.R))


def test_overlaps(stats: LayerStats, factors: LayerStats) -> None:
    F = dense_fisher(factors)
    part = dense_fisher(factors.examples(slice(1, 3)))
    assert_equal(contractions.overlap(stats, stats), F.square().sum())
    assert_equal(Sums(stats).square(), F.square().sum())
    assert_equal(contractions.overlap(stats, stats.examples(slice(1, 3))), (F * part).sum())
    assert_equal(contractions.overlap(stats.examples(slice(1, 3)), stats), (F * part).sum())


@pytest.mark.parametrize("d_out", [2, 40])  # through H, and through pairs of directions
def test_grams_of_outer_products(d_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 7, d_out, generator=generator, dtype=torch.float64)
    h = torch.randn(2, 4, d_out, generator=generator, dtype=torch.float64)
    H = torch.einsum("rno,rnp->nop", g, g)
    other = torch.einsum("rno,rnp->nop", h, h)
    assert_equal(contractions.outer_gram(g), torch.einsum("nop,mop->nm", H, H))
    assert_equal(contractions.outer_gram(g, h), torch.einsum("nop,mop->nm", H, other))


def test_grams_of_examples() -> None:
    stats = random_stats(3, N=6, Q=2, R=3, d_out=3, d_in=4)
    for q in range(2):
        a, g = stats.a[:, 0, q], stats.g[:, :, 0, q]
        KX, KG = contractions.example_grams(stats, q)
        assert_equal(KX, (a @ a.T).square())
        assert_equal(KG, torch.einsum("rno,smo->rsnm", g, g).square().sum((0, 1)))


# -- what belongs to Linear and convolutions alike -------------------------------------------------
def test_worked_examples_of_the_shapes() -> None:
    """Those of the first lines of `layer_stats`."""
    from torch import nn

    import fisher_lab as fl
    from fisher_lab._passes.setup import Setup
    from fisher_lab._passes.source import Source

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    N = 5
    cases = [
        (nn.Linear(4, 3), torch.randn(N, 4), (N, 1, 1, 5), (N, 1, 1, 3), (3, 5), (4,)),
        (nn.Linear(4, 3), torch.randn(N, 7, 4), (N, 7, 1, 5), (N, 7, 1, 3), (3, 5), (4,)),
        (
            nn.Conv2d(4, 6, 3),
            torch.randn(N, 4, 8, 8),
            (N, 36, 1, 37),
            (N, 36, 1, 6),
            (6, 37),
            (4, 3, 3),
        ),
        (
            nn.Conv2d(4, 6, 3, groups=2),
            torch.randn(N, 4, 8, 8),
            (N, 36, 2, 19),
            (N, 36, 2, 3),
            (6, 19),
            (2, 3, 3),
        ),
        (Tied(), torch.randn(N, 4), (N, 2, 1, 5), (N, 2, 1, 4), (4, 5), (4,)),
        (nn.LayerNorm(4), torch.randn(N, 4), (N, 1, 1, 1), (N, 1, 1, 8), (8, 1), (1,)),
    ]
    for model, x, a, g, shape, kernel in cases:
        source = Source(Setup(model, fl.Gaussian(), x, fisher="mc"))
        (found,) = next(iter(source.sweep())).values()
        assert tuple(found.a.shape) == a, model
        assert tuple(found.g.shape[1:]) == g, model
        assert found.shape == shape
        assert found.kernel == kernel
