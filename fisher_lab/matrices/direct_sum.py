"""Independent blocks for the weight proper and the bias (TN and kernel mini-blocks of a convolution
with bias).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.matrices.base import DampingStyle, FisherMatrix
from fisher_lab.statistics import LayerStats, Sums


@dataclass(frozen=True, eq=False)
class DirectSum(FisherMatrix):
    """Matrices over consecutive columns of W; entries of F between the parts count as error.

    Args:
        parts: matrices over `[d_out, d_k]` with d_1 + d_2 + ... = d_in.
    """

    parts: tuple[FisherMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def _slices(self) -> Iterator[tuple[FisherMatrix, slice]]:
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.shape[1])
            start += part.shape[1]

    def _apply(self, X: Tensor) -> Tensor:
        return torch.cat([part._apply(X[..., columns]) for part, columns in self._slices()], -1)

    def trace(self) -> Tensor:
        """Sum of the parts' traces."""
        return torch.stack([part.trace() for part in self.parts]).sum()

    def frobenius_norm(self) -> Tensor:
        """Root of the sum of the parts' squares."""
        return torch.linalg.norm(torch.stack([part.frobenius_norm() for part in self.parts]))

    def spectral_norm(self) -> Tensor:
        """Largest of the parts' norms."""
        return torch.stack([part.spectral_norm() for part in self.parts]).max()

    def eigenvalues(self) -> Tensor:
        """All parts' eigenvalues, sorted."""
        return torch.cat([part.eigenvalues() for part in self.parts]).sort().values

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """Sum of the parts' inner products with their own columns of F."""
        return torch.stack(
            [part.quadratic(stats.inputs(columns)) for part, columns in self._slices()]
        ).sum()

    def scaled(self, c: float | Tensor) -> DirectSum:
        """c times every part."""
        return DirectSum(tuple(part.scaled(c) for part in self.parts))

    def _powered(self, p: float, damping: float | Tensor) -> DirectSum:
        return DirectSum(tuple(part.powered(p, damping) for part in self.parts))

    def _powered_factored(self, p: float, damping: float | Tensor) -> DirectSum:
        """Kronecker parts damped by factors, the others exactly."""
        powers = []
        for part in self.parts:
            style: DampingStyle = "factored" if part.has_factors else "exact"
            powers.append(part.powered(p, damping, style))
        return DirectSum(tuple(powers))

    def rescued(self, p: float, damping: float | Tensor) -> DirectSum:
        """Part by part."""
        return DirectSum(tuple(part.rescued(p, damping) for part in self.parts))

    @property
    def signature(self) -> Hashable:
        """Those of the parts; alone where one of them is."""
        signatures = tuple(part.signature for part in self.parts)
        return None if None in signatures else ("DirectSum", signatures)

    def stack(self, others: Sequence[DirectSum]) -> DirectSum:
        """Part by part."""
        if not others:
            return self
        joined = []
        for first, *rest in zip(self.parts, *(other.parts for other in others), strict=True):
            joined.append(first.stack(rest))
        return DirectSum(tuple(joined))

    def part(self, index: int, count: int) -> DirectSum:
        """Part by part."""
        if count == 1:
            return self
        return DirectSum(tuple(piece.part(index, count) for piece in self.parts))
