"""Block-diagonal matrices with many small blocks (mini-block Fisher)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power, spd_inverse, symmetrize
from fisher_lab._ground.memory import available_bytes, readable
from fisher_lab.matrices.base import (
    AnyStats,
    FisherMatrix,
    Operator,
    Scalar,
    check_index,
    checked_scalar,
    same_memory,
)
from fisher_lab.statistics import LayerStats, as_sums

ROWWISE = 20  # size from which blocks are multiplied from the left


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(FisherMatrix):
    """Blocks over pieces of W: whole rows, equal pieces of rows (kernels), or columns.

    Args:
        blocks: `[B, b, b]`, B * b = d.
        weight_shape: shape `(d_out, d_in)` of W.
        groups: None if the blocks run along rows of W; otherwise they run along columns, group by
            group.

    Example:
        >>> blocks = torch.eye(3).expand(2, 3, 3)
        >>> fl.matrices.BlockDiagonal(blocks, (2, 3)).trace()
        tensor(6.)
    """

    blocks: Tensor
    weight_shape: tuple[int, int]
    groups: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.weight_shape

    def _apply(self, X: Tensor) -> Tensor:
        if self.groups is None:
            return self._apply_along_rows(X)
        # the columns of every group become rows
        by_groups = X.unflatten(-2, (self.groups, -1))
        columns = by_groups.transpose(-1, -2)
        image = self._apply_along_rows(columns)
        return image.transpose(-1, -2).reshape(X.shape)

    def _apply_along_rows(self, X: Tensor) -> Tensor:
        """The blocks times consecutive pieces of the rows of X."""
        B, b, _ = self.blocks.shape
        axes = 2 if self.groups is None else 3
        before = X.shape[: X.ndim - axes]
        Z = X.reshape(*before, B, 1, b)
        # z^T M is M z by symmetry and half of the time, but for tiny blocks
        if b >= ROWWISE:
            image = Z @ self.blocks
        else:
            image = self.blocks @ Z.mT
        return image.view(X.shape)

    def trace(self) -> Tensor:
        """Sum of the blocks' traces."""
        diagonals = self.blocks.diagonal(dim1=-2, dim2=-1)
        return diagonals.sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of all entries."""
        return torch.linalg.norm(self.blocks)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        values = torch.linalg.eigvalsh(self.blocks)
        return values.flatten().sort().values

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue of a block."""
        return self._eigenvalues[-1]

    def eigenvalues(self) -> Tensor:
        """All blocks' eigenvalues, sorted."""
        return self._eigenvalues

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self>: only F's own blocks count."""
        sums = as_sums(stats)
        b = self.blocks.shape[1]
        if self.groups is None:
            own = sums.row_blocks(b)
        else:
            own = sums.column_blocks()
        return (self.blocks * own).sum()

    def scaled(self, c: Scalar) -> BlockDiagonal:
        """c times every block."""
        c = checked_scalar(c, "factor", self)
        return replace(self, blocks=self.blocks * c)

    def _powered(self, p: float, damping: Scalar) -> BlockDiagonal:
        damped = isinstance(damping, Tensor) or damping > 0
        if p != -1 or not damped:
            return self.rescued(p, damping)
        # a Cholesky factorisation costs a tenth of an eigendecomposition
        b = self.blocks.shape[1]
        eye = torch.eye(b, dtype=self.dtype, device=self.device)
        inverses = spd_inverse(symmetrize(self.blocks) + damping * eye)
        return replace(self, blocks=inverses)

    def rescued(self, p: float, damping: Scalar) -> BlockDiagonal:
        """From the eigenvalues of every block, clamped at zero."""
        values, vectors = eigh(self.blocks)
        b = self.blocks.shape[1]
        powers = shifted_power(values, p, damping, b)
        scaled = vectors * powers.unsqueeze(-2)
        return replace(self, blocks=scaled @ vectors.transpose(-1, -2))

    @property
    def signature(self) -> Hashable:
        """By shape where the blocks run along rows; those along columns stay alone."""
        if self.groups is not None:
            return None  # the rows of two matrices would not follow each other in one block
        return self._shapes()

    def stack(self, others: Sequence[BlockDiagonal]) -> BlockDiagonal:
        """All blocks, one matrix after the other."""
        if not others:
            return self
        rows, columns = self.weight_shape
        count = 1 + len(others)
        joined = super().stack(others)
        return replace(joined, weight_shape=(rows * count, columns))

    def part(self, index: int, count: int) -> BlockDiagonal:
        """The blocks of one of the matrices."""
        check_index(index, count)
        if count == 1:
            return self
        rows, columns = self.weight_shape
        own = super().part(index, count)
        return replace(own, weight_shape=(rows // count, columns))


@dataclass(frozen=True, eq=False, repr=False)
class FactoredRows(FisherMatrix):
    """Row blocks F_i = a^T diag(w_i) a kept as their columns, where the blocks would be larger.

    Args:
        a: inputs `[N, d_in]`.
        w: weights `[N, d_out]`, >= 0 (sum over directions of g^2, over N).

    Example:
        >>> a, w = torch.ones(10, 3), torch.ones(10, 2)
        >>> fl.matrices.FactoredRows(a, w).trace()
        tensor(60.)
    """

    a: Tensor
    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.w.shape[1], self.a.shape[1]

    def _apply(self, X: Tensor) -> Tensor:
        products = X @ self.a.T  # [..., d_out, N]
        return (products * self.w.T) @ self.a

    def trace(self) -> Tensor:
        """Sum over examples of |a|^2 times the sum of the weights."""
        of_a = self.a.square().sum(1)
        of_w = self.w.sum(1)
        return (of_a * of_w).sum()

    def frobenius_norm(self) -> Tensor:
        """By N x N Gram matrices: sum over i, n, m of w_ni w_mi (a_n . a_m)^2."""
        of_a = (self.a @ self.a.T).square()
        of_w = self.w @ self.w.T
        square = (of_a * of_w).sum()
        return square.clamp(min=0).sqrt()

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self> by Gram matrices of the inputs."""
        if not stats.rank_one or stats.Q != 1:
            return super().quadratic(stats)
        assert stats.a is not None
        a = stats.a[:, 0, 0]
        g = stats.g[:, :, 0, 0]
        weights = g.square().sum(0)
        of_a = (self.a @ a.T).square()
        of_w = self.w @ weights.T
        return (of_a * of_w).sum() / stats.N

    def _taken_from(self, stats: LayerStats) -> Operator | None:
        """Both multiply by the inputs first and last, if they are the same."""
        if not stats.rank_one or stats.a is None or not same_memory(self.a, stats.a):
            return None
        a = stats.a[:, 0, 0]
        g = stats.g[:, :, 0, 0]
        N = stats.N

        def apply(X: Tensor) -> Tensor:
            Z = a @ X.T  # what both begin with
            s = torch.einsum("rno,no->rn", g, Z) / N
            of_block = torch.einsum("rn,rno->no", s, g)
            of_rows = self.w * Z
            return (of_block - of_rows).T @ a

        return apply

    def scaled(self, c: Scalar) -> FactoredRows:
        """c times the weights."""
        c = checked_scalar(c, "factor", self)
        return FactoredRows(self.a, self.w * c)

    def formed(self) -> BlockDiagonal:
        """The blocks themselves.

        Raises:
            ValueError: if they would not fit into the memory that is free.
        """
        d_out, d_in = self.shape
        one_block = d_in**2 * self.a.element_size()
        need = 3 * d_out * one_block  # the blocks, their list, and room for a power of them
        free = available_bytes()
        if need > free:
            raise ValueError(
                f"The row blocks of a layer {self.shape} need {readable(need)} and "
                f"{readable(free)} is free; leave out the damped errors or use "
                'MiniBlock(linear="row_avg").'
            )
        blocks = []
        for w in self.w.T:
            weighted = self.a * w[:, None]
            blocks.append(self.a.T @ weighted)
        return BlockDiagonal(torch.stack(blocks), self.shape)

    def eigenvalues(self) -> Tensor:
        """All blocks' eigenvalues, sorted."""
        return self.formed().eigenvalues()

    @property
    def signature(self) -> None:
        """It stays alone: every matrix has inputs of its own."""
        return None

    def rescued(self, p: float, damping: Scalar) -> BlockDiagonal:
        """Of the blocks, once they are formed."""
        return self.formed().rescued(p, damping)

    def _powered(self, p: float, damping: Scalar) -> BlockDiagonal:
        return self.formed()._powered(p, damping)
