"""LayerStats: the inputs and output gradients of one layer, and the contractions every approximation is made of.

All formulas are about one weight matrix W `[Q * d_out, d_in]`. For direction r and example n the gradient is

    P_rn = sum_t g_rnt a_nt^T          and the exact block is          F = 1/N sum_{r,n} vec(P_rn) vec(P_rn)^T,

with row-major vec, so that a Kronecker product reads G (x) A. T counts the positions at which the weight is shared
(1 for a plain Linear layer), Q the groups of a grouped convolution. With T = 1 every P has rank one, which the lean
forms below use. The factors 1/N are here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # explicit per-example gradients are formed in pieces of this size


class LayerStats:
    """Inputs `a` and unnormalised output gradients `g` of one layer over a batch.

    Args:
        a: layer inputs `[N, T, Q, d_in]`; the bias, if any, is a last column of ones.
        g: output gradients `[R, N, T, Q, d_out]`, R directions per example.
        kernel: sizes of the input modes of the weight proper: `(in_features,)` for Linear, `(C_in / groups, kh, kw)`
            for a convolution. Default: one mode.
        bias: whether the last column of `a` belongs to the bias.

    Raises:
        ValueError: if shapes do not fit together or there is no example.
    """

    def __init__(self, a: Tensor | None, g: Tensor, kernel: Sequence[int] | None = None, bias: bool = False) -> None:
        if g.ndim != 5 or (a is not None and (a.ndim != 4 or a.shape[:3] != g.shape[1:4])):
            shape = None if a is None else tuple(a.shape)
            raise ValueError(
                f"LayerStats got a {shape} and g {tuple(g.shape)}, expected [N, T, Q, d_in] and [R, N, T, Q, d_out]; "
                "see fisher_lab.layers for how a layer unrolls its input."
            )
        if g.shape[1] == 0:
            raise ValueError("LayerStats got 0 examples, expected at least 1; check that the data is not empty.")
        self.a, self.g = a, g
        self.R, self.N = g.shape[0], g.shape[1]
        if a is None:
            self.T, self.Q, self.d_out, self.d_in = 1, g.shape[2], g.shape[3], g.shape[4]
        else:
            self.T, self.Q, self.d_out, self.d_in = a.shape[1], a.shape[2], g.shape[4], a.shape[3]
        self.bias = bool(bias)
        self.kernel = tuple(kernel) if kernel is not None else (self.d_in - self.bias,)
        if math.prod(self.kernel) + self.bias != self.d_in:
            raise ValueError(
                f"LayerStats got kernel={self.kernel} and bias={self.bias} for d_in={self.d_in}; "
                "the product of the kernel sizes plus the bias column must be d_in."
            )

    @classmethod
    def of_gradients(cls, P: Tensor, kernel: Sequence[int] | None = None, bias: bool = False) -> LayerStats:
        """Stats whose per-example gradients P `[R, N, Q, d_out, d_in]` are given, not their factors."""
        return cls(None, P, kernel, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: `(Q * d_out, d_in)`."""
        return self.Q * self.d_out, self.d_in

    @property
    def dim(self) -> int:
        """Number of parameters d of the block."""
        return self.shape[0] * self.shape[1]

    @property
    def rank_one(self) -> bool:
        """Whether every per-example gradient is g a^T (one position, factors known)."""
        return self.a is not None and self.T == 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(x.numel() * x.element_size() for x in (self.a, self.g) if x is not None)

    def like(self, a: Tensor | None, g: Tensor) -> LayerStats:
        """The same layer with other columns."""
        return LayerStats(a, g, self.kernel, self.bias)

    def examples(self, part: slice) -> LayerStats:
        """The stats of some of the examples."""
        return self.like(None if self.a is None else self.a[part], self.g[:, part])

    def inputs(self, part: slice) -> LayerStats:
        """The stats of some of the columns of W, as one mode."""
        if self.a is None:
            return LayerStats.of_gradients(self.g[..., part])
        return LayerStats(self.a[..., part], self.g)

    # -- per-example gradients ------------------------------------------------------------------------------------
    def gradients(self) -> Tensor:
        """All per-example gradients P `[R, N, Q, d_out, d_in]` at once."""
        if self.a is None:
            return self.g
        a, g = self.a, self.g
        if self.T == 1:
            return g[:, :, 0, :, :, None] * a[None, :, 0, :, None, :]
        return g.permute(0, 1, 3, 4, 2) @ a.transpose(1, 2)

    def per_example(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Per-example gradients in chunks of examples: P `[R, n, Q, d_out, d_in]`."""
        step = max(1, int(chunk_bytes // (self.R * self.dim * self.g.element_size())))
        for start in range(0, self.N, step):
            yield self.examples(slice(start, start + step)).gradients()

    # -- sums over the columns ------------------------------------------------------------------------------------
    def project(self, V: Tensor) -> Tensor:
        """<P_rn, V> `[..., R, N]` for V `[..., Q * d_out, d_in]`."""
        V = V.unflatten(-2, (self.Q, self.d_out))
        if self.a is None:
            return torch.einsum("rnqoi,...qoi->...rn", self.g, V)
        return torch.einsum("rntqo,...ntqo->...rn", self.g, torch.einsum("ntqi,...qoi->...ntqo", self.a, V))

    def combine(self, s: Tensor) -> Tensor:
        """sum_{r,n} s_rn P_rn `[..., Q * d_out, d_in]` for s `[..., R, N]`."""
        if self.a is None:
            V = torch.einsum("...rn,rnqoi->...qoi", s, self.g)
        else:
            V = torch.einsum("...ntqo,ntqi->...qoi", torch.einsum("...rn,rntqo->...ntqo", s, self.g), self.a)
        return V.flatten(-3, -2)

    def left(self) -> Tensor:
        """U1 = 1/N sum P P^T `[Q, d_out, d_out]`."""
        if self.rank_one:
            assert self.a is not None
            return _second_moment(self.g * self.a.square().sum(-1).sqrt()[None, ..., None]) / self.N
        return _accumulate(torch.einsum("rnqoi,rnqpi->qop", P, P) for P in self.per_example()) / self.N

    def right(self) -> Tensor:
        """U2 = 1/N sum P^T P `[Q, d_in, d_in]`."""
        if self.rank_one:
            assert self.a is not None
            return _second_moment(self.a * self.g.square().sum((0, -1)).sqrt()[..., None]) / self.N
        return _accumulate(torch.einsum("rnqoi,rnqoj->qij", P, P) for P in self.per_example()) / self.N

    def squares(self, basis: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """1/N sum (B_1^T P B_2)^2, elementwise, `[Q, d_out, d_in]`; None stands for the identity.

        Args:
            basis: orthogonal matrices B_1 `[Q, d_out, d_out]` and B_2 `[Q, d_in, d_in]`.
        """
        left, right = basis
        if self.a is None:
            chunks = (_rotate(P, left, right) for P in self.per_example())
        else:
            g = self.g if left is None else torch.einsum("rntqo,qop->rntqp", self.g, left)
            a = self.a if right is None else torch.einsum("ntqi,qij->ntqj", self.a, right)
            if self.T == 1:
                return torch.einsum("nqo,nqi->qoi", g[:, :, 0].square().sum(0), a[:, 0].square()) / self.N
            chunks = (P for P in self.like(a, g).per_example())
        return _accumulate(P.square().sum((0, 1)) for P in chunks) / self.N

    def row_blocks(self, width: int) -> Tensor:
        """Diagonal blocks of F over pieces of `width` entries of a row of W: `[d / width, width, width]`."""
        if self.rank_one and self.Q == 1 and width == self.d_in:
            assert self.a is not None
            a, w = self.a[:, 0, 0], self.g[:, :, 0, 0].square().sum(0) / self.N
            return torch.stack([a.T @ (a * weight[:, None]) for weight in w.unbind(1)])
        pieces = (P.reshape(-1, self.dim // width, width).transpose(0, 1) for P in self.per_example())
        return _accumulate(x.transpose(1, 2) @ x for x in pieces) / self.N

    def column_blocks(self) -> Tensor:
        """Diagonal blocks of F over columns of W, group by group: `[Q * d_in, d_out, d_out]`."""
        if self.rank_one and self.Q == 1:
            assert self.a is not None
            total = self.g.new_zeros(self.d_in, self.d_out**2)
            step = max(1, CHUNK_BYTES // (self.d_out**2 * self.g.element_size()))
            for start in range(0, self.N, step):
                part = slice(start, start + step)
                g = self.g[:, part, 0, 0]
                total.addmm_(self.a[part, 0, 0].square().T, torch.einsum("rno,rnp->nop", g, g).flatten(1))
            return total.view(self.d_in, self.d_out, self.d_out) / self.N
        pieces = (P.flatten(0, 1).permute(1, 3, 0, 2).flatten(0, 1) for P in self.per_example())  # [Q d_in, rn, d_out]
        return _accumulate(x.transpose(1, 2) @ x for x in pieces) / self.N

    def dense(self) -> Tensor:
        """The exact block F `[d, d]`."""
        if self.rank_one and self.Q == 1 and self.R > 1:
            return self._dense_rank_one()
        total = self.g.new_zeros(self.dim, self.dim)
        for P in self.per_example():
            U = P.reshape(-1, self.dim)
            total.addmm_(U.T, U)
        return total / self.N

    def _dense_rank_one(self) -> Tensor:
        """F through its rearrangement sum_n (sum_r g g^T) (x) (a a^T): R times fewer products than column by column."""
        assert self.a is not None
        a, g, o, i = self.a[:, 0, 0], self.g[:, :, 0, 0], self.d_out, self.d_in
        total = a.new_zeros(o * o, i * i)
        step = max(1, CHUNK_BYTES // ((o * o + i * i) * a.element_size()))
        for start in range(0, self.N, step):
            part = slice(start, start + step)
            H = torch.einsum("rno,rnp->nop", g[:, part], g[:, part]).flatten(1)
            total.addmm_(H.T, torch.einsum("ni,nj->nij", a[part], a[part]).flatten(1))
        return (total / self.N).view(o, o, i, i).transpose(1, 2).reshape(o * i, o * i)

    # -- Gram matrices ---------------------------------------------------------------------------------------------
    def gram(self, other: LayerStats | None = None) -> Tensor:
        """Inner products <P_rn, P'_sm> `[R * N, R' * N']` with the columns of `other` (default: the same)."""
        other = self if other is None else other
        if self.rank_one and other.rank_one:
            assert self.a is not None
            assert other.a is not None
            K = self.g.new_zeros(self.R * self.N, other.R * other.N)
            for q in range(self.Q):
                A = self.a[:, 0, q] @ other.a[:, 0, q].T
                G = self.g[:, :, 0, q].flatten(0, 1) @ other.g[:, :, 0, q].flatten(0, 1).T
                G.view(self.R, self.N, other.R, other.N).mul_(A[None, :, None, :])
                K += G
            return K
        rows = []
        for P in self.per_example():
            U = P.reshape(-1, self.dim)
            columns = [U @ V.reshape(-1, self.dim).T for V in other.per_example()]
            rows.append(_join([c.view(self.R, -1, other.R, c.shape[1] // other.R) for c in columns], 3))
        return _join(rows, 1).reshape(self.R * self.N, other.R * other.N)

    def overlap(self, other: LayerStats | None = None) -> Tensor:
        """<F, F'>_Frobenius with the block of `other` (default: |F|_F^2), never forming either block."""
        other = self if other is None else other
        if self.rank_one and other.rank_one and self.Q == 1 and self.d_out < self.R * other.R:
            return self._overlap_rank_one(other)
        total = self.g.new_zeros(())
        step = max(1, CHUNK_BYTES // max(1, self.R * other.R * other.N * self.g.element_size()))
        for start in range(0, self.N, step):
            total = total + self.examples(slice(start, start + step)).gram(other).square().sum()
        return total / (self.N * other.N)

    def _overlap_rank_one(self, other: LayerStats) -> Tensor:
        """sum_{n,m} (a_n . a_m)^2 <H_n, H_m> with H_n = sum_r g g^T: no sum over pairs of directions."""
        assert self.a is not None
        assert other.a is not None
        total = self.g.new_zeros(())
        step = max(1, CHUNK_BYTES // (self.d_out**2 * self.g.element_size()))

        def outer(stats: LayerStats, part: slice) -> Tensor:
            g = stats.g[:, part, 0, 0]
            return torch.einsum("rno,rnp->nop", g, g).flatten(1)

        for start in range(0, self.N, step):
            mine = slice(start, start + step)
            H = outer(self, mine)
            for begin in range(0, other.N, step):
                theirs = slice(begin, begin + step)
                K = (self.a[mine, 0, 0] @ other.a[theirs, 0, 0].T).square()
                total = total + (K * (H @ (H if other is self and mine == theirs else outer(other, theirs)).T)).sum()
        return total / (self.N * other.N)


def _second_moment(x: Tensor) -> Tensor:
    """sum of x x^T over all but the last two axes: `[..., Q, n]` -> `[Q, n, n]`."""
    x = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)
    return x.transpose(1, 2) @ x


def _rotate(P: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    P = P if left is None else left.transpose(-1, -2) @ P
    return P if right is None else P @ right


def _accumulate(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
