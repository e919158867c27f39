"""|F - G (x) A|_F^2 without cancellation, by centring the features H_n = sum_r g g^T and X_n = a a^T.

With weights w_n summing to 1, H_n (x) X_n scaled so that F = c sum w_n H_n (x) X_n, and the means Hbar and Xbar,

    F = c [ Hbar (x) Xbar + sum w_n (H_n - Hbar) (x) (X_n - Xbar) ].

KFAC is c Hbar (x) Xbar for equal weights and TKFAC for w_n ~ |a_n|^2 |g_n|^2 with features of trace 1, so for them only
the covariance is left; any other Kronecker product adds its own small difference from the nearer of the two.
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
        weighted = self.w[:, None]
        x = (self.g * self.w.sqrt()[:, None, None]).flatten(0, 1)
        self.H, self.X = x.T @ x, self.a.T @ (self.a * weighted)
        ratio = float(self.X.trace() / self.A.trace())
        self.A, self.G = self.A * ratio, self.G / (ratio * self.c)  # c G (x) A is the matrix to compare with
        self.dG, self.dA = self.G - self.H, self.A - self.X
        square = self.H.square().sum() * self.dA.square().sum() + self.dG.square().sum() * self.A.square().sum()
        self.rest = float(square + 2 * (self.H * self.dG).sum() * (self.A * self.dA).sum())

    def centred(self, part: slice) -> tuple[Tensor, Tensor]:
        """H_n - Hbar and X_n - Xbar, flattened."""
        g, a = self.g[part], self.a[part]
        return (g.transpose(1, 2) @ g - self.H).flatten(1), (a[:, :, None] * a[:, None, :] - self.X).flatten(1)

    def square(self) -> float:
        """|F - G (x) A|_F^2."""
        item = self.a.element_size() * (self.H.numel() + self.X.numel())
        total = cross = 0.0
        for rows in slices(len(self.a), item):
            Hr, Xr = self.centred(rows)
            w = self.w[rows]
            terms = (Hr @ self.H.flatten()) * (Xr @ self.dA.flatten())
            cross += float((w * (terms + (Hr @ self.dG.flatten()) * (Xr @ self.A.flatten()))).sum())
            for columns in slices(len(self.a), item):
                if columns.start < rows.start:
                    continue
                Hc, Xc = (Hr, Xr) if columns == rows else self.centred(columns)
                block = w @ ((Hr @ Hc.T) * (Xr @ Xc.T)) @ self.w[columns]
                total += (1 if columns == rows else 2) * float(block)
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
    a, g = stats.a[:, 0, 0], stats.g[:, :, 0, 0].transpose(0, 1)
    equal = _Features(a, g, torch.full_like(a[:, 0], 1 / stats.N), 1.0, G, A)
    norms = a.square().sum(1), g.square().sum((1, 2))
    size = norms[0] * norms[1]
    t = float(size.mean())
    safe = [torch.where(n > 0, n, torch.ones_like(n)).sqrt() for n in norms]
    unit = _Features(a / safe[0][:, None], g / safe[1][:, None, None], size / (t * stats.N), t, G, A)
    nearest = equal if equal.rest <= t**2 * unit.rest else unit
    return nearest.square()
