"""Sums over examples, positions and directions, each in the order that costs least. Tensors only, no nouns.

Symbols as in `stats`: a `[N, T, Q, d_in]`, g `[R, N, T, Q, d_out]`, P = sum_t g a^T, H_n = sum_r g_rn g_rn^T.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # factors of products are formed in pieces of this size
STREAM_BYTES = 8 * 2**20  # passing tensors in pieces of this one: memory that the allocator has at hand
KEPT_BYTES = 256 * 2**20  # sums worth keeping may take this much


def slices(count: int, bytes_each: float, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """Pieces of `count` examples that take at most `chunk_bytes` (or one example)."""
    step = max(1, int(chunk_bytes // max(1, bytes_each)))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def second_moment(x: Tensor, N: float = 1) -> Tensor:
    """1/N sum of x x^T over all but the last two axes: `[..., Q, n]` -> `[Q, n, n]`."""
    x = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)
    return (x.transpose(1, 2) @ x).div_(N)


def outer_gram(g: Tensor, h: Tensor | None = None) -> Tensor:
    """<H_n, H'_m>_F `[N, N']` for g `[R, N, d_out]` and h `[R', N', d_out]` (default: g itself)."""
    symmetric, h = h is None, g if h is None else h
    R, N, d_out = g.shape
    pairs = R * (R + 1) / 2 if symmetric else R * h.shape[0]
    if d_out <= pairs:  # through H, in pieces of it
        K = g.new_empty(N, h.shape[1])
        for rows in slices(N, d_out**2 * g.element_size()):
            H = _outer(g[:, rows])
            for columns in slices(h.shape[1], d_out**2 * g.element_size()):
                if symmetric and columns.start < rows.start:
                    K[rows, columns] = K[columns, rows].T
                else:
                    K[rows, columns] = H @ (H if symmetric and columns == rows else _outer(h[:, columns])).T
        return K
    K = g.new_zeros(N, h.shape[1])
    for r in range(R):
        for s in range(r if symmetric else 0, h.shape[0]):
            block = (g[r] @ h[s].T).square_()
            K += block
            if symmetric and s > r:
                K += block.T
    return K


def _outer(g: Tensor) -> Tensor:
    """H_n `[n, d_out^2]`."""
    x = g.transpose(0, 1)
    return (x.transpose(1, 2) @ x).flatten(1)


def outer_sum(g: Tensor, a: Tensor, squared: bool = False) -> Tensor:
    """sum_n vec(H_n) vec(x_n)^T `[d_out^2, k]` for g `[R, N, d_out]`, x = a `[N, k]` or, squared, a a^T."""
    width = a.shape[1] ** (2 if squared else 1)
    total = a.new_zeros(g.shape[2] ** 2, width)
    for part in slices(len(a), (g.shape[2] ** 2 + width) * g.element_size()):
        x = a[part]
        total.addmm_(_outer(g[:, part]).T, (x[:, :, None] * x[:, None, :]).flatten(1) if squared else x)
    return total


def left_moment(a: Tensor, g: Tensor, A: Tensor | None = None) -> Tensor:
    """sum P A P^T `[Q, d_out, d_out]` through positions; A `[Q, d_in, d_in]`, `[Q, d_in]`, or None (identity)."""
    total = g.new_zeros(g.shape[3], g.shape[4], g.shape[4])
    for part in slices(len(a), _position_bytes(a, g), STREAM_BYTES):
        x, y = a[part].transpose(1, 2), g[:, part].permute(1, 3, 2, 0, 4).contiguous()  # [n, Q, T, i], [n, Q, T, R, o]
        K = times(x, A) @ x.transpose(-1, -2)
        z = (K @ y.flatten(3)).view(y.shape)
        total += _joined(y.flatten(2, 3)).transpose(1, 2) @ _joined(z.flatten(2, 3))
    return total


def right_moment(a: Tensor, g: Tensor, G: Tensor | None = None) -> Tensor:
    """sum P^T G P `[Q, d_in, d_in]` through positions; G `[Q, d_out, d_out]`, `[Q, d_out]`, or None (identity)."""
    total = g.new_zeros(g.shape[3], a.shape[-1], a.shape[-1])
    for part in slices(len(a), _position_bytes(a, g), STREAM_BYTES):
        x, y = a[part].transpose(1, 2), g[:, part].permute(1, 3, 2, 0, 4).contiguous()  # [n, Q, T, i], [n, Q, T, R, o]
        z = times(y.flatten(2, 3), G).view(y.shape)
        K = z.flatten(3) @ y.flatten(3).transpose(-1, -2)  # [n, Q, T, T], summed over directions
        total += _joined(x).transpose(1, 2) @ _joined(K @ x)
    return total


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x `[..., Q, k, n]` times a factor `[Q, n, n]`, or `[Q, n]` for a diagonal."""
    if factor is None:
        return x
    return x @ factor if factor.ndim == 3 else x * factor.unsqueeze(-2)


def _joined(x: Tensor) -> Tensor:
    """`[..., n, Q, T, k]` as `[Q, ... n T, k]`."""
    return x.movedim(-3, 0).flatten(1, -2)


def _position_bytes(a: Tensor, g: Tensor) -> int:
    R, _, T, Q, d_out = g.shape
    return (2 * T + a.shape[-1] + 2 * R * d_out) * T * Q * g.element_size()


def position_gram(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """<P_rn, P'_sm> `[R, n, R', m]` by the double sum over positions, for few positions of a large weight."""
    (R, n, T, Q, _), (S, m, U) = g.shape, h.shape[:3]
    if T == U == Q == 1:
        G = g.reshape(R * n, -1) @ h.reshape(S * m, -1).T
        return G.view(R, n, S, m) * (a[:, 0, 0] @ b[:, 0, 0].T)[None, :, None, :]
    K = g.new_zeros(R, n, S, m)
    for q in range(Q):
        A = a[:, :, q].flatten(0, 1) @ b[:, :, q].flatten(0, 1).T
        for r in range(R):
            for s in range(S):
                G = g[r, :, :, q].flatten(0, 1) @ h[s, :, :, q].flatten(0, 1).T
                K[r, :, s] += G.mul_(A).view(n, T, m, U).sum((1, 3))
    return K


def rows_of(P: Tensor) -> Tensor:
    """P `[R, n, Q, d_out, d_in]` as `[n R, d]`, which is how chunks of it lie in memory."""
    return P.transpose(0, 1).reshape(P.shape[0] * P.shape[1], -1)


def moment_of(X: Tensor, Y: Tensor, keep: int) -> Tensor:
    """sum X Y^T (keep = 1) or sum X^T Y (keep = 0) `[Q, ...]` over examples and directions of `[R, n, Q, o, i]`."""
    X, Y = (M.movedim(2, 0) if keep == 0 else M.movedim(2, 0).transpose(-1, -2) for M in (X, Y))
    return X.flatten(1, 3).transpose(1, 2) @ Y.flatten(1, 3)


def multiplied(x: Tensor, M: Tensor) -> Tensor:
    """x `[..., Q, n]` times M `[Q, n, n]`."""
    return x @ M[0] if len(M) == 1 else (x.unsqueeze(-2) @ M).squeeze(-2)


def same_matrix(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether both are the identity (None) or hold the same numbers."""
    return x is y or (x is not None and y is not None and torch.equal(x, y))


def rotate(P: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """B_1^T P B_2, None for the identity."""
    P = P if left is None else left.transpose(-1, -2) @ P
    return P if right is None else P @ right


def accumulated(parts: Iterator[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total
