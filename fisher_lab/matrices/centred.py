"""|F - G (x) A|_F^2 without cancellation, by centred features of the examples.

The features are H_n = sum_r g g^T and X_n = a a^T.

With weights w_n summing to 1, H_n (x) X_n scaled so that F = c sum w_n H_n (x) X_n, and the means
Hbar and Xbar,

    F = c [ Hbar (x) Xbar + sum w_n (H_n - Hbar) (x) (X_n - Xbar) ].

KFAC is c Hbar (x) Xbar for equal weights and TKFAC for w_n ~ |a_n|^2 |g_n|^2 with features of trace
1, so for them only the covariance is left; any other Kronecker product adds its own small
difference from the nearer of the two.

The naive twin is the dense difference in tests/scale/test_matrix_free.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.statistics import LayerStats
from fisher_lab.statistics.pieces import slices


@dataclass
class _Features:
    """Weighted features of the examples and their distance from a Kronecker product."""

    a: Tensor  # [N, d_in]
    g: Tensor  # [N, R, d_out]
    w: Tensor  # [N]
    c: float
    G: Tensor  # [d_out, d_out]
    A: Tensor  # [d_in, d_in]

    def __post_init__(self) -> None:
        # the means of the features
        roots = self.w.sqrt()
        rows = (self.g * roots[:, None, None]).flatten(0, 1)
        self.H = rows.T @ rows
        weighted = self.a * self.w[:, None]
        self.X = self.a.T @ weighted
        # G (x) A, to be compared with c Hbar (x) Xbar, is c G' (x) A' with an A' that has the trace
        # of Xbar
        ratio = float(self.X.trace() / self.A.trace())
        self.A = self.A * ratio
        self.G = self.G / (ratio * self.c)
        # what is left of the means: dG (x) A + Hbar (x) dA
        self.dG = self.G - self.H
        self.dA = self.A - self.X
        with_dA = self.H.square().sum() * self.dA.square().sum()
        with_dG = self.dG.square().sum() * self.A.square().sum()
        cross_left = (self.H * self.dG).sum()
        cross_right = (self.A * self.dA).sum()
        square = with_dA + with_dG
        cross = cross_left * cross_right
        self.rest = float(square + 2 * cross)

    def centred(self, part: slice) -> tuple[Tensor, Tensor]:
        """H_n - Hbar and X_n - Xbar, flattened."""
        g = self.g[part]
        a = self.a[part]
        H = g.transpose(1, 2) @ g
        X = a[:, :, None] * a[:, None, :]
        left = H - self.H
        right = X - self.X
        return left.flatten(1), right.flatten(1)

    def square(self) -> float:
        """|F - G (x) A|_F^2."""
        # a few examples at a time, because their features are squares of their columns
        entries = self.H.numel() + self.X.numel()
        item = self.a.element_size() * entries
        pieces = list(slices(len(self.a), item))
        total = 0.0
        cross = 0.0
        for i, rows in enumerate(pieces):
            H, X = self.centred(rows)
            w = self.w[rows]
            cross += self._with_rest(H, X, w)
            # the covariance is symmetric: pieces after this one count twice
            total += self._covariance(H, X, w, H, X, w)
            for columns in pieces[i + 1 :]:
                others = self.centred(columns)
                total += 2 * self._covariance(H, X, w, *others, self.w[columns])
        return self.c**2 * (total - 2 * cross + self.rest)

    def _with_rest(self, H: Tensor, X: Tensor, w: Tensor) -> float:
        """Inner product of what some centred features sum to with dG (x) A + Hbar (x) dA."""
        with_A = (H @ self.dG.flatten()) * (X @ self.A.flatten())
        with_H = (H @ self.H.flatten()) * (X @ self.dA.flatten())
        products = w * (with_H + with_A)
        return float(products.sum())

    @staticmethod
    def _covariance(
        H: Tensor, X: Tensor, w: Tensor, others_H: Tensor, others_X: Tensor, others_w: Tensor
    ) -> float:
        """Inner product of what two pieces of centred features sum to."""
        left = H @ others_H.T
        right = X @ others_X.T
        products = left * right
        return float(w @ products @ others_w)


def centring_flops(stats: LayerStats) -> float:
    """Work of `kronecker_difference`."""
    squares = stats.d_out**2 + stats.d_in**2
    return float(stats.N**2 * squares)


def kronecker_difference(stats: LayerStats, G: Tensor, A: Tensor) -> float:
    """|F - G (x) A|_F^2 for rank-one columns of one group.

    Args:
        stats: the columns of F, T = 1 and Q = 1.
        G: left factor `[d_out, d_out]`.
        A: right factor `[d_in, d_in]`.
    """
    assert stats.a is not None
    a = stats.a[:, 0, 0]
    g = stats.g[:, :, 0, 0].transpose(0, 1)
    ones = torch.full_like(a[:, 0], 1 / stats.N)
    equal = _Features(a, g, ones, 1.0, G, A)
    # features of trace 1, weighted by what their traces were: those of TKFAC
    norms_a = a.square().sum(1)
    norms_g = g.square().sum((1, 2))
    size = norms_a * norms_g
    t = float(size.mean())
    unit_a = a / _safe_root(norms_a)[:, None]
    unit_g = g / _safe_root(norms_g)[:, None, None]
    weights = size / (t * stats.N)
    unit = _Features(unit_a, unit_g, weights, t, G, A)
    # from the nearer product the least is left over, and cancels the least
    if equal.rest <= t**2 * unit.rest:
        return equal.square()
    return unit.square()


def _safe_root(squares: Tensor) -> Tensor:
    """Roots to divide by: 1 where there is nothing to divide."""
    ones = torch.ones_like(squares)
    safe = torch.where(squares > 0, squares, ones)
    return safe.sqrt()
