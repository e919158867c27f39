"""LayerStats: the inputs and output gradients of one layer, in one form for every kind of layer.

All formulas are about one weight matrix W `[Q * d_out, d_in]`. For direction r and example n its
gradient is

    P_rn = sum_t g_rnt a_nt^T,         and the exact block is

    F = 1/N sum_{r,n} vec(P_rn) vec(P_rn)^T,

with row-major vec, so that a Kronecker product reads G (x) A. The gradients g are those of one
example's loss: every 1/N stands in the sums (`statistics.contractions`), never in g.

Worked examples, for N examples and R directions; `a` is `[N, T, Q, d_in]` and `g` is
`[R, N, T, Q, d_out]`:

* **Linear(4, 3)** on x `[N, 4]`: one position, one group. a `[N, 1, 1, 5]` (the last column are
  ones, for the bias), g `[R, N, 1, 1, 3]`, W `[3, 5]`. Every P has rank one.
* **Linear(4, 3)** on x `[N, L, 4]` (a token at a time): the weight is used at T = L positions. a
  `[N, L, 1, 5]`, g `[R, N, L, 1, 3]`, W `[3, 5]`.
* **Conv2d(4, 6, 3)** on x `[N, 4, 8, 8]`: a position is one of the 6 x 6 places of the kernel, its
  input the patch there. a `[N, 36, 1, 4 * 9 + 1]`, g `[R, N, 36, 1, 6]`, W `[6, 37]`, kernel
  `(4, 3, 3)`.
* **Conv2d(4, 6, 3, groups=2)**: each half of the outputs sees half of the inputs. a
  `[N, 36, 2, 2 * 9 + 1]`, g `[R, N, 36, 2, 3]`, W `[6, 19]`, kernel `(2, 3, 3)`.
* **A tied weight** (one Linear(4, 3) called twice in a forward pass): its uses are more positions.
  a `[N, 2, 1, 5]`, g `[R, N, 2, 1, 3]`.
* **Gradient form** (norm layers, bare parameters): a = 1 `[N, 1, 1, 1]`, g = the gradient of the p
  parameters `[R, N, 1, 1, p]`, W `[p, 1]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_lab.statistics import pieces


class LayerStats:
    """Inputs `a` and unnormalised output gradients `g` of one layer over a batch; never changed.

    Args:
        a: layer inputs `[N, T, Q, d_in]`; the bias, if any, is a last column of ones. None: see
            `of_gradients`.
        g: output gradients `[R, N, T, Q, d_out]`, R directions per example.
        kernel: sizes of the input modes of the weight proper: `(in_features,)` for Linear,
            `(C_in / groups, kh, kw)` for a convolution. Default: one mode.
        bias: whether the last column of `a` belongs to the bias.

    Raises:
        ValueError: if shapes do not fit together or there is no example.

    See Also:
        fisher_lab.statistics.contractions: sums over examples, positions and directions.
        fisher_lab.statistics.Sums: these statistics with sums that several readers share.

    Example:
        >>> stats = fl.LayerStats(a=torch.ones(10, 1, 1, 3), g=torch.ones(1, 10, 1, 1, 2))
        >>> stats.N, stats.shape
        (10, (2, 3))
    """

    def __init__(
        self,
        a: Tensor | None,
        g: Tensor,
        kernel: Sequence[int] | None = None,
        bias: bool = False,
    ) -> None:
        _check_shapes(a, g)
        self.a = a
        self.g = g
        self.R = g.shape[0]
        self.N = g.shape[1]
        if a is None:
            # g are the gradients P [R, N, Q, d_out, d_in] themselves
            _, _, Q, d_out, d_in = g.shape
            T = 1
        else:
            _, T, Q, d_in = a.shape
            d_out = g.shape[4]
        self.T = T
        self.Q = Q
        self.d_out = d_out
        self.d_in = d_in
        self.bias = bool(bias)
        if kernel is None:
            kernel = (d_in - self.bias,)
        self.kernel = tuple(kernel)
        columns = math.prod(self.kernel) + self.bias
        if columns != d_in:
            raise ValueError(
                f"LayerStats got kernel={self.kernel} and bias={self.bias} for d_in={d_in}; "
                "the product of the kernel sizes plus the bias column must be d_in."
            )
        # P [N, R, Q, d_out, d_in]; only `with_gradients` sets it
        self._formed: Tensor | None = None

    @classmethod
    def of_gradients(
        cls,
        P: Tensor,
        kernel: Sequence[int] | None = None,
        bias: bool = False,
    ) -> LayerStats:
        """Stats of given per-example gradients P `[R, N, Q, d_out, d_in]`, without factors."""
        return cls(None, P, kernel, bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without the gradients formed, which are large and come again."""
        state = dict(self.__dict__)
        state["_formed"] = None
        return state

    # -- sizes -------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: `(Q * d_out, d_in)`."""
        return self.Q * self.d_out, self.d_in

    @property
    def dim(self) -> int:
        """Number of parameters d of the block."""
        rows, columns = self.shape
        return rows * columns

    @property
    def rank_one(self) -> bool:
        """Whether every per-example gradient is g a^T (one position, factors known)."""
        return self.a is not None and self.T == 1

    @property
    def nbytes(self) -> int:
        """Bytes of `a` and `g`."""
        numbers = self.g.numel()
        if self.a is not None:
            numbers += self.a.numel()
        return numbers * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.g.element_size()

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one example's gradients P `[R, Q, d_out, d_in]`."""
        numbers = self.R * self.dim
        return numbers * self.itemsize

    def factors(self) -> tuple[Tensor, Tensor]:
        """`a` and `g`.

        Raises:
            ValueError: where only their products P are known.
        """
        if self.a is None:
            raise ValueError(
                "Got statistics of explicit gradients, expected layer inputs and output gradients "
                "apart; use per-example statistics."
            )
        return self.a, self.g

    def vectors(self, q: int = 0) -> tuple[Tensor, Tensor]:
        """a `[N, d_in]` and g `[R, N, d_out]` of one group, for one position: P_rn = g_rn a_n^T."""
        a, g = self.factors()
        inputs = a[:, 0, q]
        gradients = g[:, :, 0, q]
        return inputs, gradients

    # -- views -------------------------------------------------------------------------------------
    def like(self, a: Tensor | None, g: Tensor) -> LayerStats:
        """The same layer with other inputs and output gradients."""
        return LayerStats(a, g, self.kernel, self.bias)

    def examples(self, part: slice) -> LayerStats:
        """The stats of some of the examples."""
        a = None
        if self.a is not None:
            a = self.a[part]
        g = self.g[:, part]
        some = self.like(a, g)
        if self._formed is not None:
            some._formed = self._formed[part]
        return some

    def inputs(self, part: slice) -> LayerStats:
        """The stats of some of the columns of W, as one mode."""
        if self.a is None:
            P = self.g[..., part]
            return LayerStats.of_gradients(P)
        a = self.a[..., part]
        some = LayerStats(a, self.g)
        if self._formed is not None:
            some._formed = self._formed[..., part]
        return some

    def with_positions(self, T: int) -> LayerStats:
        """The same gradients with T positions, the missing ones zero: so sequences join."""
        if self.a is None or self.T >= T:
            return self
        # zeros before and behind each axis, the last axis first: positions are the third of both
        missing = (0, 0, 0, 0, 0, T - self.T)
        a = pad(self.a, missing)
        g = pad(self.g, missing)
        return self.like(a, g)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> LayerStats:
        """The stats of B_1^T P B_2, whose factors are B_1^T g and B_2^T a.

        Args:
            left: B_1 `[Q, d_out, d_out]`; None for the identity.
            right: B_2 `[Q, d_in, d_in]`; None for the identity.

        Raises:
            ValueError: without factors.
        """
        a, g = self.factors()
        if left is not None:
            g = _times(g, left)
        if right is not None:
            a = _times(a, right)
        return LayerStats(a, g)

    # -- per-example gradients ---------------------------------------------------------------------
    @property
    def formed(self) -> bool:
        """Whether P is at hand without a product: given, or formed by `with_gradients`."""
        return self.a is None or self._formed is not None

    @property
    def held(self) -> Tensor | None:
        """P as it is held `[N, R, Q, d_out, d_in]`; None where it is not formed."""
        return self._formed

    def with_gradients(self) -> LayerStats:
        """The same statistics with P formed once, for sums that would form it again and again."""
        if self.formed:
            return self
        of_example = (self.R, self.Q, self.d_out, self.d_in)
        # example first, so that those of a piece lie together
        P = self.g.new_empty(self.N, *of_example)
        for part in self.pieces(pieces.stream()):
            some = self.examples(part)
            gradients = some.gradients()  # [R, n, Q, d_out, d_in]
            P[part] = gradients.transpose(0, 1)
        found = self.like(self.a, self.g)
        found._formed = P
        return found

    def gradients(self) -> Tensor:
        """All per-example gradients P `[R, N, Q, d_out, d_in]` at once."""
        if self._formed is not None:
            return self._formed.transpose(0, 1)
        if self.a is None:
            return self.g
        if self.T == 1:
            return _products_of_vectors(self.a, self.g)
        return _products_over_positions(self.a, self.g)

    def per_example(self, chunk_bytes: float | None = None) -> Iterator[Tensor]:
        """Per-example gradients in chunks of examples: P `[R, n, Q, d_out, d_in]`."""
        for part in self.pieces(chunk_bytes):
            some = self.examples(part)
            yield some.gradients()

    def pieces(self, chunk_bytes: float | None = None, start: int = 0) -> Iterator[slice]:
        """The examples from `start` on, in pieces whose gradients take at most `chunk_bytes`.

        A piece is one example at least.
        """
        return pieces.slices(self.N, self.gradient_bytes, chunk_bytes, start)


def joined(parts: Sequence[LayerStats]) -> LayerStats:
    """The stats of all examples of pieces of one batch; positions that a piece lacks are zeros."""
    first = parts[0]
    if len(parts) == 1:
        return first
    T = max(part.T for part in parts)
    inputs = []
    gradients = []
    for part in parts:
        padded = part.with_positions(T)
        gradients.append(padded.g)
        if padded.a is not None:
            inputs.append(padded.a)
    a = torch.cat(inputs) if inputs else None
    g = torch.cat(gradients, 1)
    return first.like(a, g)


def _products_of_vectors(a: Tensor, g: Tensor) -> Tensor:
    """P = g a^T of one position."""
    columns = g[:, :, 0, :, :, None]  # [R, N, Q, d_out, 1]
    rows = a[None, :, 0, :, None, :]  # [1, N, Q, 1, d_in]
    return columns * rows


def _products_over_positions(a: Tensor, g: Tensor) -> Tensor:
    """P = sum_t g a^T, all directions of an example in one product over its positions."""
    R = len(g)
    g = g.permute(1, 3, 2, 0, 4)  # [N, Q, T, R, d_out]
    g = g.flatten(3)  # [N, Q, T, R d_out]
    a = a.transpose(1, 2)  # [N, Q, T, d_in]
    P = g.mT @ a  # [N, Q, R d_out, d_in]
    P = P.unflatten(2, (R, -1))  # [N, Q, R, d_out, d_in]
    return P.permute(2, 0, 1, 3, 4)


def _times(x: Tensor, M: Tensor) -> Tensor:
    """x `[..., Q, n]` times M `[Q, n, n]`."""
    if len(M) == 1:  # one product, not one for each group and vector
        return x @ M[0]
    rows = x.unsqueeze(-2)
    products = rows @ M
    return products.squeeze(-2)


def _check_shapes(a: Tensor | None, g: Tensor) -> None:
    fits = g.ndim == 5
    if fits and a is not None:
        of_positions = g.shape[1:4]
        fits = a.shape[:-1] == of_positions
    if not fits:
        shape = None if a is None else tuple(a.shape)
        raise ValueError(
            f"LayerStats got a {shape} and g {tuple(g.shape)}, expected [N, T, Q, d_in] and [R, "
            "N, T, Q, d_out]; see fisher_lab.layers for how a layer unrolls its input."
        )
    if g.shape[1] == 0:
        raise ValueError(
            "LayerStats got 0 examples, expected at least 1; check that the data is not empty."
        )
