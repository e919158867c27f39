"""Second moments of the rows and columns of the per-example gradients, and of inputs and output gradients alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from fisher_lab.statistics import pieces
from fisher_lab.statistics.layer_stats import LayerStats


def second_moment(x: Tensor, N: float = 1) -> Tensor:
    """1/N sum of x x^T over all but the last two axes: `[..., Q, n]` -> `[Q, n, n]`."""
    rows = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # [Q, all, n]
    return (rows.transpose(1, 2) @ rows).div_(N)


# -- of the gradients P ----------------------------------------------------------------------------
def left(stats: LayerStats, A: Tensor | None = None) -> Tensor:
    """1/N sum P A P^T `[Q, d_out, d_out]`; U1 without A.

    Naive form: `sum(p @ A @ p.T) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        A: symmetric `[Q, d_in, d_in]`, a diagonal `[Q, d_in]`, or None for the identity.
    """
    if stats.rank_one and A is None:  # P P^T = |a|^2 g g^T
        a, g = stats.factors()
        size = a.square().sum(-1).sqrt()  # [N, T, Q]
        return second_moment(g * size[None, ..., None], stats.N)
    o, i, T, R = stats.d_out, stats.d_in, stats.T, stats.R
    times_A = 0 if A is None else i * i
    gram_of_inputs = T * i
    products = R * o * (T + o)
    if _through_positions(stats, times_A + gram_of_inputs + products):
        total = _left_through_positions(*stats.factors(), A)
    else:
        total = pieces.accumulated(_moment_of_rows(times(P, A), P) for P in stats.per_example(pieces.STREAM_BYTES))
    return total.div_(stats.N)


def right(stats: LayerStats, G: Tensor | None = None) -> Tensor:
    """1/N sum P^T G P `[Q, d_in, d_in]`; U2 without G.

    Naive form: `sum(p.T @ G @ p) / N`, group by group; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        G: symmetric `[Q, d_out, d_out]`, a diagonal `[Q, d_out]`, or None for the identity.
    """
    if stats.rank_one and G is None:  # sum_r P^T P = (sum_r |g_r|^2) a a^T
        a, g = stats.factors()
        size = g.square().sum((0, -1)).sqrt()  # [N, T, Q]
        return second_moment(a * size[..., None], stats.N)
    o, i, T, R = stats.d_out, stats.d_in, stats.T, stats.R
    times_G = 0 if G is None else R * o * o
    gram_of_gradients = R * o * T
    products = i * (T + i)
    if _through_positions(stats, times_G + gram_of_gradients + products):
        total = _right_through_positions(*stats.factors(), G)
    else:
        total = pieces.accumulated(_right_of_piece(P, G) for P in stats.per_example(pieces.STREAM_BYTES))
    return total.div_(stats.N)


def _through_positions(stats: LayerStats, per_position: float) -> bool:
    """Whether a second moment costs less through positions than through P, which must be formed unless at hand.

    Args:
        stats: the columns.
        per_position: multiplications for each position, the other way.
    """
    if stats.a is None:
        return False
    forming = 0 if stats.formed else stats.T
    through_gradients = stats.R * stats.d_out * stats.d_in * (stats.d_out + stats.d_in + forming)
    return stats.T * per_position < through_gradients


def _left_through_positions(a: Tensor, g: Tensor, A: Tensor | None) -> Tensor:
    """sum P A P^T `[Q, d_out, d_out]` as sum_{t,u} (a_t^T A a_u) g_t g_u^T."""
    Q, d_out = g.shape[3:]
    total = g.new_zeros(Q, d_out, d_out)
    for part in pieces.slices(len(a), _position_bytes(a, g), pieces.STREAM_BYTES):
        x = a[part].transpose(1, 2)  # [n, Q, T, d_in]
        y = g[:, part].permute(1, 3, 2, 0, 4).contiguous()  # [n, Q, T, R, d_out]
        K = times(x, A) @ x.transpose(-1, -2)  # [n, Q, T, T], the products of the inputs of two positions
        z = (K @ y.flatten(3)).view(y.shape)
        total += _joined(y.flatten(2, 3)).transpose(1, 2) @ _joined(z.flatten(2, 3))
    return total


def _right_through_positions(a: Tensor, g: Tensor, G: Tensor | None) -> Tensor:
    """sum P^T G P `[Q, d_in, d_in]` as sum_{t,u} (sum_r g_t^T G g_u) a_t a_u^T."""
    Q, d_in = a.shape[2:]
    total = g.new_zeros(Q, d_in, d_in)
    for part in pieces.slices(len(a), _position_bytes(a, g), pieces.STREAM_BYTES):
        x = a[part].transpose(1, 2)  # [n, Q, T, d_in]
        y = g[:, part].permute(1, 3, 2, 0, 4).contiguous()  # [n, Q, T, R, d_out]
        z = times(y.flatten(2, 3), G).view(y.shape)
        K = z.flatten(3) @ y.flatten(3).transpose(-1, -2)  # [n, Q, T, T], summed over directions
        total += _joined(x).transpose(1, 2) @ _joined(K @ x)
    return total


def _position_bytes(a: Tensor, g: Tensor) -> int:
    """Memory of one example's inputs, gradients and their products of positions."""
    R, _, T, Q, d_out = g.shape
    numbers = 2 * T + a.shape[-1] + 2 * R * d_out
    return numbers * T * Q * g.element_size()


def _joined(x: Tensor) -> Tensor:
    """`[..., n, Q, T, k]` as `[Q, ... n T, k]`."""
    return x.movedim(-3, 0).flatten(1, -2)


def _moment_of_rows(X: Tensor, Y: Tensor) -> Tensor:
    """sum X Y^T `[Q, d_out, d_out]` over examples and directions of `[R, n, Q, d_out, d_in]`."""
    X = X.movedim(2, 0).transpose(-1, -2).flatten(1, 3)  # [Q, R n d_in, d_out]
    Y = Y.movedim(2, 0).transpose(-1, -2).flatten(1, 3)
    return X.transpose(1, 2) @ Y


def _right_of_piece(P: Tensor, G: Tensor | None) -> Tensor:
    """sum P^T G P `[Q, d_in, d_in]` over examples and directions of P `[R, n, Q, d_out, d_in]`."""
    image = times(P.transpose(-1, -2), G).transpose(-1, -2)  # G P
    X = image.movedim(2, 0).flatten(1, 3)  # [Q, R n d_out, d_in]
    Y = P.movedim(2, 0).flatten(1, 3)
    return X.transpose(1, 2) @ Y


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
        spatial: "expand" takes positions as examples: A = 1/(N T) sum a a^T, G = 1/N sum g g^T; "reduce" first takes
            the mean of a and the sum of g over the positions.
    """
    a, g = stats.factors()
    if spatial == "reduce":
        a = a.mean(1, keepdim=True)
        g = g.sum(2, keepdim=True)
    N, T = a.shape[:2]
    return second_moment(a, N * T), second_moment(g, N)


def uncorrelated_positions(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """U1 = 1/N sum_t |a|^2 g g^T and U2 = 1/N sum_t |g|^2 a a^T: `left` and `right` without products of positions.

    Naive form: tests/naive.py (tkfac_factors, "expand").
    """
    a, g = stats.factors()
    input_size = a.square().sum(-1).sqrt()  # [N, T, Q]
    gradient_size = g.square().sum((0, -1)).sqrt()  # [N, T, Q]
    U1 = second_moment(g * input_size[None, ..., None], stats.N)
    U2 = second_moment(a * gradient_size[..., None], stats.N)
    return U1, U2


# -- of the modes of a weight tensor ---------------------------------------------------------------
def modes(stats: LayerStats, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """U_i = 1/N sum mat_i(P) mat_i(P)^T `[Q, n_i, n_i]` for every mode of the weight proper, the output first.

    Naive form: tests/naive.py (unfold, over_modes).

    Args:
        stats: the columns.
        sizes: of the input modes; their product is d_in without the bias column.
    """
    weight = stats.inputs(slice(0, prod(sizes)))
    totals: list[Tensor] = []
    for P in weight.per_example(pieces.STREAM_BYTES):
        products = [M @ M.transpose(1, 2) for M in _unfoldings(P.unflatten(-1, tuple(sizes)))]
        totals = products if not totals else [x + y for x, y in zip(totals, products, strict=True)]
    return tuple(total / stats.N for total in totals)


def _unfoldings(P: Tensor) -> Iterator[Tensor]:
    """Mode unfoldings `[Q, n_i, rest]` of per-example gradients P `[R, n, Q, n_1, ..., n_k]`."""
    P = P.flatten(0, 1).transpose(0, 1)  # [Q, columns, n_1, ..., n_k]
    for mode in range(2, P.ndim):
        yield torch.movedim(P, mode, 1).flatten(2)
