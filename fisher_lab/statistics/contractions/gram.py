"""Inner products of per-example gradients, and the norms and products of blocks never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.contractions.blocks import outer_products
from fisher_lab.statistics.contractions.products import rows_of
from fisher_lab.statistics.layer_stats import LayerStats

# examples of the one side, of the other, and what belongs to them
Piece = tuple[slice, slice, Tensor]


# -- which way costs less --------------------------------------------------------------------------
def gram_pays(stats: LayerStats) -> bool:
    """Whether products with the Gram matrix cost less than with the columns, and it can be kept."""
    columns = stats.R * stats.N
    if stats.rank_one or columns >= stats.dim:
        return False
    size = columns**2 * stats.itemsize
    return size <= pieces.kept()


def route(stats: LayerStats) -> str:
    """How norms and products of the block are computed: from a and g, or from P."""
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
    d_out = stats.d_out
    d_in = stats.d_in
    pairs = stats.T * other.T
    through_positions = pairs * (d_out + d_in)
    through_gradients = d_out * d_in
    return through_positions <= through_gradients


# -- inner products of columns ---------------------------------------------------------------------
def gram(stats: LayerStats, other: LayerStats | None = None) -> Tensor:
    """<P_rn, P'_sm> `[R * N, R' * N']` with the columns of `other` (default: the same).

    Naive form: `U @ U'.T` for all columns as rows of U; tests/statistics/test_contractions.py.
    """
    if other is None:
        other = stats
    shape = (stats.R, stats.N, other.R, other.N)
    K = stats.g.new_zeros(shape)
    for mine, theirs, block in gram_pieces(stats, other):
        K[:, mine, :, theirs] = block
        if _is_mirrored(stats, other, mine, theirs):
            mirror = block.permute(2, 3, 0, 1)
            K[:, theirs, :, mine] = mirror
    by_columns = K.flatten(2, 3)
    return by_columns.flatten(0, 1)


def gram_pieces(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """Pieces `[R, n, R', m]` of the Gram matrix with their examples.

    Where `other` is `stats` only half of them come; `_is_mirrored` tells which stand for two.
    """
    if _few_positions(stats, other):
        return _gram_through_positions(stats, other)
    return _gram_through_gradients(stats, other)


def _gram_through_positions(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """As `gram_pieces`; all examples of `other` at once."""
    b, h = other.factors()
    everyone = slice(0, other.N)
    pairs_of_positions = stats.T * other.T
    pairs_of_directions = stats.R * other.R
    # in memory are the products of positions for one direction on each side, or the products of
    # directions where these are more
    at_once = max(1, pairs_of_directions // stats.T)
    products = pairs_of_positions * at_once * other.N
    bytes_each = products * stats.itemsize
    for mine in pieces.slices(stats.N, bytes_each):
        some = stats.examples(mine)
        a, g = some.factors()
        block = position_gram(a, g, b, h)
        yield mine, everyone, block


def _gram_through_gradients(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """As `gram_pieces`, by products of P."""
    same = other is stats
    size = _piece_bytes(stats, other)
    for mine in stats.pieces(size):
        U = _rows_of_examples(stats, mine)
        begin = mine.start if same else 0  # what lies before is the mirror of an earlier piece
        for theirs in other.pieces(size, begin):
            if same and theirs == mine:
                V = U
            else:
                V = _rows_of_examples(other, theirs)
            block = U @ V.T  # [n R, m R']
            block = block.unflatten(0, (-1, stats.R))
            block = block.unflatten(2, (-1, other.R))  # [n, R, m, R']
            yield mine, theirs, block.permute(1, 0, 3, 2)


def _rows_of_examples(stats: LayerStats, part: slice) -> Tensor:
    """The gradients of some examples as rows `[n R, d]`."""
    some = stats.examples(part)
    return rows_of(some.gradients())


def _piece_bytes(stats: LayerStats, other: LayerStats) -> int:
    """How much of the gradients on each side makes one piece of the Gram matrix."""
    size = pieces.chunk()
    both_formed = stats.formed and other.formed
    has_factors = stats.a is not None and other.a is not None
    if has_factors and both_formed:
        # larger pieces make faster products, and gradients that were formed before cost no memory
        size = pieces.kept()
    # their products do: a piece of the Gram matrix takes at most a chunk
    rows_and_columns = pieces.chunk() * stats.itemsize
    largest = stats.dim * math.sqrt(rows_and_columns)
    return int(min(size, largest))


def _is_mirrored(stats: LayerStats, other: LayerStats, mine: slice, theirs: slice) -> bool:
    """Whether this piece of a symmetric matrix stands for the one across the diagonal, too."""
    if other is not stats:
        return False
    return theirs.start >= mine.stop


def position_gram(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """<P_rn, P'_sm> `[R, n, R', m]` by the double sum over positions, for few of them.

    Naive form: sum_{t,u} (g_t . h_u)(a_t . b_u); tests/statistics/test_contractions.py.

    Args:
        a: `[n, T, Q, d_in]`.
        g: `[R, n, T, Q, d_out]`.
        b: `[m, U, Q, d_in]`.
        h: `[R', m, U, Q, d_out]`.
    """
    R, n, T, Q, _ = g.shape
    S, m, U, _, _ = h.shape
    if T == U == Q == 1:
        return _gram_of_rank_one(a, g, b, h)
    K = g.new_zeros(R, n, S, m)
    for q in range(Q):
        x = _flat_positions(a[:, :, q])  # [n T, d_in]
        y = _flat_positions(b[:, :, q])  # [m U, d_in]
        A = x @ y.T
        for r in range(R):
            mine = _flat_positions(g[r, :, :, q])  # [n T, d_out]
            for s in range(S):
                theirs = _flat_positions(h[s, :, :, q])  # [m U, d_out]
                G = mine @ theirs.T
                # G is of this pair of directions alone; A serves them all
                products = G.mul_(A)
                products = products.view(n, T, m, U)
                block = products.sum((1, 3))
                K[r, :, s] += block
    return K


def _flat_positions(x: Tensor) -> Tensor:
    """`[n, T, k]` as `[n T, k]`."""
    return x.flatten(0, 1)


def _gram_of_rank_one(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """As `position_gram`, for one position of one group: one product for all directions."""
    R, n = g.shape[:2]
    S, m = h.shape[:2]
    x = a[:, 0, 0]  # [n, d_in]
    y = b[:, 0, 0]
    mine = g.reshape(R * n, -1)  # all directions of all examples
    theirs = h.reshape(S * m, -1)
    G = mine @ theirs.T
    G = G.view(R, n, S, m)
    A = x @ y.T
    A = A[None, :, None, :]  # for all pairs of directions
    return G * A


# -- inner products of examples' blocks ------------------------------------------------------------
def squared_gram(stats: LayerStats, known: Tensor | None = None) -> Tensor:
    """<F_n, F_m>_Frobenius `[N, N]` of the examples' own blocks F_n = sum_r vec(P) vec(P)^T.

    |F|^2 is its mean. Naive form: sums over directions of the squared Gram matrix;
    tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        known: their Gram matrix, where that is at hand.
    """
    R = stats.R
    N = stats.N
    if known is not None:
        K = known.view(R, N, R, N)
        squares = K.square()
        return squares.sum((0, 2))
    if stats.rank_one and stats.Q == 1:
        KX, KG = example_grams(stats)
        return KX * KG
    K = stats.g.new_zeros(N, N)
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
        products = block.sum()
        if _is_mirrored(stats, other, mine, theirs):
            products = 2 * products
        total = total + products
    pairs = stats.N * other.N
    return total / pairs


def example_grams(stats: LayerStats, q: int = 0) -> tuple[Tensor, Tensor]:
    """K_X = (a_n . a_m)^2 and K_G = sum_{r,s} (g_rn . g_sm)^2 `[N, N]` of rank-one columns.

    Args:
        stats: the columns.
        q: the group.
    """
    a, g = stats.vectors(q)
    products = a @ a.T
    KX = products.square()
    KG = outer_gram(g)
    return KX, KG


def _squared_pieces(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """Pieces `[n, m]` of <F_n, F'_m> with their examples; half of them where `other` is `stats`."""
    both_rank_one = stats.rank_one and other.rank_one
    if both_rank_one and stats.Q == 1:
        yield from _squared_pieces_of_rank_one(stats, other)
        return
    for mine, theirs, block in gram_pieces(stats, other):
        squares = block.square()
        over_directions = squares.sum((0, 2))
        yield mine, theirs, over_directions


def _squared_pieces_of_rank_one(stats: LayerStats, other: LayerStats) -> Iterator[Piece]:
    """<F_n, F'_m> = (a_n . a'_m)^2 <H_n, H'_m>: no products of directions."""
    a, g = stats.vectors()
    b, h = other.vectors()
    everyone = slice(0, other.N)
    bytes_each = other.N * stats.itemsize  # of a row
    for mine in pieces.slices(stats.N, bytes_each, pieces.kept()):
        products = a[mine] @ b.T
        gradients = g[:, mine]
        KG = outer_gram(gradients, h)
        block = products.square() * KG
        yield mine, everyone, block


def outer_gram(g: Tensor, h: Tensor | None = None) -> Tensor:
    """<H_n, H'_m>_F = sum_{r,s} (g_rn . h_sm)^2 `[N, N']` with H_n = sum_r g g^T.

    Naive form: tests/statistics/test_contractions.py.

    Args:
        g: `[R, N, d_out]`.
        h: `[R', N', d_out]`; None for g itself, which saves half of the work.
    """
    R, _, d_out = g.shape
    if h is None:
        pairs = R * (R + 1) / 2
    else:
        pairs = R * len(h)
    # a product for each entry of H, or one for each pair of directions
    if d_out <= pairs:
        return _gram_through_outer_products(g, h)
    return _gram_through_directions(g, h)


def _gram_through_outer_products(g: Tensor, h: Tensor | None) -> Tensor:
    """As `outer_gram`, by products of H in pieces of it."""
    if h is None:
        return _gram_of_outer_products(g)
    N, d_out = g.shape[1:]
    M = h.shape[1]
    bytes_each = d_out**2 * g.element_size()
    K = g.new_empty(N, M)
    for rows in pieces.slices(N, bytes_each):
        H = outer_products(g[:, rows])
        for columns in pieces.slices(M, bytes_each):
            other = outer_products(h[:, columns])
            K[rows, columns] = H @ other.T
    return K


def _gram_of_outer_products(g: Tensor) -> Tensor:
    """As `_gram_through_outer_products`, of g with itself: the pieces above the diagonal."""
    N, d_out = g.shape[1:]
    bytes_each = d_out**2 * g.element_size()
    K = g.new_empty(N, N)
    for rows in pieces.slices(N, bytes_each):
        H = outer_products(g[:, rows])
        K[rows, rows] = H @ H.T
        for columns in pieces.slices(N, bytes_each, start=rows.stop):
            other = outer_products(g[:, columns])
            block = H @ other.T
            K[rows, columns] = block
            K[columns, rows] = block.T
    return K


def _gram_through_directions(g: Tensor, h: Tensor | None) -> Tensor:
    """As `outer_gram`, by squared products of every pair of directions."""
    symmetric = h is None
    other = g if h is None else h
    N = g.shape[1]
    M = other.shape[1]
    K = g.new_zeros(N, M)
    for r in range(len(g)):
        # of g with itself, the pair (s, r) is the transpose of (r, s)
        first = r if symmetric else 0
        for s in range(first, len(other)):
            mine = g[r]
            theirs = other[s]
            products = mine @ theirs.T
            block = products.square_()
            K += block
            if symmetric and s > r:
                K += block.T
    return K
