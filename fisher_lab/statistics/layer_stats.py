"""LayerStats: the inputs and output gradients of one layer, and the contractions every approximation is made of.

All formulas are about one weight matrix W `[Q * d_out, d_in]`. For direction r and example n the gradient is

    P_rn = sum_t g_rnt a_nt^T          and the exact block is          F = 1/N sum_{r,n} vec(P_rn) vec(P_rn)^T,

with row-major vec, so that a Kronecker product reads G (x) A. T counts the positions at which the weight is shared
(1 for a plain Linear layer), Q the groups of a grouped convolution. With T = 1 every P has rank one, which the lean
forms below use. The factors 1/N are here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_lab.statistics import contractions
from fisher_lab.statistics.contractions import (
    CHUNK_BYTES,
    KEPT_BYTES,
    STREAM_BYTES,
    accumulated,
    moment_of,
    rotate,
    slices,
)


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
        self._memo: dict[str, Any] = {}  # sums that several approximations share
        self._held: Tensor | None = None  # per-example gradients [N, R, Q, d_out, d_in], once formed and kept
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
        some = self.like(None if self.a is None else self.a[part], self.g[:, part])
        some._held = None if self._held is None else self._held[part]
        return some

    def inputs(self, part: slice) -> LayerStats:
        """The stats of some of the columns of W, as one mode."""
        if self.a is None:
            return LayerStats.of_gradients(self.g[..., part])
        columns = LayerStats(self.a[..., part], self.g)
        columns._held = None if self._held is None else self._held[..., part]
        return columns

    # -- per-example gradients ------------------------------------------------------------------------------------
    def gradients(self) -> Tensor:
        """All per-example gradients P `[R, N, Q, d_out, d_in]` at once."""
        if self.a is None:
            return self.g
        if self._held is not None:
            return self._held.transpose(0, 1)
        a, g = self.a, self.g
        if self.T == 1:
            return g[:, :, 0, :, :, None] * a[None, :, 0, :, None, :]
        P = g.permute(1, 3, 2, 0, 4).flatten(3).transpose(-1, -2) @ a.transpose(1, 2)  # [N, Q, R d_out, d_in]
        return P.unflatten(2, (self.R, -1)).permute(2, 0, 1, 3, 4)

    def per_example(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Per-example gradients in chunks of examples: P `[R, n, Q, d_out, d_in]`."""
        for part in self._parts(chunk_bytes):
            yield self.examples(part).gradients()

    def _parts(self, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Iterator[slice]:
        """The examples from `start` on, in pieces whose gradients take at most `chunk_bytes` (or one example)."""
        for part in slices(self.N - start, self.R * self.dim * self.g.element_size(), chunk_bytes):
            yield slice(start + part.start, start + part.stop)

    def hold(self, most_bytes: float) -> bool:
        """Form the per-example gradients once and keep them, if positions are shared and they fit; see `release`."""
        bytes_all = self.R * self.N * self.dim * self.g.element_size()
        if self._held is None and self.a is not None and self.T > 1 and bytes_all <= most_bytes:
            held = self.g.new_empty(self.N, self.R, self.Q, self.d_out, self.d_in)
            for part in self._parts(STREAM_BYTES):
                held[part] = self.examples(part).gradients().transpose(0, 1)
            self._held = held
        return self._held is not None

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return {**self.__dict__, "_memo": {}, "_held": None}

    @property
    def route(self) -> str:
        """How norms and products of the block are computed: from inputs and output gradients, or from P."""
        if self.rank_one:
            return "columns"
        if self._few_positions(self):
            return "columns, double sum over positions"
        formed = "once" if self.a is None or self._held is not None else "piece by piece"
        return f"columns, gradients formed {formed}"

    def _few_positions(self, other: LayerStats) -> bool:
        return self.a is not None and self.T * other.T * (self.d_out + self.d_in) <= self.d_out * self.d_in

    def release(self) -> None:
        """Forget what was kept to be used again."""
        self._held, self._memo = None, {}

    def shared(self, name: str, compute: Callable[[], Any]) -> Any:
        """A sum that several approximations read, computed for the first of them."""
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    # -- sums over the columns ------------------------------------------------------------------------------------
    def apply(self, X: Tensor, weight: Tensor | None = None) -> Tensor:
        """sum_{r,n} c_n <P_rn, X> P_rn for X `[..., Q * d_out, d_in]`, with c = 1/N or weights `[..., N]`.

        With shared positions and several X (or gradients held) every piece of P is formed once and used for all.
        """
        weight = self.g.new_full((self.N,), 1 / self.N) if weight is None else weight
        many = X.numel() // self.dim
        if self._held is None and (self.rank_one or self.a is None or 2 * many < self.R):
            return self.combine(self.project(X) * weight.unsqueeze(-2))
        V, start = X.reshape(many, self.dim), 0
        total = torch.zeros_like(V)
        for P in self.per_example():
            part = weight[..., start : start + P.shape[1]]
            U = contractions.rows_of(P)
            total.addmm_((V @ U.T) * part.repeat_interleave(self.R, -1), U)
            start += P.shape[1]
        return total.view(X.shape)

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

    def left(self, A: Tensor | None = None) -> Tensor:
        """1/N sum P A P^T `[Q, d_out, d_out]`; U1 without A `[Q, d_in, d_in]` (or a diagonal `[Q, d_in]`)."""
        return self.shared("left", lambda: self._left(None).div_(self.N)) if A is None else self._left(A) / self.N

    def _left(self, A: Tensor | None) -> Tensor:
        if self.rank_one and A is None:
            assert self.a is not None
            return contractions.second_moment(self.g * self.a.square().sum(-1).sqrt()[None, ..., None])
        o, i = self.d_out, self.d_in
        if self._through_positions(i * (i if A is not None else 0) + self.T * i + self.R * o * (self.T + o)):
            assert self.a is not None
            return contractions.left_moment(self.a, self.g, A)
        return accumulated(moment_of(contractions.times(P, A), P, 1) for P in self.per_example(STREAM_BYTES))

    def right(self, G: Tensor | None = None) -> Tensor:
        """1/N sum P^T G P `[Q, d_in, d_in]`; U2 without G `[Q, d_out, d_out]` (or a diagonal `[Q, d_out]`)."""
        return self.shared("right", lambda: self._right(None).div_(self.N)) if G is None else self._right(G) / self.N

    def _right(self, G: Tensor | None) -> Tensor:
        if self.rank_one and G is None:
            assert self.a is not None
            return contractions.second_moment(self.a * self.g.square().sum((0, -1)).sqrt()[..., None])
        o, i = self.d_out, self.d_in
        if self._through_positions(self.R * o * (o if G is not None else 0) + self.R * o * self.T + i * (self.T + i)):
            assert self.a is not None
            return contractions.right_moment(self.a, self.g, G)
        chunks = (
            (P, contractions.times(P.transpose(-1, -2), G).transpose(-1, -2)) for P in self.per_example(STREAM_BYTES)
        )
        return accumulated(moment_of(Y, P, 0) for P, Y in chunks)

    def _through_positions(self, per_position: float) -> bool:
        """Whether a second moment costs less through positions than through P, which must be formed unless held."""
        if self.a is None:
            return False
        forming = 0 if self._held is not None else self.T
        return self.T * per_position < self.R * self.d_out * self.d_in * (self.d_out + self.d_in + forming)

    def squares(self, basis: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """1/N sum (B_1^T P B_2)^2, elementwise, `[Q, d_out, d_in]`; None stands for the identity.

        Args:
            basis: orthogonal matrices B_1 `[Q, d_out, d_out]` and B_2 `[Q, d_in, d_in]`.
        """
        known = self.known_squares()
        for other, result in known:
            if all(contractions.same_matrix(x, y) for x, y in zip(basis, other, strict=True)):
                return result
        known.append((basis, self._squares(*basis) / self.N))
        return known[-1][1]

    def known_squares(self) -> list[tuple[tuple[Tensor | None, Tensor | None], Tensor]]:
        """The bases that `squares` was asked for so far, with its results."""
        return self.shared("squares", list)

    def _squares(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        if self.rank_one:
            rotated = self.rotated(left, right)
            assert rotated.a is not None
            return torch.einsum("nqo,nqi->qoi", rotated.g[:, :, 0].square().sum(0), rotated.a[:, 0].square())
        if self.a is None or (left is None and right is None):
            return accumulated(rotate(P, left, right).square().sum((0, 1)) for P in self.per_example(STREAM_BYTES))
        pieces = (self.examples(part).rotated(left, right).gradients() for part in self._parts(STREAM_BYTES))
        return accumulated(P.square().sum((0, 1)) for P in pieces)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> LayerStats:
        """The stats of B_1^T P B_2 (a and g apart); None stands for the identity."""
        assert self.a is not None
        g = self.g if left is None else contractions.multiplied(self.g, left)
        return LayerStats(self.a if right is None else contractions.multiplied(self.a, right), g)

    def row_blocks(self, width: int) -> Tensor:
        """Diagonal blocks of F over pieces of `width` entries of a row of W: `[d / width, width, width]`."""
        if self.rank_one and self.Q == 1 and width == self.d_in:
            assert self.a is not None
            a, w = self.a[:, 0, 0], self.g[:, :, 0, 0].square().sum(0) / self.N
            return torch.stack([a.T @ (a * weight[:, None]) for weight in w.unbind(1)])
        pieces = (P.reshape(-1, self.dim // width, width).transpose(0, 1) for P in self.per_example())
        return accumulated(x.transpose(1, 2) @ x for x in pieces) / self.N

    def column_blocks(self) -> Tensor:
        """Diagonal blocks of F over columns of W, group by group: `[Q * d_in, d_out, d_out]`."""
        if self.rank_one and self.Q == 1:
            assert self.a is not None
            total = contractions.outer_sum(self.g[:, :, 0, 0], self.a[:, 0, 0].square())
            return total.T.view(self.d_in, self.d_out, self.d_out) / self.N
        pieces = (P.flatten(0, 1).permute(1, 3, 0, 2).flatten(0, 1) for P in self.per_example())  # [Q d_in, rn, d_out]
        return accumulated(x.transpose(1, 2) @ x for x in pieces) / self.N

    def dense(self) -> Tensor:
        """The exact block F `[d, d]`."""
        if self.rank_one and self.Q == 1 and self.R > 1:  # through sum_n H_n (x) a a^T: R times fewer products
            assert self.a is not None
            o, i = self.d_out, self.d_in
            total = contractions.outer_sum(self.g[:, :, 0, 0], self.a[:, 0, 0], squared=True) / self.N
            return total.view(o, o, i, i).transpose(1, 2).reshape(o * i, o * i)
        total = self.g.new_zeros(self.dim, self.dim)
        for P in self.per_example():
            U = contractions.rows_of(P)
            total.addmm_(U.T, U)
        return total / self.N

    # -- Gram matrices ---------------------------------------------------------------------------------------------
    def gram(self, other: LayerStats | None = None) -> Tensor:
        """Inner products <P_rn, P'_sm> `[R * N, R' * N']` with the columns of `other` (default: the same)."""
        if other is None and self.gram_pays:
            return self.shared("gram", lambda: self._gram(self))
        return self._gram(self if other is None else other)

    @property
    def gram_pays(self) -> bool:
        """Whether products with the Gram matrix cost less than with the columns, and it is small enough to keep."""
        columns = self.R * self.N
        return not self.rank_one and columns < self.dim and columns**2 * self.g.element_size() <= KEPT_BYTES

    def _gram(self, other: LayerStats) -> Tensor:
        K = self.g.new_zeros(self.R, self.N, other.R, other.N)
        for mine, theirs, block in self._gram_blocks(other):
            K[:, mine, :, theirs] = block
            if other is self and theirs.start >= mine.stop:
                K[:, theirs, :, mine] = block.permute(2, 3, 0, 1)
        return K.view(self.R * self.N, other.R * other.N)

    def _gram_blocks(self, other: LayerStats) -> Iterator[tuple[slice, slice, Tensor]]:
        """Pieces `[R, n, R', m]` of the Gram matrix with their examples; half of them where `other` is self."""
        if other.a is not None and self._few_positions(other):
            size = self.T * other.T * other.N * max(1, self.R * other.R // self.T) * self.g.element_size()
            for mine in slices(self.N, size):
                part = self.examples(mine)
                assert part.a is not None
                yield mine, slice(0, other.N), contractions.position_gram(part.a, part.g, other.a, other.g)
            return
        # larger pieces make faster products, and of gradients that are held they cost no memory; their products do
        size = CHUNK_BYTES if self._held is None or other._held is None else KEPT_BYTES
        size = min(size, int(self.dim * math.sqrt(CHUNK_BYTES * self.g.element_size())))
        for mine in self._parts(size):
            U, begin = contractions.rows_of(self.examples(mine).gradients()), mine.start if other is self else 0
            for theirs in other._parts(size, begin):
                V = U if other is self and theirs == mine else contractions.rows_of(other.examples(theirs).gradients())
                block = (U @ V.T).view(-1, self.R, len(V) // other.R, other.R)
                yield mine, theirs, block.permute(1, 0, 3, 2)

    def overlap(self, other: LayerStats | None = None) -> Tensor:
        """<F, F'>_Frobenius with the block of `other` (default: |F|_F^2), never forming either block."""
        other = self if other is None else other
        if other is self and self.N**2 * self.g.element_size() <= KEPT_BYTES:
            return self.squared_gram().mean()
        total = self.g.new_zeros(())
        for mine, theirs, block in self._squared_blocks(other):
            mirrored = other is self and theirs.start >= mine.stop  # the other half is the same
            total = total + (2 if mirrored else 1) * block.sum()
        return total / (self.N * other.N)

    def squared_gram(self) -> Tensor:
        """<F_n, F_m>_Frobenius `[N, N]` of the examples' own blocks F_n = sum_r vec(P) vec(P)^T; |F|^2 is its mean."""
        return self.shared("squared_gram", self._squared_gram)

    def _squared_gram(self) -> Tensor:
        if self.gram_pays:
            return self.gram().view(self.R, self.N, self.R, self.N).square().sum((0, 2))
        if self.rank_one and self.Q == 1:
            KX, KG = self.example_grams()
            return KX * KG
        K = self.g.new_zeros(self.N, self.N)
        for mine, theirs, block in self._squared_blocks(self):
            K[mine, theirs] = block
            if theirs.start >= mine.stop:
                K[theirs, mine] = block.T
        return K

    def example_grams(self, q: int = 0) -> tuple[Tensor, Tensor]:
        """(a_n . a_m)^2 and sum_{r,s} (g_rn . g_sm)^2 `[N, N]` of a group, for rank-one columns."""
        assert self.a is not None
        a, g = self.a[:, 0, q], self.g[:, :, 0, q]
        return (a @ a.T).square(), contractions.outer_gram(g)

    def _squared_blocks(self, other: LayerStats) -> Iterator[tuple[slice, slice, Tensor]]:
        """Pieces `[n, m]` of <F_n, F'_m> with their examples; half of them where `other` is self."""
        if not (self.rank_one and other.rank_one and self.Q == 1):
            for mine, theirs, block in self._gram_blocks(other):
                yield mine, theirs, block.square().sum((0, 2))
            return
        assert self.a is not None
        assert other.a is not None
        for mine in slices(self.N, other.N * self.g.element_size(), KEPT_BYTES):
            K = (self.a[mine, 0, 0] @ other.a[:, 0, 0].T).square()
            yield mine, slice(0, other.N), K * contractions.outer_gram(self.g[:, mine, 0, 0], other.g[:, :, 0, 0])


def joined(pieces: Sequence[LayerStats]) -> LayerStats:
    """The stats of all examples of pieces of one batch; positions that some pieces lack are zeros."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if first.a is None:
        return first.like(None, torch.cat([piece.g for piece in pieces], 1))
    T = max(piece.T for piece in pieces)
    inputs = []
    gradients = []
    for piece in pieces:
        assert piece.a is not None
        missing = T - piece.T
        inputs.append(pad(piece.a, (0, 0, 0, 0, 0, missing)) if missing else piece.a)
        gradients.append(pad(piece.g, (0, 0, 0, 0, 0, missing)) if missing else piece.g)
    return first.like(torch.cat(inputs), torch.cat(gradients, 1))
