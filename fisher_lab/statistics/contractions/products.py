"""Products with the per-example gradients P_rn, mostly without forming them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_lab.statistics.layer_stats import LayerStats


def project(stats: LayerStats, V: Tensor) -> Tensor:
    """<P_rn, V> `[..., R, N]` for V `[..., Q * d_out, d_in]`.

    Naive form: `(P * V).sum()` for every r and n; tests/statistics/test_contractions.py.
    """
    V = V.unflatten(-2, (stats.Q, stats.d_out))
    if stats.a is None:
        return torch.einsum("rnqoi,...qoi->...rn", stats.g, V)
    images = torch.einsum("ntqi,...qoi->...ntqo", stats.a, V)  # V a
    return torch.einsum("rntqo,...ntqo->...rn", stats.g, images)


def combine(stats: LayerStats, s: Tensor) -> Tensor:
    """sum_{r,n} s_rn P_rn `[..., Q * d_out, d_in]` for s `[..., R, N]`.

    Naive form: the sum of `s[r, n] * P[r, n]`; tests/statistics/test_contractions.py.
    """
    if stats.a is None:
        V = torch.einsum("...rn,rnqoi->...qoi", s, stats.g)
    else:
        weighted = torch.einsum("...rn,rntqo->...ntqo", s, stats.g)  # directions go before the products with a
        V = torch.einsum("...ntqo,ntqi->...qoi", weighted, stats.a)
    return V.flatten(-3, -2)


def apply(stats: LayerStats, X: Tensor, weight: Tensor | None = None) -> Tensor:
    """F X = sum_{r,n} c_n <P_rn, X> P_rn for X `[..., Q * d_out, d_in]`.

    Naive form: `dense(stats) @ X.flatten()`; tests/statistics/test_contractions.py.

    Args:
        stats: the columns.
        X: one array or several.
        weight: c `[..., N]`; None for 1/N.
    """
    if weight is None:
        weight = stats.g.new_full((stats.N,), 1 / stats.N)
    many = X.numel() // stats.dim
    if _through_factors(stats, many):
        s = project(stats, X)
        return combine(stats, s * weight.unsqueeze(-2))
    # every piece of P is formed once and used for all X
    V = X.reshape(many, stats.dim)
    total = torch.zeros_like(V)
    start = 0
    for P in stats.per_example():
        U = rows_of(P)  # [n R, d]
        c = weight[..., start : start + P.shape[1]].repeat_interleave(stats.R, -1)
        total.addmm_((V @ U.T) * c, U)
        start += P.shape[1]
    return total.view(X.shape)


def with_gradients(stats: LayerStats, most_bytes: float) -> LayerStats:
    """The same statistics with P formed once and for all, if positions are shared and they fit.

    With one position P is no sum and the routes through a and g are better in everything.
    """
    needed = stats.N * stats.gradient_bytes
    if stats.T == 1 or needed > most_bytes:
        return stats
    return stats.with_gradients()


def _through_factors(stats: LayerStats, many: int) -> bool:
    """Whether products with a and g cost less than with P, for `many` arrays at once."""
    if stats.rank_one or stats.a is None:
        return True
    # at T positions a product through the factors costs about T times one with P, and forming P as much as R / 2
    return not stats.formed and 2 * many < stats.R


def rows_of(P: Tensor) -> Tensor:
    """P `[R, n, Q, d_out, d_in]` as `[n R, d]`, which is how chunks of it lie in memory."""
    R, n = P.shape[:2]
    return P.transpose(0, 1).reshape(n * R, -1)
