"""The exact block F = 1/N sum vec(P) vec(P)^T, or those of its entries that an approximation keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.contractions.products import rows_of
from fisher_lab.statistics.layer_stats import LayerStats

Basis = tuple[Tensor | None, Tensor | None]  # orthogonal B_1 [Q, d_out, d_out], B_2 [Q, d_in, d_in]; None: identity


def dense(stats: LayerStats) -> Tensor:
    """F `[d, d]`.

    Naive form: `sum(outer(vec(P), vec(P))) / N`; tests/helpers.py (dense_fisher).
    """
    if stats.rank_one and stats.Q == 1 and stats.R > 1:
        # through F = 1/N sum_n H_n (x) a a^T with H_n = sum_r g g^T: R times fewer products
        a, g = stats.factors()
        o, i = stats.d_out, stats.d_in
        total = outer_sum(g[:, :, 0, 0], a[:, 0, 0], squared=True) / stats.N  # [o o, i i]
        return total.view(o, o, i, i).transpose(1, 2).reshape(o * i, o * i)
    total = stats.g.new_zeros(stats.dim, stats.dim)
    for P in stats.per_example():
        U = rows_of(P)
        total.addmm_(U.T, U)
    return total / stats.N


def row_blocks(stats: LayerStats, width: int) -> Tensor:
    """Diagonal blocks of F over pieces of `width` entries of a row of W: `[d / width, width, width]`.

    Naive form: slices of `dense(stats)`; tests/statistics/test_contractions.py.
    """
    if stats.rank_one and stats.Q == 1 and width == stats.d_in:
        # a row's block is a weighted second moment of the inputs
        a, g = stats.factors()
        inputs = a[:, 0, 0]  # [N, d_in]
        weights = g[:, :, 0, 0].square().sum(0) / stats.N  # [N, d_out]
        blocks = [inputs.T @ (inputs * weight[:, None]) for weight in weights.unbind(1)]
        return torch.stack(blocks)
    count = stats.dim // width
    rows = (P.reshape(-1, count, width).transpose(0, 1) for P in stats.per_example())
    return _second_moments(rows) / stats.N


def column_blocks(stats: LayerStats) -> Tensor:
    """Diagonal blocks of F over columns of W, group by group: `[Q * d_in, d_out, d_out]`.

    Naive form: slices of `dense(stats)`; tests/statistics/test_contractions.py.
    """
    if stats.rank_one and stats.Q == 1:
        # a column's block is sum_n a^2 H_n, for all columns one product
        a, g = stats.factors()
        total = outer_sum(g[:, :, 0, 0], a[:, 0, 0].square())  # [o o, i]
        return total.T.view(stats.d_in, stats.d_out, stats.d_out) / stats.N
    columns = (P.flatten(0, 1).permute(1, 3, 0, 2).flatten(0, 1) for P in stats.per_example())
    return _second_moments(columns) / stats.N


def _second_moments(parts: Iterator[Tensor]) -> Tensor:
    """Sum of x^T x `[B, n, n]` over pieces x `[B, columns, n]`."""
    return pieces.accumulated(x.transpose(1, 2) @ x for x in parts)


def squares(stats: LayerStats, basis: Basis = (None, None)) -> Tensor:
    """1/N sum (B_1^T P B_2)^2, elementwise, `[Q, d_out, d_in]`: the diagonal of F in a basis.

    Naive form: `((B_1.T @ P @ B_2) ** 2).sum() / N`; tests/statistics/test_contractions.py.
    """
    left, right = basis
    if stats.rank_one:  # (B_1^T g)^2 times (B_2^T a)^2
        a, g = stats.rotated(left, right).factors()
        outputs = g[:, :, 0].square().sum(0)  # [N, Q, d_out]
        inputs = a[:, 0].square()  # [N, Q, d_in]
        return torch.einsum("nqo,nqi->qoi", outputs, inputs) / stats.N
    if stats.a is None or (left is None and right is None):
        rotated = (_rotate(P, left, right) for P in stats.per_example(pieces.STREAM_BYTES))
    else:  # turning a and g costs less than turning P, also where P is at hand
        rotated = (stats.examples(part).rotated(left, right).gradients() for part in stats.pieces(pieces.STREAM_BYTES))
    return pieces.accumulated(P.square().sum((0, 1)) for P in rotated) / stats.N


def _rotate(P: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """B_1^T P B_2, None for the identity."""
    if left is not None:
        P = left.transpose(-1, -2) @ P
    if right is not None:
        P = P @ right
    return P


def outer_products(g: Tensor) -> Tensor:
    """H_n = sum_r g_rn g_rn^T, flat `[N, d_out^2]`, for g `[R, N, d_out]`."""
    x = g.transpose(0, 1)  # [N, R, d_out]
    return (x.transpose(1, 2) @ x).flatten(1)


def outer_sum(g: Tensor, a: Tensor, squared: bool = False) -> Tensor:
    """sum_n vec(H_n) vec(x_n)^T `[d_out^2, k]`.

    Args:
        g: `[R, N, d_out]`; H_n = sum_r g_rn g_rn^T.
        a: `[N, k]`.
        squared: whether x is a a^T (k^2 numbers) instead of a.
    """
    height = g.shape[2] ** 2
    width = a.shape[1] ** 2 if squared else a.shape[1]
    total = a.new_zeros(height, width)
    for part in pieces.slices(len(a), (height + width) * g.element_size()):
        x = a[part]
        if squared:
            x = (x[:, :, None] * x[:, None, :]).flatten(1)
        total.addmm_(outer_products(g[:, part]).T, x)
    return total
