"""Inner products of per-example gradients, and what follows from them: norms and products of blocks never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.contractions.blocks import outer_products
from fisher_lab.statistics.contractions.products import rows_of
from fisher_lab.statistics.layer_stats import LayerStats

Piece = tuple[slice, slice, Tensor]  # examples of the one side, of the other, and what belongs to them


# -- which way costs less --------------------------------------------------------------------------
def gram_pays(stats: LayerStats) -> bool:
    """Whether products with the Gram matrix cost less than with the columns, and it is small enough to keep."""
    columns = stats.R * stats.N
    fits = columns**2 * stats.g.element_size() <= pieces.KEPT_BYTES
    return not stats.rank_one and columns < stats.dim and fits


def route(stats: LayerStats) -> str:
    """How norms and products of the block are computed: from inputs and output gradients, or from P."""
    if stats.rank_one:
        return "columns"
    if _few_positions(stats, stats):
        return "columns, double sum over positions"
    formed = "once" if stats.formed else "piece by piece"
    return f"columns, gradients formed {formed}"


def _few_positions(stats: LayerStats, other: LayerStats) -> bool:
    """Whether the double sum over positions costs less than products of P, formed or not."""
    if stats.a is None or other.a is None:
        return False
    through_positions = stats.T * other.T * (stats.d_out + stats.d_in)
    return through_positions <= stats.d_out * stats.d_in


# -- inner products of columns ---------------------------------------------------------------------
def gram(stats: LayerStats, other: LayerStats | None = None) -> Tensor:
    """<P_rn, P'_sm> `[R * N, R' * N']` with the columns of `other` (default: the same).

    Naive form: `U @ U'.T` for all columns as rows of U; tests/statistics/test_contractions.py.
    """
    if other is None:
        other = stats
    K = stats.g.new_zeros(stats.R, stats.N, other.R, other.N)
    for mine, theirs, block in gram_pieces(stats, other):
        K[:, mine, :, theirs] = block
        if _is_mirrored(stats, other, mine, theirs):
            K[:, theirs, :, mine] = block.permute(2, 3, 0, 1)
    return K.view(stats.R * stats.N, other.R * other.N)


def gram_pieces(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """Pieces `[R, n, R', m]` of the Gram matrix with their examples; half of them where `other` is `stats`."""
    if _few_positions(stats, other):
        b, h = other.factors()
        products = stats.T * other.T * other.N * max(1, stats.R * other.R // stats.T)
        for mine in pieces.slices(stats.N, products * stats.g.element_size()):
            a, g = stats.examples(mine).factors()
            yield mine, slice(0, other.N), position_gram(a, g, b, h)
        return
    size = _piece_bytes(stats, other)
    for mine in stats.pieces(size):
        U = rows_of(stats.examples(mine).gradients())  # [n R, d]
        begin = mine.start if other is stats else 0
        for theirs in other.pieces(size, begin):
            if other is stats and theirs == mine:
                V = U
            else:
                V = rows_of(other.examples(theirs).gradients())  # [m R', d]
            block = (U @ V.T).view(-1, stats.R, len(V) // other.R, other.R)
            yield mine, theirs, block.permute(1, 0, 3, 2)


def _piece_bytes(stats: LayerStats, other: LayerStats) -> int:
    """How much of the gradients on each side makes one piece of the Gram matrix."""
    # larger pieces make faster products, and of gradients that were formed before they cost no memory
    at_hand = stats.a is not None and other.a is not None and stats.formed and other.formed
    size = pieces.KEPT_BYTES if at_hand else pieces.CHUNK_BYTES
    # their products do: a piece of the Gram matrix takes at most a chunk
    largest = stats.dim * math.sqrt(pieces.CHUNK_BYTES * stats.g.element_size())
    return min(size, int(largest))


def _is_mirrored(stats: LayerStats, other: LayerStats, mine: slice, theirs: slice) -> bool:
    """Whether this piece of a symmetric matrix stands for the one across the diagonal, too."""
    return other is stats and theirs.start >= mine.stop


def position_gram(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """<P_rn, P'_sm> `[R, n, R', m]` by the double sum over positions, for few positions of a large weight.

    Naive form: sum_{t,u} (g_t . h_u)(a_t . b_u); tests/statistics/test_contractions.py.

    Args:
        a: `[n, T, Q, d_in]`.
        g: `[R, n, T, Q, d_out]`.
        b: `[m, U, Q, d_in]`.
        h: `[R', m, U, Q, d_out]`.
    """
    R, n, T, Q, _ = g.shape
    S, m, U = h.shape[:3]
    if T == U == Q == 1:  # one product for all directions
        G = g.reshape(R * n, -1) @ h.reshape(S * m, -1).T
        A = a[:, 0, 0] @ b[:, 0, 0].T
        return G.view(R, n, S, m) * A[None, :, None, :]
    K = g.new_zeros(R, n, S, m)
    for q in range(Q):
        A = a[:, :, q].flatten(0, 1) @ b[:, :, q].flatten(0, 1).T  # [n T, m U]
        for r in range(R):
            for s in range(S):
                G = g[r, :, :, q].flatten(0, 1) @ h[s, :, :, q].flatten(0, 1).T  # [n T, m U]
                K[r, :, s] += G.mul_(A).view(n, T, m, U).sum((1, 3))
    return K


# -- inner products of examples' blocks ------------------------------------------------------------
def squared_gram(stats: LayerStats, known: Tensor | None = None) -> Tensor:
    """<F_n, F_m>_Frobenius `[N, N]` of the examples' own blocks F_n = sum_r vec(P) vec(P)^T; |F|^2 is its mean.

    Naive form: sums over directions of the squared Gram matrix; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        known: their Gram matrix, where that is at hand.
    """
    if known is not None:
        return known.view(stats.R, stats.N, stats.R, stats.N).square().sum((0, 2))
    if stats.rank_one and stats.Q == 1:
        KX, KG = example_grams(stats)
        return KX * KG
    K = stats.g.new_zeros(stats.N, stats.N)
    for mine, theirs, block in _squared_pieces(stats, stats):
        K[mine, theirs] = block
        if _is_mirrored(stats, stats, mine, theirs):
            K[theirs, mine] = block.T
    return K


def overlap(stats: LayerStats, other: LayerStats) -> Tensor:
    """<F, F'>_Frobenius with the block of `other`, never forming either block.

    Naive form: `(dense(stats) * dense(other)).sum()`; tests/statistics/test_contractions.py.
    """
    total = stats.g.new_zeros(())
    for mine, theirs, block in _squared_pieces(stats, other):
        times = 2 if _is_mirrored(stats, other, mine, theirs) else 1
        total = total + times * block.sum()
    return total / (stats.N * other.N)


def example_grams(stats: LayerStats, q: int = 0) -> tuple[Tensor, Tensor]:
    """K_X = (a_n . a_m)^2 and K_G = sum_{r,s} (g_rn . g_sm)^2 `[N, N]` of a group, for rank-one columns."""
    a, g = stats.factors()
    inputs = a[:, 0, q]  # [N, d_in]
    KX = (inputs @ inputs.T).square()
    return KX, outer_gram(g[:, :, 0, q])


def _squared_pieces(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """Pieces `[n, m]` of <F_n, F'_m> with their examples; half of them where `other` is `stats`."""
    if not (stats.rank_one and other.rank_one and stats.Q == 1):
        for mine, theirs, block in gram_pieces(stats, other):
            yield mine, theirs, block.square().sum((0, 2))
        return
    # rank one: <F_n, F'_m> = (a_n . a'_m)^2 <H_n, H'_m>, no products of directions
    a, g = stats.factors()
    b, h = other.factors()
    for mine in pieces.slices(stats.N, other.N * stats.g.element_size(), pieces.KEPT_BYTES):
        KX = (a[mine, 0, 0] @ b[:, 0, 0].T).square()
        yield mine, slice(0, other.N), KX * outer_gram(g[:, mine, 0, 0], h[:, :, 0, 0])


def outer_gram(g: Tensor, h: Tensor | None = None) -> Tensor:
    """<H_n, H'_m>_F = sum_{r,s} (g_rn . h_sm)^2 `[N, N']` with H_n = sum_r g g^T.

    Naive form: tests/statistics/test_contractions.py.

    Args:
        g: `[R, N, d_out]`.
        h: `[R', N', d_out]`; None for g itself, which saves half of the work.
    """
    R, _, d_out = g.shape
    pairs = R * (R + 1) / 2 if h is None else R * h.shape[0]
    # a product for each entry of H, or one for each pair of directions
    if d_out <= pairs:
        return _gram_through_outer_products(g, h)
    return _gram_through_directions(g, h)


def _gram_through_outer_products(g: Tensor, h: Tensor | None) -> Tensor:
    """As `outer_gram`, by products of H in pieces of it."""
    symmetric = h is None
    other = g if h is None else h
    N, M, d_out = g.shape[1], other.shape[1], g.shape[2]
    K = g.new_empty(N, M)
    for rows in pieces.slices(N, d_out**2 * g.element_size()):
        H = outer_products(g[:, rows])
        for columns in pieces.slices(M, d_out**2 * g.element_size()):
            if symmetric and columns.start < rows.start:
                K[rows, columns] = K[columns, rows].T
            elif symmetric and columns == rows:
                K[rows, columns] = H @ H.T
            else:
                K[rows, columns] = H @ outer_products(other[:, columns]).T
    return K


def _gram_through_directions(g: Tensor, h: Tensor | None) -> Tensor:
    """As `outer_gram`, by squared products of every pair of directions."""
    symmetric = h is None
    other = g if h is None else h
    K = g.new_zeros(g.shape[1], other.shape[1])
    for r in range(len(g)):
        first = r if symmetric else 0
        for s in range(first, len(other)):
            block = (g[r] @ other[s].T).square_()
            K += block
            if symmetric and s > r:
                K += block.T
    return K
