"""Block-diagonal matrices with many small blocks (mini-block Fisher)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power, spd_inverse, symmetrize
from fisher_lab._ground.memory import available_bytes, readable
from fisher_lab.matrices.base import FisherMatrix, Operator, same_memory
from fisher_lab.statistics import LayerStats, Sums, as_sums

ROWWISE = 20  # size from which blocks are multiplied from the left


@dataclass(frozen=True, eq=False)
class BlockDiagonal(FisherMatrix):
    """Blocks over pieces of W: whole rows, equal pieces of rows (kernels), or columns.

    Args:
        blocks: `[B, b, b]`, B * b = d.
        weight_shape: shape `(d_out, d_in)` of W.
        groups: None if the blocks run along rows of W; otherwise they run along columns, group by
            group.
    """

    blocks: Tensor
    weight_shape: tuple[int, int]
    groups: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.weight_shape

    def _apply(self, X: Tensor) -> Tensor:
        Y = X if self.groups is None else X.unflatten(-2, (self.groups, -1)).transpose(-1, -2)
        B, b, _ = self.blocks.shape
        Z = Y.reshape(*X.shape[:-2], B, 1, b)
        # z^T M is M z by symmetry and half of the time, but for tiny blocks
        Z = (Z @ self.blocks if b >= ROWWISE else self.blocks @ Z.mT).view(Y.shape)
        return Z if self.groups is None else Z.transpose(-1, -2).reshape(X.shape)

    def trace(self) -> Tensor:
        """Sum of the blocks' traces."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of all entries."""
        return torch.linalg.norm(self.blocks)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.blocks).flatten().sort().values

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue of a block."""
        return self._eigenvalues[-1]

    def eigenvalues(self) -> Tensor:
        """All blocks' eigenvalues, sorted."""
        return self._eigenvalues

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """<F, self>: only F's own blocks count."""
        sums = as_sums(stats)
        if self.groups is None:
            own = sums.row_blocks(self.blocks.shape[1])
        else:
            own = sums.column_blocks()
        return (self.blocks * own).sum()

    def scaled(self, c: float | Tensor) -> BlockDiagonal:
        """c times every block."""
        return BlockDiagonal(self.blocks * c, self.weight_shape, self.groups)

    def _powered(self, p: float, damping: float | Tensor) -> BlockDiagonal:
        if p == -1 and (isinstance(damping, Tensor) or damping > 0):
            eye = torch.eye(self.blocks.shape[1], dtype=self.dtype, device=self.device)
            return BlockDiagonal(
                spd_inverse(symmetrize(self.blocks) + damping * eye), self.weight_shape, self.groups
            )
        return self.rescued(p, damping)

    def rescued(self, p: float, damping: float | Tensor) -> BlockDiagonal:
        """From the eigenvalues of every block, clamped at zero."""
        values, vectors = eigh(self.blocks)
        scaled = vectors * shifted_power(values, p, damping).unsqueeze(-2)
        powers = scaled @ vectors.transpose(-1, -2)
        return BlockDiagonal(powers, self.weight_shape, self.groups)

    @property
    def signature(self) -> Hashable:
        """By shape where the blocks run along rows; those along columns stay alone: their rows do
        not follow.
        """
        return self._shapes() if self.groups is None else None

    def stack(self, others: Sequence[BlockDiagonal]) -> BlockDiagonal:
        """All blocks, one matrix after the other."""
        if not others:
            return self
        rows, columns = self.weight_shape
        joined = super().stack(others)
        return replace(joined, weight_shape=(rows * (1 + len(others)), columns))

    def part(self, index: int, count: int) -> BlockDiagonal:
        """The blocks of one of the matrices."""
        if count == 1:
            return self
        rows, columns = self.weight_shape
        return replace(super().part(index, count), weight_shape=(rows // count, columns))


@dataclass(frozen=True, eq=False)
class FactoredRows(FisherMatrix):
    """Row blocks F_i = a^T diag(w_i) a kept as their columns, where the blocks would be larger.

    Args:
        a: inputs `[N, d_in]`.
        w: weights `[N, d_out]`, >= 0 (sum over directions of g^2, over N).
    """

    a: Tensor
    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.w.shape[1], self.a.shape[1]

    def _apply(self, X: Tensor) -> Tensor:
        return ((X @ self.a.T) * self.w.T) @ self.a

    def trace(self) -> Tensor:
        """Sum over examples of |a|^2 times the sum of the weights."""
        return (self.a.square().sum(1) * self.w.sum(1)).sum()

    def frobenius_norm(self) -> Tensor:
        """By N x N Gram matrices."""
        return ((self.a @ self.a.T).square() * (self.w @ self.w.T)).sum().clamp(min=0).sqrt()

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """<F, self> by Gram matrices of the inputs."""
        if not stats.rank_one or stats.Q != 1:
            return super().quadratic(stats)
        assert stats.a is not None
        weights = stats.g[:, :, 0, 0].square().sum(0)
        return ((self.a @ stats.a[:, 0, 0].T).square() * (self.w @ weights.T)).sum() / stats.N

    def _taken_from(self, stats: LayerStats) -> Operator | None:
        """Both multiply by the inputs first and last, if they are the same."""
        if not stats.rank_one or stats.a is None or not same_memory(self.a, stats.a):
            return None
        a = stats.a[:, 0, 0]
        g = stats.g[:, :, 0, 0]
        N = stats.N

        def apply(X: Tensor) -> Tensor:
            Z = a @ X.T
            s = torch.einsum("rno,no->rn", g, Z) / N
            rows = torch.einsum("rn,rno->no", s, g)
            return (rows - self.w * Z).T @ a

        return apply

    def scaled(self, c: float | Tensor) -> FactoredRows:
        """c times the weights."""
        return FactoredRows(self.a, self.w * c)

    def formed(self) -> BlockDiagonal:
        """The blocks themselves.

        Raises:
            ValueError: if they would not fit into the memory that is free.
        """
        need = 3 * self.w.shape[1] * self.a.shape[1] ** 2 * self.a.element_size()
        if need > available_bytes():
            raise ValueError(
                f"The row blocks of a layer {self.shape} need {readable(need)} and "
                f"{readable(available_bytes())} is "
                'free; leave out the damped errors or use MiniBlock(linear="row_avg").'
            )
        blocks = torch.stack([self.a.T @ (self.a * w[:, None]) for w in self.w.T])
        return BlockDiagonal(blocks, self.shape)

    def eigenvalues(self) -> Tensor:
        """All blocks' eigenvalues, sorted."""
        return self.formed().eigenvalues()

    @property
    def signature(self) -> None:
        """It stays alone: every matrix has inputs of its own."""
        return None

    def rescued(self, p: float, damping: float | Tensor) -> BlockDiagonal:
        """Of the blocks, once they are formed."""
        return self.formed().rescued(p, damping)

    def _powered(self, p: float, damping: float | Tensor) -> BlockDiagonal:
        return self.formed()._powered(p, damping)
