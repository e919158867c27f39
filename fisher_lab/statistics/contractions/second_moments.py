"""Second moments of the rows and columns of the per-example gradients, and of inputs and output
gradients alone.
"""

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
    rows = x.reshape(-1, Q, n)
    rows = rows.transpose(0, 1)  # [Q, all, n]
    total = rows.transpose(1, 2) @ rows
    return total.div_(N)


# -- of the gradients P ----------------------------------------------------------------------------
def left(stats: LayerStats, A: Tensor | None = None) -> Tensor:
    """1/N sum P A P^T `[Q, d_out, d_out]`; U1 without A.

    Naive form: `sum(p @ A @ p.T) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        A: symmetric `[Q, d_in, d_in]`, a diagonal `[Q, d_in]`, or None for the identity.
    """
    if stats.rank_one and A is None:
        # P P^T = |a|^2 g g^T
        a, g = stats.factors()
        size = a.square().sum(-1)
        size = size.sqrt()[..., None]  # [N, T, Q, 1]
        return second_moment(g * size, stats.N)
    R, T, o, i = stats.R, stats.T, stats.d_out, stats.d_in
    # multiplications for each position on the way through positions
    need = T * i + R * o * (T + o)
    if A is not None:
        need += i * i
    if _through_positions(stats, need):
        a, g = stats.factors()
        total = _left_through_positions(a, g, A)
    else:
        total = pieces.accumulated(_left_of_pieces(stats, A))
    return total.div_(stats.N)


def right(stats: LayerStats, G: Tensor | None = None) -> Tensor:
    """1/N sum P^T G P `[Q, d_in, d_in]`; U2 without G.

    Naive form: `sum(p.T @ G @ p) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        G: symmetric `[Q, d_out, d_out]`, a diagonal `[Q, d_out]`, or None for the identity.
    """
    if stats.rank_one and G is None:
        # sum_r P^T P = (sum_r |g_r|^2) a a^T
        a, g = stats.factors()
        size = g.square().sum((0, -1))
        size = size.sqrt()[..., None]  # [N, T, Q, 1]
        return second_moment(a * size, stats.N)
    R, T, o, i = stats.R, stats.T, stats.d_out, stats.d_in
    # multiplications for each position on the way through positions
    need = R * o * T + i * (T + i)
    if G is not None:
        need += R * o * o
    if _through_positions(stats, need):
        a, g = stats.factors()
        total = _right_through_positions(a, g, G)
    else:
        total = pieces.accumulated(_right_of_pieces(stats, G))
    return total.div_(stats.N)


def _through_positions(stats: LayerStats, per_position: float) -> bool:
    """Whether a second moment costs less through positions than through P, which must be formed
    unless at hand.

    Args:
        stats: the columns.
        per_position: multiplications for each position, the former way.
    """
    if stats.a is None:
        return False
    forming = 0 if stats.formed else stats.T
    per_entry = stats.d_out + stats.d_in + forming
    through_gradients = stats.R * stats.d_out * stats.d_in * per_entry
    return stats.T * per_position < through_gradients


def _left_through_positions(a: Tensor, g: Tensor, A: Tensor | None) -> Tensor:
    """sum P A P^T `[Q, d_out, d_out]` as sum_{t,u} (a_t^T A a_u) g_t g_u^T."""
    Q, d_out = g.shape[3:]
    total = g.new_zeros(Q, d_out, d_out)
    for x, y in _position_pieces(a, g):
        # [n, Q, T, T], products of the inputs at two positions
        K = times(x, A) @ x.transpose(-1, -2)
        z = (K @ y.flatten(3)).view(y.shape)
        Y = _joined(y.flatten(2, 3))
        Z = _joined(z.flatten(2, 3))
        total += Y.transpose(1, 2) @ Z
    return total


def _right_through_positions(a: Tensor, g: Tensor, G: Tensor | None) -> Tensor:
    """sum P^T G P `[Q, d_in, d_in]` as sum_{t,u} (sum_r g_t^T G g_u) a_t a_u^T."""
    Q, d_in = a.shape[2:]
    total = g.new_zeros(Q, d_in, d_in)
    for x, y in _position_pieces(a, g):
        z = times(y.flatten(2, 3), G).view(y.shape)
        K = z.flatten(3) @ y.flatten(3).transpose(-1, -2)  # [n, Q, T, T], summed over directions
        X = _joined(x)
        Z = _joined(K @ x)
        total += X.transpose(1, 2) @ Z
    return total


def _position_pieces(a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs `[n, Q, T, d_in]` and gradients `[n, Q, T, R, d_out]` of some examples after the
    other.
    """
    R, N, T, Q, d_out = g.shape
    # of an example: K, inputs, gradients and their images
    numbers = 2 * T + a.shape[-1] + 2 * R * d_out
    bytes_each = numbers * T * Q * g.element_size()
    for part in pieces.slices(N, bytes_each, pieces.STREAM_BYTES):
        x = a[part].transpose(1, 2)
        y = g[:, part].permute(1, 3, 2, 0, 4)
        yield x, y.contiguous()


def _joined(x: Tensor) -> Tensor:
    """`[..., n, Q, T, k]` as `[Q, ... n T, k]`."""
    return x.movedim(-3, 0).flatten(1, -2)


def _left_of_pieces(stats: LayerStats, A: Tensor | None) -> Iterator[Tensor]:
    """sum P A P^T `[Q, d_out, d_out]`, a piece of the gradients after the other."""
    for P in stats.per_example(pieces.STREAM_BYTES):
        X = _columns_of(times(P, A))
        Y = _columns_of(P)
        yield X.transpose(1, 2) @ Y


def _right_of_pieces(stats: LayerStats, G: Tensor | None) -> Iterator[Tensor]:
    """sum P^T G P `[Q, d_in, d_in]`, a piece of the gradients after the other."""
    for P in stats.per_example(pieces.STREAM_BYTES):
        image = times(P.transpose(-1, -2), G)  # P^T G
        X = _rows_of(image.transpose(-1, -2))
        Y = _rows_of(P)
        yield X.transpose(1, 2) @ Y


def _columns_of(P: Tensor) -> Tensor:
    """The columns `[Q, R n d_in, d_out]` of all matrices in P `[R, n, Q, d_out, d_in]`."""
    turned = P.movedim(2, 0).transpose(-1, -2)
    return turned.flatten(1, 3)


def _rows_of(P: Tensor) -> Tensor:
    """The rows `[Q, R n d_out, d_in]` of all matrices in P `[R, n, Q, d_out, d_in]`."""
    return P.movedim(2, 0).flatten(1, 3)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x `[..., Q, k, n]` times a factor `[Q, n, n]`, a diagonal `[Q, n]`, or None for the identity."""
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
    """U1 = 1/N sum_t |a|^2 g g^T and U2 = 1/N sum_t |g|^2 a a^T: `left` and `right` without
    products of positions.

    Naive form: tests/naive.py (tkfac_factors, "expand").
    """
    a, g = stats.factors()
    of_input = a.square().sum(-1)
    of_input = of_input.sqrt()[..., None]  # |a| `[N, T, Q, 1]`
    of_gradient = g.square().sum((0, -1))
    of_gradient = of_gradient.sqrt()[..., None]  # |g| `[N, T, Q, 1]`
    U1 = second_moment(g * of_input, stats.N)
    U2 = second_moment(a * of_gradient, stats.N)
    return U1, U2


# -- of the modes of a weight tensor ---------------------------------------------------------------
def modes(stats: LayerStats, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """U_i = 1/N sum mat_i(P) mat_i(P)^T `[Q, n_i, n_i]` for every mode of the weight proper, the
    output first.

    Naive form: tests/naive.py (unfold, over_modes).

    Args:
        stats: the columns.
        sizes: of the input modes; their product is d_in without the bias column.
    """
    weight = stats.inputs(slice(0, prod(sizes)))
    totals: list[Tensor] = []
    for P in weight.per_example(pieces.STREAM_BYTES):
        tensors = P.unflatten(-1, tuple(sizes))
        for mode, M in enumerate(_unfoldings(tensors)):
            product = M @ M.transpose(1, 2)
            if mode < len(totals):
                totals[mode] = totals[mode] + product
            else:
                totals.append(product)
    return tuple(total / stats.N for total in totals)


def _unfoldings(P: Tensor) -> Iterator[Tensor]:
    """Mode unfoldings `[Q, n_i, rest]` of per-example gradients P `[R, n, Q, n_1, ..., n_k]`."""
    columns = P.flatten(0, 1).transpose(0, 1)  # [Q, columns, n_1, ..., n_k]
    for mode in range(2, P.ndim - 1):
        unfolded = torch.movedim(columns, mode, 1)
        yield unfolded.flatten(2)
