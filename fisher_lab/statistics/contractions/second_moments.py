"""Second moments of the rows and columns of the per-example gradients, and of their factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.layer_stats import LayerStats


def second_moment(x: Tensor, N: float = 1) -> Tensor:
    """1/N sum of x x^T over all but the last two axes: `[..., Q, n]` -> `[Q, n, n]`."""
    Q, n = x.shape[-2:]
    vectors = x.reshape(-1, Q, n)
    X = vectors.transpose(0, 1)  # [Q, all, n]
    total = X.mT @ X
    # the total is nobody else's: divided in place, it needs no second matrix
    return total.div_(N)


# -- of the gradients P ----------------------------------------------------------------------------
def left(stats: LayerStats, A: Tensor | None = None) -> Tensor:
    """1/N sum P A P^T `[Q, d_out, d_out]`; U1 without A.

    Naive form: `sum(p @ A @ p.T) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        A: symmetric `[Q, d_in, d_in]`, a diagonal `[Q, d_in]`, or None for the identity.
    """
    N = stats.N
    if stats.rank_one and A is None:
        # P P^T = |a|^2 g g^T
        a, g = stats.factors()
        scaled = g * _lengths(a)
        return second_moment(scaled, N)
    if _left_pays_through_positions(stats, A):
        total = _left_through_positions(stats, A)
    else:
        parts = _left_of_pieces(stats, A)
        total = pieces.accumulated(parts)
    return total.div_(N)


def right(stats: LayerStats, G: Tensor | None = None) -> Tensor:
    """1/N sum P^T G P `[Q, d_in, d_in]`; U2 without G.

    Naive form: `sum(p.T @ G @ p) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        G: symmetric `[Q, d_out, d_out]`, a diagonal `[Q, d_out]`, or None for the identity.
    """
    N = stats.N
    if stats.rank_one and G is None:
        # sum_r P^T P = (sum_r |g_r|^2) a a^T
        a, g = stats.factors()
        scaled = a * _lengths_over_directions(g)
        return second_moment(scaled, N)
    if _right_pays_through_positions(stats, G):
        total = _right_through_positions(stats, G)
    else:
        parts = _right_of_pieces(stats, G)
        total = pieces.accumulated(parts)
    return total.div_(N)


def _lengths(a: Tensor) -> Tensor:
    """|a| `[N, T, Q, 1]` of inputs `[N, T, Q, d_in]`."""
    squares = a.square()
    size = squares.sum(-1)
    return size.sqrt()[..., None]


def _lengths_over_directions(g: Tensor) -> Tensor:
    """Root of sum_r |g_r|^2 `[N, T, Q, 1]` of gradients `[R, N, T, Q, d_out]`."""
    squares = g.square()
    size = squares.sum((0, -1))
    return size.sqrt()[..., None]


def _left_pays_through_positions(stats: LayerStats, A: Tensor | None) -> bool:
    """Whether `left` costs less by products of positions than by those of P."""
    R = stats.R
    T = stats.T
    d_out = stats.d_out
    d_in = stats.d_in
    # multiplications for each position: a_t . a_u, their products with g, and the sum of g g^T
    need = T * d_in
    need += R * d_out * T
    need += R * d_out * d_out
    if A is not None:
        need += d_in * d_in
    return _pays_through_positions(stats, need)


def _right_pays_through_positions(stats: LayerStats, G: Tensor | None) -> bool:
    """Whether `right` costs less by products of positions than by those of P."""
    R = stats.R
    T = stats.T
    d_out = stats.d_out
    d_in = stats.d_in
    # multiplications for each position: g_t . g_u, their products with a, and the sum of a a^T
    need = R * d_out * T
    need += d_in * T
    need += d_in * d_in
    if G is not None:
        need += R * d_out * d_out
    return _pays_through_positions(stats, need)


def _pays_through_positions(stats: LayerStats, per_position: int) -> bool:
    """Whether a second moment costs less at the positions than through P.

    Args:
        stats: the columns.
        per_position: multiplications for each position, the former way.
    """
    if stats.a is None:
        return False
    per_entry = stats.d_out + stats.d_in
    if not stats.formed:
        per_entry += stats.T  # P must be formed first
    entries = stats.R * stats.d_out * stats.d_in
    through_gradients = entries * per_entry
    through_positions = stats.T * per_position
    return through_positions < through_gradients


def _left_through_positions(stats: LayerStats, A: Tensor | None) -> Tensor:
    """sum P A P^T `[Q, d_out, d_out]` as sum_{t,u} (a_t^T A a_u) g_t g_u^T."""
    Q = stats.Q
    d_out = stats.d_out
    total = stats.g.new_zeros(Q, d_out, d_out)
    for a, g in _position_pieces(stats):
        images = times(a, A)
        K = images @ a.mT  # [n, Q, T, T], of the inputs at two positions
        flat = g.flatten(3)  # [n, Q, T, R d_out]
        mixed = (K @ flat).view(g.shape)
        Y = _joined(g.flatten(2, 3))
        Z = _joined(mixed.flatten(2, 3))
        total += Y.mT @ Z
    return total


def _right_through_positions(stats: LayerStats, G: Tensor | None) -> Tensor:
    """sum P^T G P `[Q, d_in, d_in]` as sum_{t,u} (sum_r g_t^T G g_u) a_t a_u^T."""
    Q = stats.Q
    d_in = stats.d_in
    total = stats.g.new_zeros(Q, d_in, d_in)
    for a, g in _position_pieces(stats):
        vectors = g.flatten(2, 3)
        images = times(vectors, G)
        images = images.view(g.shape)
        left = images.flatten(3)  # [n, Q, T, R d_out]
        right = g.flatten(3)
        K = left @ right.mT  # [n, Q, T, T], summed over directions
        X = _joined(a)
        Z = _joined(K @ a)
        total += X.mT @ Z
    return total


def _position_pieces(stats: LayerStats) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs `[n, Q, T, d_in]` and gradients `[n, Q, T, R, d_out]` of some examples at a time."""
    a, g = stats.factors()
    # of a position: its row of K, its input, its gradients and their images
    per_position = 2 * stats.T
    per_position += stats.d_in
    per_position += 2 * stats.R * stats.d_out
    per_example = per_position * stats.T * stats.Q
    bytes_each = per_example * stats.itemsize
    for part in pieces.slices(stats.N, bytes_each, pieces.stream()):
        inputs = a[part].transpose(1, 2)
        gradients = g[:, part]
        gradients = gradients.permute(1, 3, 2, 0, 4)  # [n, Q, T, R, d_out]
        yield inputs, gradients.contiguous()


def _joined(x: Tensor) -> Tensor:
    """`[..., n, Q, T, k]` as `[Q, ... n T, k]`."""
    by_group = x.movedim(-3, 0)
    return by_group.flatten(1, -2)


def _left_of_pieces(stats: LayerStats, A: Tensor | None) -> Iterator[Tensor]:
    """sum P A P^T `[Q, d_out, d_out]`, a piece of the gradients after the other."""
    for P in stats.per_example(pieces.stream()):
        image = times(P, A)  # P A
        X = _columns_of(image)
        Y = _columns_of(P)
        yield X.mT @ Y


def _right_of_pieces(stats: LayerStats, G: Tensor | None) -> Iterator[Tensor]:
    """sum P^T G P `[Q, d_in, d_in]`, a piece of the gradients after the other."""
    for P in stats.per_example(pieces.stream()):
        turned = P.mT
        image = times(turned, G)  # P^T G
        image = image.mT
        X = _rows_of(image)
        Y = _rows_of(P)
        yield X.mT @ Y


def _columns_of(P: Tensor) -> Tensor:
    """The columns `[Q, R n d_in, d_out]` of all matrices in P `[R, n, Q, d_out, d_in]`."""
    by_group = P.movedim(2, 0)
    turned = by_group.mT
    return turned.flatten(1, 3)


def _rows_of(P: Tensor) -> Tensor:
    """The rows `[Q, R n d_out, d_in]` of all matrices in P `[R, n, Q, d_out, d_in]`."""
    by_group = P.movedim(2, 0)
    return by_group.flatten(1, 3)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x `[..., Q, k, n]` times `[Q, n, n]`, a diagonal `[Q, n]`, or None for the identity."""
    if factor is None:
        return x
    if factor.ndim == 3:
        return x @ factor
    return x * factor.unsqueeze(-2)


# -- of inputs and output gradients apart ----------------------------------------------------------
def input_and_gradient_moments(stats: LayerStats, spatial: str) -> tuple[Tensor, Tensor]:
    """A `[Q, d_in, d_in]` and G `[Q, d_out, d_out]` of KFAC.

    Naive form: tests/naive.py (kfac_factors).

    Args:
        stats: the columns, as factors.
        spatial: "expand" takes positions as examples: A = 1/(N T) sum a a^T, G = 1/N sum g g^T;
            "reduce" first takes the mean of a and the sum of g over the positions.
    """
    a, g = stats.factors()
    if spatial == "reduce":
        a = a.mean(1, keepdim=True)
        g = g.sum(2, keepdim=True)
    N, T = a.shape[:2]
    A = second_moment(a, N * T)
    G = second_moment(g, N)
    return A, G


def uncorrelated_positions(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """U1 and U2, `left` and `right`, without products of different positions.

    U1 = 1/N sum_t |a|^2 g g^T and U2 = 1/N sum_t |g|^2 a a^T.

    Naive form: tests/naive.py (tkfac_factors, "expand").
    """
    a, g = stats.factors()
    N = stats.N
    scaled = g * _lengths(a)
    U1 = second_moment(scaled, N)
    scaled = a * _lengths_over_directions(g)
    U2 = second_moment(scaled, N)
    return U1, U2


# -- of the modes of a weight tensor ---------------------------------------------------------------
def modes(stats: LayerStats, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """U_i = 1/N sum mat_i(P) mat_i(P)^T `[Q, n_i, n_i]`, the output first, of the weight proper.

    Naive form: tests/naive.py (unfold, over_modes).

    Args:
        stats: the columns.
        sizes: of the input modes; their product is d_in without the bias column.
    """
    width = prod(sizes)
    weight = stats.inputs(slice(0, width))
    totals: list[Tensor] = []
    for P in weight.per_example(pieces.stream()):
        tensors = P.unflatten(-1, tuple(sizes))
        products = _products_of_modes(tensors)
        if not totals:
            totals = products
            continue
        for mode, product in enumerate(products):
            totals[mode] = totals[mode] + product
    return tuple(total / stats.N for total in totals)


def _products_of_modes(P: Tensor) -> list[Tensor]:
    """sum mat_i(P) mat_i(P)^T `[Q, n_i, n_i]` of P `[R, n, Q, n_1, ..., n_k]` for every mode i."""
    columns = P.flatten(0, 1)
    columns = columns.transpose(0, 1)  # [Q, R n, n_1, ..., n_k]
    products = []
    for axis in range(2, columns.ndim):
        unfolded = torch.movedim(columns, axis, 1)
        M = unfolded.flatten(2)  # [Q, n_i, rest]
        product = M @ M.mT
        products.append(product)
    return products
