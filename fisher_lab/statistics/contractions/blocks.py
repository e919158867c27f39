"""The exact block F = 1/N sum vec(P) vec(P)^T, and the entries that approximations keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.contractions.products import rows_of
from fisher_lab.statistics.layer_stats import LayerStats

# orthogonal B_1 [Q, d_out, d_out], B_2 [Q, d_in, d_in]; None: identity
Basis = tuple[Tensor | None, Tensor | None]


def dense(stats: LayerStats) -> Tensor:
    """F `[d, d]`.

    Naive form: `sum(outer(vec(P), vec(P))) / N`; tests/helpers.py (dense_fisher).
    """
    if stats.rank_one and stats.Q == 1 and stats.R > 1:
        return _dense_of_rank_one(stats)
    d = stats.dim
    total = stats.g.new_zeros(d, d)
    for P in stats.per_example():
        U = rows_of(P)
        total.addmm_(U.T, U)
    return total / stats.N


def _dense_of_rank_one(stats: LayerStats) -> Tensor:
    """F = 1/N sum_n H_n (x) a a^T with H_n = sum_r g g^T: R times fewer products."""
    a, g = stats.vectors()
    o = stats.d_out
    i = stats.d_in
    total = outer_sum(g, a, squared=True)  # [o o, i i]
    F = total / stats.N
    F = F.view(o, o, i, i)
    F = F.transpose(1, 2)
    return F.reshape(o * i, o * i)


def row_blocks(stats: LayerStats, width: int) -> Tensor:
    """Blocks of F over pieces of `width` entries of a row of W: `[d / width, width, width]`.

    Naive form: slices of `dense(stats)`; tests/statistics/test_contractions.py.
    """
    if stats.rank_one and stats.Q == 1 and width == stats.d_in:
        return _row_blocks_of_rank_one(stats)
    total = _second_moments(_pieces_of_rows(stats, width))
    return total / stats.N


def _pieces_of_rows(stats: LayerStats, width: int) -> Iterator[Tensor]:
    """Every gradient in pieces of its rows: `[d / width, R n, width]`."""
    count = stats.dim // width
    for P in stats.per_example():
        x = P.reshape(-1, count, width)
        yield x.transpose(0, 1)


def _row_blocks_of_rank_one(stats: LayerStats) -> Tensor:
    """A row's block is a second moment of the inputs, weighted by the row's squared gradients."""
    a, g = stats.vectors()
    squares = g.square()
    weights = squares.sum(0) / stats.N  # [N, d_out]
    blocks = []
    for weight in weights.unbind(1):
        weighted = a * weight[:, None]
        block = a.T @ weighted
        blocks.append(block)
    return torch.stack(blocks)


def column_blocks(stats: LayerStats) -> Tensor:
    """Blocks of F over columns of W, group by group: `[Q * d_in, d_out, d_out]`.

    Naive form: slices of `dense(stats)`; tests/statistics/test_contractions.py.
    """
    if stats.rank_one and stats.Q == 1:
        return _column_blocks_of_rank_one(stats)
    total = _second_moments(_pieces_of_columns(stats))
    return total / stats.N


def _pieces_of_columns(stats: LayerStats) -> Iterator[Tensor]:
    """Every gradient's columns: `[Q d_in, R n, d_out]`."""
    for P in stats.per_example():
        x = P.flatten(0, 1)  # [R n, Q, d_out, d_in]
        x = x.permute(1, 3, 0, 2)
        yield x.flatten(0, 1)


def _column_blocks_of_rank_one(stats: LayerStats) -> Tensor:
    """A column's block is sum_n a^2 H_n, for all columns one product."""
    a, g = stats.vectors()
    o = stats.d_out
    i = stats.d_in
    total = outer_sum(g, a.square())  # [o o, i]
    blocks = total.T.view(i, o, o)
    return blocks / stats.N


def _second_moments(parts: Iterator[Tensor]) -> Tensor:
    """Sum of x^T x `[B, n, n]` over pieces x `[B, columns, n]`."""
    products = (x.mT @ x for x in parts)
    return pieces.accumulated(products)


def squares(stats: LayerStats, basis: Basis = (None, None)) -> Tensor:
    """1/N sum (B_1^T P B_2)^2, elementwise, `[Q, d_out, d_in]`: the diagonal of F in a basis.

    Naive form: `((B_1.T @ P @ B_2) ** 2).sum() / N`; tests/statistics/test_contractions.py.
    """
    if stats.rank_one:
        return _squares_of_rank_one(stats, basis)
    total = pieces.accumulated(_squares_of_pieces(stats, basis))
    return total / stats.N


def _squares_of_rank_one(stats: LayerStats, basis: Basis) -> Tensor:
    """(B_1^T g)^2 times (B_2^T a)^2."""
    rotated = stats.rotated(*basis)
    a, g = rotated.factors()
    outputs = g[:, :, 0]
    outputs = outputs.square().sum(0)  # [N, Q, d_out]
    inputs = a[:, 0]
    inputs = inputs.square()  # [N, Q, d_in]
    total = torch.einsum("nqo,nqi->qoi", outputs, inputs)
    return total / stats.N


def _squares_of_pieces(stats: LayerStats, basis: Basis) -> Iterator[Tensor]:
    """Sums of (B_1^T P B_2)^2 over a piece of the gradients after the other."""
    for P in _rotated_gradients(stats, basis):
        squared = P.square()
        yield squared.sum((0, 1))


def _rotated_gradients(stats: LayerStats, basis: Basis) -> Iterator[Tensor]:
    """B_1^T P B_2 in pieces `[R, n, Q, d_out, d_in]`."""
    left, right = basis
    same = left is None and right is None
    if stats.a is None or same:
        for P in stats.per_example(pieces.stream()):
            yield _rotate(P, left, right)
        return
    # turning a and g costs less than turning P, also where P is at hand
    for part in stats.pieces(pieces.stream()):
        some = stats.examples(part)
        rotated = some.rotated(left, right)
        yield rotated.gradients()


def _rotate(P: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """B_1^T P B_2, None for the identity."""
    if left is not None:
        P = left.mT @ P
    if right is not None:
        P = P @ right
    return P


def outer_products(g: Tensor) -> Tensor:
    """H_n = sum_r g_rn g_rn^T, flat `[N, d_out^2]`, for g `[R, N, d_out]`."""
    x = g.transpose(0, 1)  # [N, R, d_out]
    H = x.mT @ x
    return H.flatten(1)


def outer_sum(g: Tensor, a: Tensor, squared: bool = False) -> Tensor:
    """sum_n vec(H_n) vec(x_n)^T `[d_out^2, k]`.

    Args:
        g: `[R, N, d_out]`; H_n = sum_r g_rn g_rn^T.
        a: `[N, k]`.
        squared: whether x is a a^T (k^2 numbers) instead of a.
    """
    N, width = a.shape
    if squared:
        width = width**2
    height = g.shape[2] ** 2
    total = a.new_zeros(height, width)
    bytes_each = (height + width) * g.element_size()
    for part in pieces.slices(N, bytes_each):
        H = outer_products(g[:, part])
        x = a[part]
        if squared:
            x = _squared(x)
        total.addmm_(H.T, x)
    return total


def _squared(x: Tensor) -> Tensor:
    """x x^T, flat `[n, k^2]`, for x `[n, k]`."""
    columns = x[:, :, None]
    rows = x[:, None, :]
    products = columns * rows
    return products.flatten(1)
