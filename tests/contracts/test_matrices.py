"""What every FisherMatrix promises, for an instance of every structure: each operation equals plain
dense algebra.
"""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_lab import matrices
from fisher_lab.matrices import (
    BlockDiagonal,
    Dense,
    DiagonalMatrix,
    DirectSum,
    EigenbasisDiagonal,
    FactoredRows,
    FisherMatrix,
    Kronecker,
    LowRank,
    VocabularyBlock,
)
from fisher_lab.statistics import LayerStats
from tests.contracts.matrices import (
    FACTORED,
    MATRICES,
    POWERS,
    bases,
    dense_of,
    dense_power,
    normal,
    positive,
    psd,
    streamed,
    vocabulary_sums,
)
from tests.helpers import assert_psd, assert_same, dense_fisher, frobenius, random_stats
from tests.naive import kron


@pytest.fixture(params=MATRICES)
def matrix(request) -> FisherMatrix:
    return MATRICES[request.param]()


def test_every_structure_is_in_the_table() -> None:
    """The table above has an instance of every exported structure."""
    exported = {
        c for c in vars(matrices).values() if isinstance(c, type) and issubclass(c, FisherMatrix)
    }
    concrete = {c for c in exported if not getattr(c, "__abstractmethods__", None)}
    # powers of a LowRank are tested through `powered`
    assert concrete - {type(make()) for make in MATRICES.values()} <= {matrices.ShiftedLowRank}


def test_definitions_of_the_structures() -> None:
    """Dense forms of the structures written down by hand, so that the rest may trust `@`."""
    G, A = psd(2, 3, 3), psd(2, 4, 4, seed=1)
    expected = torch.block_diag(*[kron(G[q], A[q]) for q in range(2)])
    assert_same(Kronecker((G, A)).dense(), expected)
    values, left, right = (positive(2, 3), positive(2, 4)), bases(2, 3), bases(2, 4)
    G, A = (
        left @ torch.diag_embed(values[0]) @ left.mT,
        right @ torch.diag_embed(values[1]) @ right.mT,
    )
    known = Kronecker.of_eigenpairs([(values[0], left), (values[1], right)])
    assert_same(known.dense(), torch.block_diag(*[kron(G[q], A[q]) for q in range(2)]))
    values = positive(1, 3, 4)
    basis = kron(bases(1, 3)[0], bases(1, 4)[0])
    rotated = EigenbasisDiagonal((bases(1, 3), bases(1, 4)), values)
    assert_same(rotated.dense(), basis @ torch.diag(values.flatten()) @ basis.T)
    blocks = psd(3, 4, 4)
    assert_same(BlockDiagonal(blocks, (3, 4)).dense(), torch.block_diag(*blocks))
    blocks = psd(4, 3, 3)
    columns = BlockDiagonal(blocks, (3, 4), 1).dense().reshape(3, 4, 3, 4)
    for j in range(4):
        assert_same(columns[:, j, :, j], blocks[j])
    assert int((columns.abs() > 0).sum()) == 4 * 9
    assert_same(DiagonalMatrix(values[0]).dense(), torch.diag(values.flatten()))
    stats = random_stats(0, N=3, T=2, Q=2)
    assert_same(LowRank(stats).dense(), dense_fisher(stats))
    a, w = normal(5, 4), positive(5, 3)
    rows = torch.block_diag(*[a.T @ torch.diag(w[:, i]) @ a for i in range(3)])
    assert_same(FactoredRows(a, w).dense(), rows)


def test_shape_and_dense(matrix) -> None:
    """`dense()` is [d, d], is `@` on unit vectors, symmetric and PSD."""
    d_out, d_in = matrix.shape
    assert matrix.dense().shape == (d_out * d_in,) * 2
    assert_same(matrix.dense(), dense_of(matrix), 1e-12)
    assert_psd(matrix.dense())


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)])
def test_matmul_with_batch_dimensions(matrix, batch: tuple[int, ...]) -> None:
    """`@` acts on the last two dimensions, whatever stands in front, without changing its
    argument.
    """
    X = normal(*batch, *matrix.shape)
    before = X.clone()
    got = matrix @ X
    assert got.shape == X.shape
    expected = (X.reshape(-1, X.shape[-2] * X.shape[-1]) @ dense_of(matrix)).reshape(X.shape)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(X, before)


def test_matmul_of_a_strided_array(matrix) -> None:
    """`@` and solve take arrays that are not contiguous."""
    X = normal(matrix.shape[1], matrix.shape[0], 3).permute(2, 1, 0)
    assert not X.is_contiguous()
    assert torch.allclose(matrix @ X, matrix @ X.contiguous(), rtol=1e-12, atol=1e-14)
    assert torch.allclose(
        matrix.solve(X, 0.1), matrix.solve(X.contiguous(), 0.1), rtol=1e-10, atol=1e-12
    )


def test_matmul_refuses_other_shapes(matrix) -> None:
    """`@` refuses what is not of the weight's shape, and says which shape is meant."""
    d_out, d_in = matrix.shape
    for shape in ((d_out + 1, d_in), (d_out * d_in,), (d_in + 1, d_out)):
        with pytest.raises((ValueError, TypeError), match=str(d_out)):
            matrix @ normal(*shape)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("damping", [1e-6, 0.1, 3.0])
def test_power_with_exact_damping(matrix, p: float, damping: float) -> None:
    """`power(X, p, damping)` is (M + damping)^p, so is `powered(p, damping) @ X`, and `solve` is p
    = -1.
    """
    X = normal(2, *matrix.shape)
    M = dense_power(dense_of(matrix), p, damping)
    expected = (X.reshape(2, -1) @ M).reshape(X.shape)
    rel = 1e-9 if damping > 1e-3 else 1e-7
    assert_same(matrix.power(X, p, damping=damping).reshape(2, -1), expected.reshape(2, -1), rel)
    assert_same((matrix.powered(p, damping) @ X).reshape(2, -1), expected.reshape(2, -1), rel)
    if p == -1:
        assert_same(matrix.solve(X, damping=damping).reshape(2, -1), expected.reshape(2, -1), rel)


@pytest.mark.parametrize("p", POWERS)
def test_power_without_damping(matrix, p: float) -> None:
    """Without damping a negative power is that of the pseudo-inverse, also where M is singular."""
    X = normal(*matrix.shape)
    expected = (dense_power(dense_of(matrix), p, 0.0) @ X.reshape(-1)).reshape(X.shape)
    # the root of a rounding error 1e-16 is 1e-8
    assert_same(matrix.power(X, p), expected, 1e-6)


@pytest.mark.parametrize("p", POWERS)
def test_damping_may_be_a_tensor(matrix, p: float) -> None:
    """Damping may be a 0-d tensor (trainers keep it on the device)."""
    X = normal(*matrix.shape)
    damping = torch.tensor(0.1, dtype=torch.float64)
    assert_same(matrix.power(X, p, damping=damping), matrix.power(X, p, damping=0.1), 1e-12)


@pytest.mark.parametrize("p", [-1.0, -0.5])
def test_damping_tensor_of_zero_never_raises(matrix, p: float) -> None:
    """A 0-d damping of 0 on a singular matrix may give non-finite numbers, but no exception in the
    middle of a step.
    """
    zero = torch.zeros((), dtype=torch.float64)
    X = normal(*matrix.shape)
    for singular in (matrix, matrix.scaled(0.0)):
        assert singular.power(X, p, damping=zero).shape == X.shape
        if isinstance(matrix, Kronecker):
            assert singular.power(X, p, damping=zero, style="factored").shape == X.shape


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_bad_damping_is_refused(matrix, damping: float) -> None:
    """Negative, NaN or infinite damping is refused."""
    with pytest.raises(ValueError, match="damping"):
        matrix.solve(normal(*matrix.shape), damping=damping)


def test_unknown_style_is_refused(matrix) -> None:
    """An unknown damping style is refused, with the choices."""
    with pytest.raises(ValueError, match="factored"):
        matrix.power(normal(*matrix.shape), -1.0, damping=0.1, style="both")


def wide_layer(N: int, outliers: int, d: int = 785) -> LayerStats:
    """Columns of a wide layer in which a few examples are much larger than the others."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(N, 1, 1, d, generator=random, dtype=torch.float64)
    g = torch.randn(1, N, 1, 1, d, generator=random, dtype=torch.float64)
    a[:outliers] *= 10
    return LayerStats(a, g)


@pytest.mark.parametrize("p", [-1.0, -0.5])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_damped_power_of_columns_in_float32_is_that_in_float64(p: float, as_tensor: bool) -> None:
    """Gram eigenvalues far below the largest count, also where the layer has many parameters."""
    double = LowRank(wide_layer(128, 8))
    single = double.to("cpu", torch.float32)
    X = (double @ normal(*double.shape)) / double.spectral_norm()
    damping = float(double.eigenvalues()[-128]) / 10
    expected = double.power(X, p, damping)
    of_single = torch.tensor(damping) if as_tensor else damping
    assert_same(single.power(X.float(), p, of_single).double(), expected, 1e-2)


@pytest.mark.parametrize("p", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_a_damped_power_of_equal_columns_needs_no_threshold(p: float, damping: float) -> None:
    """Where examples repeat, the Gram matrix has eigenvalues that are zero up to rounding."""
    stats = wide_layer(5, 2, 6)
    twice = LowRank(LayerStats(torch.cat([stats.a, stats.a]), torch.cat([stats.g, stats.g], 1)))
    X = normal(*twice.shape)
    M = dense_power(dense_of(twice), p, damping)
    # rounding of the largest eigenvalue, divided by the damping
    assert_same(twice.power(X, p, damping).flatten(), M @ X.flatten(), 1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "blocks", "Kronecker", "columns"])
def test_a_pseudo_inverse_in_float32_keeps_what_is_not_rounding(kind: str) -> None:
    """The threshold grows with the matrix that was decomposed, not with the number of
    parameters.
    """
    n = 512
    spectrum = torch.logspace(0, -2, n, dtype=torch.float64)
    if kind == "diagonal":
        matrix: FisherMatrix = DiagonalMatrix(torch.outer(spectrum, spectrum))
    elif kind == "blocks":
        blocks = torch.diag_embed(torch.outer(spectrum, spectrum[::32]))
        matrix = BlockDiagonal(blocks, (n, 16))
    elif kind == "Kronecker":
        matrix = Kronecker((torch.diag(spectrum)[None], torch.diag(spectrum)[None]))
    else:
        matrix = LowRank(wide_layer(64, 2))
    single = matrix.to("cpu", torch.float32)
    X = matrix @ normal(*matrix.shape)
    expected = matrix.power(X, -1.0)
    assert_same(single.power(X.float(), -1.0).double(), expected, 2e-2)


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """Factors of equal mean eigenvalue and the same product."""
    means = [torch.trace(f) / len(f) for f in factors]
    common = torch.stack(means).prod() ** (1 / len(factors))
    return [f * common / mean for f, mean in zip(factors, means, strict=True)]


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("p", POWERS)
def test_factored_damping(name: str, p: float) -> None:
    """Factored damping: equal mean eigenvalues, plus damping^(1/k) on each factor, group
    by group.
    """
    matrix, damping = MATRICES[name](), 0.2
    groups = []
    for q in range(matrix.factors[0].shape[0]):
        factors = [torch.diag(f[q]) if f.ndim == 2 else f[q] for f in matrix.factors]
        shift = damping ** (1 / len(factors))
        damped = [f + shift * torch.eye(len(f), dtype=f.dtype) for f in balanced(factors)]
        groups.append(dense_power(kron(*damped), p, 0.0))
    X = normal(*matrix.shape)
    expected = (torch.block_diag(*groups) @ X.reshape(-1)).reshape(X.shape)
    assert_same(matrix.power(X, p, damping=damping, style="factored"), expected)
    assert_same(matrix.powered(p, damping, "factored") @ X, expected)
    if p == -1:
        assert_same(matrix.solve(X, damping=damping, style="factored"), expected)


@pytest.mark.parametrize("name", FACTORED)
def test_p14_factored_damping_dominates(name: str) -> None:
    """P14: factored damping dominates exact damping in the PSD order."""
    matrix = MATRICES[name]()
    for p, sign in ((1.0, 1), (-1.0, -1)):
        exact, factored = (matrix.powered(p, 0.2, style).dense() for style in ("exact", "factored"))
        assert_psd(sign * (factored - exact), scale=frobenius(exact))


@pytest.mark.parametrize(
    "name", [name for name in MATRICES if name not in FACTORED and "DirectSum" not in name]
)
def test_factored_damping_needs_factors(name: str) -> None:
    """Structures without factors refuse factored damping."""
    matrix = MATRICES[name]()
    with pytest.raises(ValueError, match="exact"):
        matrix.solve(normal(*matrix.shape), damping=0.1, style="factored")


def test_factored_damping_of_a_direct_sum() -> None:
    """In a direct sum the Kronecker part is damped by factors, the others exactly."""
    weight, bias = Kronecker((psd(1, 3, 3), psd(1, 4, 4))), Dense(psd(3, 3), (3, 1))
    X = normal(3, 5)
    got = DirectSum((weight, bias)).solve(X, damping=0.1, style="factored")
    assert_same(got[:, :4], weight.solve(X[:, :4], damping=0.1, style="factored"))
    assert_same(got[:, 4:], bias.solve(X[:, 4:], damping=0.1))


def test_a_known_identity_needs_no_eigendecomposition(monkeypatch) -> None:
    """Exact damping beside an identity is a shift of the other factor, and equals the general
    route.
    """
    known, plain = (
        MATRICES["Kronecker, identity left"](),
        Kronecker(MATRICES["Kronecker, identity left"]().factors),
    )
    X = normal(*known.shape)
    expected = plain.solve(X, 0.1)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert_same(known.solve(X, 0.1), expected)
    assert known.powered(-1.0, 0.1).identities == (0,)


@pytest.mark.parametrize("p", POWERS)
def test_rescued_is_the_power(matrix, p: float) -> None:
    """`rescued` is (M + damping)^p by another road, of any structure."""
    M = dense_power(dense_of(matrix), p, 0.1)
    assert_same(matrix.rescued(p, 0.1).dense(), M, 1e-8)


def test_stacked_matrices_act_row_by_row_and_come_apart_again(matrix) -> None:
    """Matrices of one signature are groups of one matrix; a structure without signature stays alone
    and says so.
    """
    assert matrix.stack([]) is matrix
    assert matrix.part(0, 1) is matrix
    others = [matrix.scaled(2.0), matrix.scaled(3.0)]
    if matrix.signature is None:
        with pytest.raises(ValueError, match="alone"):
            matrix.stack(others)
        return
    alike = [matrix, *(other for other in others if other.signature == matrix.signature)]
    joined = alike[0].stack(alike[1:])
    X = [normal(*matrix.shape, seed=i) for i in range(len(alike))]
    assert joined.shape == (len(alike) * matrix.shape[0], matrix.shape[1])
    assert_same(joined @ torch.cat(X), torch.cat([m @ x for m, x in zip(alike, X, strict=True)]))
    inverse = joined.powered(-1.0, 0.1)
    for i, (m, x) in enumerate(zip(alike, X, strict=True)):
        assert_same(joined.part(i, len(alike)).dense(), m.dense())
        assert_same(inverse.part(i, len(alike)) @ x, m.solve(x, 0.1))


def groups_of(matrix: FisherMatrix) -> int:
    """Groups of the layer that such a matrix belongs to."""
    if isinstance(matrix, Kronecker | EigenbasisDiagonal):
        return next(iter(matrix.tensors().values())).shape[0]
    if isinstance(matrix, LowRank):
        return matrix.stats.Q
    if isinstance(matrix, matrices.Streamed):
        return next(matrix.pieces()).Q
    return getattr(matrix, "groups", None) or 1


def beside(matrix: FisherMatrix) -> dict[str, FisherMatrix]:
    """Exact blocks over the same W, in the forms that compare holds them in, and the
    matrix itself.
    """
    d_out, d_in = matrix.shape
    Q = groups_of(matrix)
    columns = random_stats(1, N=6, R=2, Q=Q, d_out=d_out // Q, d_in=d_in)
    shared = random_stats(2, N=4, R=2, T=3, Q=Q, d_out=d_out // Q, d_in=d_in)
    return {
        "columns": LowRank(columns),
        "columns of positions": LowRank(shared),
        "gradients": LowRank(type(columns).of_gradients(normal(2, 3, Q, d_out // Q, d_in))),
        "pieces": streamed(shared, 3),
        "dense": Dense(dense_fisher(columns), matrix.shape),
        "vocabulary": VocabularyBlock(vocabulary_sums(*matrix.shape)),
        "itself": matrix,
    }


@pytest.mark.parametrize(
    "form",
    ["columns", "columns of positions", "gradients", "pieces", "dense", "vocabulary", "itself"],
)
def test_beside_an_exact_block(matrix, form: str) -> None:
    """Inner product, difference and distance from a block in any form, and the other way round, by
    dense algebra.
    """
    exact = beside(matrix)[form]
    F, M = dense_of(exact), dense_of(matrix)
    scale = frobenius(F) * frobenius(M)
    assert float(exact.inner(matrix)) == pytest.approx(float((F * M).sum()), abs=1e-10 * scale)
    assert float(matrix.inner(exact)) == pytest.approx(float((F * M).sum()), abs=1e-10 * scale)
    for one, other, D in ((exact, matrix, F - M), (matrix, exact, M - F)):
        operator = one.minus(other)
        columns = torch.cat([operator(E).flatten(1) for E in one.identity_chunks()])
        found = torch.linalg.eigvalsh((columns + columns.T) / 2)
        assert torch.allclose(found, torch.linalg.eigvalsh(D), atol=1e-9 * (1 + frobenius(D)))
        distance = one.square_distance(other, math.inf)
        assert distance == pytest.approx(float(D.square().sum()), rel=1e-8, abs=1e-13 * scale)
        assert one.square_distance(other, 0) is None
    V = normal(3, *matrix.shape)
    others = [matrix, matrix.scaled(2.0), exact]
    for found, other, v in zip(exact.differences(others, V), others, V, strict=True):
        assert float((found - (exact @ v - other @ v)).norm()) < 1e-10 * (
            1 + frobenius(F) + frobenius(M)
        )


def test_of_a_sub_sample_of_the_columns_the_norm_is_known() -> None:
    """TENGraD's block is made of the first columns of F: nothing has to be computed for
    it again.
    """
    stats = random_stats(0, N=6, R=2, d_out=3, d_in=4)
    part, copied = (
        LowRank(stats.examples(slice(0, 2))),
        LowRank(random_stats(0, N=2, R=2, d_out=3, d_in=4)),
    )
    assert float(LowRank(stats).known_square(part)) == pytest.approx(frobenius(part.dense()) ** 2)
    assert LowRank(stats).known_square(copied) is None


def test_the_distance_from_a_sub_sample_of_the_columns_needs_no_entries() -> None:
    """It follows from the Gram matrix, and is exactly zero where all columns are kept."""
    stats = random_stats(0, N=6, R=2, d_out=3, d_in=4)
    exact = LowRank(stats)
    part = LowRank(stats.examples(slice(0, 2)))
    whole = LowRank(stats.examples(slice(0, 6)))
    expected = frobenius(exact.dense() - part.dense()) ** 2
    assert exact.square_distance(part, 100.0) == pytest.approx(expected)
    assert exact.square_distance(whole, 100.0) == 0.0


def test_same_structure_and_numbers(matrix) -> None:
    """`same` tells equal matrices from others."""
    assert matrix.same(matrix.forgetful())
    assert not matrix.same(matrix.scaled(2.0))
    assert not matrix.same(Dense(dense_of(matrix), matrix.shape)) or isinstance(matrix, Dense)
    if isinstance(matrix, BlockDiagonal) and matrix.groups is None:
        blocks = matrix.blocks
        assert not matrix.same(BlockDiagonal(blocks, matrix.weight_shape, 1))


def test_what_a_matrix_remembers_has_names_and_is_left_behind() -> None:
    """Eigenpairs that were handed over or computed stay with the object, not with its forgetful
    copy.
    """
    known = MATRICES["Kronecker, of eigenpairs"]()
    assert known.remembers("eigenpairs")
    assert known.signature is None  # joining would forget them
    assert not known.forgetful().remembers("eigenpairs")
    plain = MATRICES["Kronecker"]()
    assert not plain.remembers("eigenpairs")
    plain.eigenvalues()
    assert plain.remembers("eigenpairs")
    assert_same(plain.forgetful().dense(), plain.dense())


def test_powered_is_a_fisher_matrix(matrix) -> None:
    """`powered` returns a FisherMatrix of the same shape, with all operations: powers can be
    chained.
    """
    root = matrix.powered(0.5, 0.1)
    assert isinstance(root, FisherMatrix)
    assert root.shape == matrix.shape
    shifted = dense_of(matrix) + 0.1 * torch.eye(matrix.dim, dtype=torch.float64)
    M = root.dense()
    assert_same(M @ M, shifted)
    assert_same(root.powered(2.0).dense(), shifted)
    assert float(root.trace()) == pytest.approx(float(torch.trace(M)), rel=1e-9)
    assert float(root.frobenius_norm()) == pytest.approx(frobenius(M), rel=1e-9)
    assert float(root.spectral_norm()) == pytest.approx(
        float(torch.linalg.eigvalsh(M)[-1]), rel=1e-6
    )
    assert root.eigenvalues().tolist() == pytest.approx(torch.linalg.eigvalsh(M).tolist(), rel=1e-8)
    assert_same(root.scaled(3.0).dense(), 3 * M)
    assert root.nbytes > 0


def test_factorising_once(matrix, monkeypatch) -> None:
    """`powered` factorises once: applying its result calls no decomposition."""
    inverse = matrix.powered(-1.0, 0.1)
    X = normal(*matrix.shape)
    expected = inverse @ X

    def forbidden(*args, **kwargs):
        raise AssertionError("a decomposition while applying a power")

    for name in (
        "eigh",
        "eigvalsh",
        "cholesky_ex",
        "cholesky",
        "inv",
        "inv_ex",
        "solve",
        "svd",
        "qr",
    ):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    assert torch.equal(inverse @ X, expected)


def test_scalars(matrix) -> None:
    """trace, Frobenius norm, spectral norm (0-d tensors) and eigenvalues (ascending) are those of
    the dense matrix.
    """
    M = dense_of(matrix)
    values = torch.linalg.eigvalsh((M + M.T) / 2)
    for scalar in (matrix.trace(), matrix.frobenius_norm(), matrix.spectral_norm()):
        assert isinstance(scalar, Tensor)
        assert scalar.ndim == 0
    assert float(matrix.trace()) == pytest.approx(float(torch.trace(M)), rel=1e-10)
    assert float(matrix.frobenius_norm()) == pytest.approx(frobenius(M), rel=1e-9)
    assert float(matrix.spectral_norm()) == pytest.approx(float(values[-1]), rel=1e-6)
    got = matrix.eigenvalues()
    assert got.shape == values.shape
    assert bool((got.diff() >= 0).all())
    assert torch.allclose(got, values, rtol=1e-8, atol=1e-9 * float(values[-1]))


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5, torch.tensor(4.0, dtype=torch.float64)])
def test_scaled(matrix, c) -> None:
    """`scaled(c)` is c times the matrix; the original stays."""
    before = dense_of(matrix)
    assert_same(matrix.scaled(c).dense() + before, (1 + float(c)) * before, 1e-12)
    assert torch.equal(dense_of(matrix), before)


def test_to_scipy(matrix) -> None:
    """`to_scipy()` is a LinearOperator [d, d] that multiplies vectors and matrices."""
    operator, M = matrix.to_scipy(), dense_of(matrix).numpy()
    assert operator.shape == M.shape
    assert operator.dtype == np.float64
    v, V = (
        np.random.default_rng(0).normal(size=len(M)),
        np.random.default_rng(1).normal(size=(len(M), 3)),
    )
    np.testing.assert_allclose(operator @ v, M @ v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(operator @ V, M @ V, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(v), M.T @ v, rtol=1e-10, atol=1e-12)


def test_nbytes(matrix) -> None:
    """`nbytes` counts the tensors held: a positive int, half of it in single precision."""
    assert isinstance(matrix.nbytes, int)
    assert matrix.nbytes > 0
    single = matrix.with_tensors(
        {name: tensor.float() for name, tensor in matrix.tensors().items()}
    )
    assert 2 * single.nbytes == matrix.nbytes


def number_of_groups(matrix: FisherMatrix) -> int:
    """Groups of the layers whose statistics the matrix can be compared with."""
    if isinstance(matrix, Kronecker):
        return len(matrix.factors[0])
    if isinstance(matrix, EigenbasisDiagonal):
        return len(matrix.values)
    if isinstance(matrix, LowRank):
        return matrix.stats.Q
    return matrix.groups or 1 if isinstance(matrix, BlockDiagonal) else 1


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("explicit", [False, True])
def test_quadratic(matrix, T: int, explicit: bool) -> None:
    """`quadratic(stats)` is the Frobenius inner product with the block of `stats`, of whatever
    form.
    """
    d_out, d_in = matrix.shape
    Q = number_of_groups(matrix)
    stats = random_stats(5, N=4, T=T, Q=Q, d_out=d_out // Q, d_in=d_in)
    if explicit:
        stats = type(stats).of_gradients(stats.gradients())
    expected = (dense_fisher(stats) * dense_of(matrix)).sum()
    assert float(matrix.quadratic(stats)) == pytest.approx(float(expected), rel=1e-9)


def test_single_precision(matrix) -> None:
    """Every operation works, and stays, in float32."""
    single = matrix.with_tensors(
        {name: tensor.float() for name, tensor in matrix.tensors().items()}
    )
    X = normal(*matrix.shape).float()
    M = dense_of(matrix)
    for got, expected in (
        (single @ X, (M @ X.double().reshape(-1)).reshape(X.shape)),
        (single.solve(X, damping=0.1), matrix.solve(X.double(), damping=0.1)),
        (single.power(X, -0.5, damping=0.1), matrix.power(X.double(), -0.5, damping=0.1)),
        (single.dense(), M),
    ):
        assert got.dtype == torch.float32
        assert_same(got.double(), expected, 1e-4)
    assert single.dtype == torch.float32
    for scalar in (
        single.trace(),
        single.frobenius_norm(),
        single.spectral_norm(),
        single.eigenvalues(),
    ):
        assert scalar.dtype == torch.float32
        assert bool(torch.isfinite(scalar).all())
    assert single.scaled(2.0).dtype == torch.float32
    assert float(single.spectral_norm()) == pytest.approx(float(matrix.spectral_norm()), rel=1e-4)


def test_zero(matrix) -> None:
    """The zero matrix of every structure: finite numbers, and damping alone in the inverse."""
    zero = matrix.scaled(0.0)
    X = normal(*matrix.shape)
    for scalar in (zero.trace(), zero.frobenius_norm(), zero.spectral_norm()):
        assert float(scalar) == 0.0
    assert float(zero.eigenvalues().abs().max()) == 0.0
    assert_same(zero.solve(X, damping=0.5), 2 * X, 1e-12)
    assert_same(zero.power(X, -0.5, damping=0.25), 2 * X, 1e-12)
    assert float((zero.power(X, -1.0)).abs().max()) == 0.0
    if isinstance(matrix, Kronecker):
        assert bool(torch.isfinite(zero.solve(X, damping=0.5, style="factored")).all())


def test_tensors_round_trip(matrix) -> None:
    """`tensors` and `with_tensors` rebuild the matrix (checkpoints); so does pickle; fields cannot
    be assigned.
    """
    copy = matrix.with_tensors({name: tensor.clone() for name, tensor in matrix.tensors().items()})
    assert torch.equal(copy.dense(), matrix.dense())
    assert torch.equal(pickle.loads(pickle.dumps(matrix)).dense(), matrix.dense())
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.shape_of_nothing = 1
