"""Products with the per-example gradients P_rn, mostly without forming them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_lab.statistics.layer_stats import LayerStats


def project(stats: LayerStats, V: Tensor) -> Tensor:
    """<P_rn, V> `[..., R, N]` for V `[..., Q * d_out, d_in]`.

    Naive form: `(P * V).sum()` for every r and n; tests/statistics/test_contractions.py.
    """
    groups = (stats.Q, stats.d_out)
    V = V.unflatten(-2, groups)
    if stats.a is None:
        return torch.einsum("rnqoi,...qoi->...rn", stats.g, V)
    if _is_lean(stats) and V.ndim == 3:
        images = stats.a[:, 0, 0] @ V[0].T
        return torch.linalg.vecdot(stats.g[:, :, 0, 0], images)
    images = torch.einsum("ntqi,...qoi->...ntqo", stats.a, V)  # V a
    return torch.einsum("rntqo,...ntqo->...rn", stats.g, images)


def combine(stats: LayerStats, s: Tensor) -> Tensor:
    """sum_{r,n} s_rn P_rn `[..., Q * d_out, d_in]` for s `[..., R, N]`.

    Naive form: the sum of `s[r, n] * P[r, n]`; tests/statistics/test_contractions.py.
    """
    if stats.a is None:
        V = torch.einsum("...rn,rnqoi->...qoi", s, stats.g)
    elif _is_lean(stats) and s.ndim == 2:
        weighted = (s.unsqueeze(-1) * stats.g[:, :, 0, 0]).sum(0)
        return weighted.T @ stats.a[:, 0, 0]
    else:
        # directions are summed before the products with a
        weighted = torch.einsum("...rn,rntqo->...ntqo", s, stats.g)
        V = torch.einsum("...ntqo,ntqi->...qoi", weighted, stats.a)
    return V.flatten(-3, -2)


def _is_lean(stats: LayerStats) -> bool:
    """Whether there is one position and one group: plain products, which Krylov methods take by the
    hundred, take then half the time of sums over all indices.
    """
    return stats.a is not None and stats.T == 1 and stats.Q == 1


def apply(stats: LayerStats, X: Tensor, weight: Tensor | None = None) -> Tensor:
    """F X = sum_{r,n} c_n <P_rn, X> P_rn for X `[..., Q * d_out, d_in]`.

    Naive form: `dense(stats) @ X.flatten()`; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        X: one array or several.
        weight: c `[..., N]`; None for 1/N.
    """
    if weight is None:
        N = stats.N
        weight = stats.g.new_full((N,), 1 / N)
    many = X.numel() // stats.dim
    if _through_factors(stats, many):
        s = project(stats, X)
        weighted = s * weight.unsqueeze(-2)
        return combine(stats, weighted)
    V = X.reshape(many, stats.dim)
    products = _apply_gradients(stats, V, weight)
    return products.view(X.shape)


def _apply_gradients(stats: LayerStats, V: Tensor, weight: Tensor) -> Tensor:
    """F V for V `[many, d]`; every piece of P is formed once and used for all of them."""
    total = torch.zeros_like(V)
    start = 0
    for P in stats.per_example():
        U = rows_of(P)  # [n R, d]
        n = P.shape[1]
        c = weight[..., start : start + n]
        c = c.repeat_interleave(stats.R, -1)  # of every column
        s = V @ U.T
        total.addmm_(s * c, U)
        start += n
    return total


def _through_factors(stats: LayerStats, many: int) -> bool:
    """Whether products with a and g cost less than with P, for `many` arrays at once."""
    if stats.rank_one or stats.a is None:
        return True
    if stats.formed:
        return False
    # with every array the factors take two products at each position, P once formed only one;
    # forming it pays off unless the arrays are few
    return 2 * many < stats.R


def with_gradients(stats: LayerStats, most_bytes: float) -> LayerStats:
    """The same statistics with P formed once and for all, if positions are shared and P fits.

    With one position P is no sum, and the routes through a and g are better in everything.
    """
    needed = stats.N * stats.gradient_bytes
    if stats.T == 1 or needed > most_bytes:
        return stats
    return stats.with_gradients()


def rows_of(P: Tensor) -> Tensor:
    """P `[R, n, Q, d_out, d_in]` as `[n R, d]`, which is how chunks of it lie in memory."""
    R, n = P.shape[:2]
    by_example = P.transpose(0, 1)
    return by_example.reshape(n * R, -1)
