"""|F - G (x) A|_F^2 without cancellation, by centring the features H_n = sum_r g g^T and X_n = a
a^T.

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
        scaled = self.g * self.w.sqrt()[:, None, None]
        rows = scaled.flatten(0, 1)
        self.H = rows.T @ rows
        self.X = self.a.T @ (self.a * self.w[:, None])
        # G (x) A, to be compared with c Hbar (x) Xbar, is c G' (x) A' with an A' that has the trace
        # of Xbar
        ratio = float(self.X.trace() / self.A.trace())
        self.A = self.A * ratio
        self.G = self.G / (ratio * self.c)
        # what is left of the means: dG (x) A + Hbar (x) dA
        self.dG = self.G - self.H
        self.dA = self.A - self.X
        square = (
            self.H.square().sum() * self.dA.square().sum()
            + self.dG.square().sum() * self.A.square().sum()
        )
        cross = (self.H * self.dG).sum() * (self.A * self.dA).sum()
        self.rest = float(square + 2 * cross)

    def centred(self, part: slice) -> tuple[Tensor, Tensor]:
        """H_n - Hbar and X_n - Xbar, flattened."""
        g = self.g[part]
        a = self.a[part]
        H = g.transpose(1, 2) @ g
        X = a[:, :, None] * a[:, None, :]
        return (H - self.H).flatten(1), (X - self.X).flatten(1)

    def square(self) -> float:
        """|F - G (x) A|_F^2."""
        # a few examples at a time, because their features are squares of their columns
        item = self.a.element_size() * (self.H.numel() + self.X.numel())
        pieces = list(slices(len(self.a), item))
        total = 0.0
        cross = 0.0
        for i, rows in enumerate(pieces):
            Hr, Xr = self.centred(rows)
            w = self.w[rows]
            with_A = (Hr @ self.dG.flatten()) * (Xr @ self.A.flatten())
            with_H = (Hr @ self.H.flatten()) * (Xr @ self.dA.flatten())
            cross += float((w * (with_H + with_A)).sum())
            for columns in pieces[i:]:
                same = columns == rows
                Hc, Xc = (Hr, Xr) if same else self.centred(columns)
                products = (Hr @ Hc.T) * (Xr @ Xc.T)
                block = w @ products @ self.w[columns]
                total += (1 if same else 2) * float(block)  # the other triangle is the same
        return self.c**2 * (total - 2 * cross + self.rest)


def centring_flops(stats: LayerStats) -> float:
    """Work of `kronecker_difference`."""
    return float(stats.N**2 * (stats.d_out**2 + stats.d_in**2))


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
    equal = _Features(a, g, torch.full_like(a[:, 0], 1 / stats.N), 1.0, G, A)
    norms_a = a.square().sum(1)
    norms_g = g.square().sum((1, 2))
    size = norms_a * norms_g
    t = float(size.mean())
    unit_a = a / _safe_root(norms_a)[:, None]
    unit_g = g / _safe_root(norms_g)[:, None, None]
    unit = _Features(unit_a, unit_g, size / (t * stats.N), t, G, A)
    nearest = equal if equal.rest <= t**2 * unit.rest else unit
    return nearest.square()


def _safe_root(squares: Tensor) -> Tensor:
    """Roots to divide by: 1 where there is nothing to divide."""
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
