"""Independent blocks for the weight proper and the bias.

TN and the kernel mini-blocks of a convolution with bias are such sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.matrices.base import (
    AnyStats,
    DampingStyle,
    FisherMatrix,
    Scalar,
    check_index,
    checked_scalar,
)


@dataclass(frozen=True, eq=False, repr=False)
class DirectSum(FisherMatrix):
    """Matrices over consecutive columns of W; entries of F between the parts count as error.

    Args:
        parts: matrices over `[d_out, d_k]` with d_1 + d_2 + ... = d_in.

    Example:
        >>> weight = fl.matrices.Dense(torch.eye(6), (2, 3))
        >>> bias = fl.matrices.Dense(torch.eye(2), (2, 1))
        >>> fl.matrices.DirectSum((weight, bias)).shape
        (2, 4)
    """

    parts: tuple[FisherMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        d_out = self.parts[0].shape[0]
        d_in = 0
        for part in self.parts:
            d_in += part.shape[1]
        return d_out, d_in

    def _slices(self) -> Iterator[tuple[FisherMatrix, slice]]:
        """Every part with its columns of W."""
        start = 0
        for part in self.parts:
            stop = start + part.shape[1]
            yield part, slice(start, stop)
            start = stop

    def _apply(self, X: Tensor) -> Tensor:
        images = []
        for part, columns in self._slices():
            images.append(part._apply(X[..., columns]))
        return torch.cat(images, -1)

    def trace(self) -> Tensor:
        """Sum of the parts' traces."""
        traces = torch.stack([part.trace() for part in self.parts])
        return traces.sum()

    def frobenius_norm(self) -> Tensor:
        """Root of the sum of the parts' squares."""
        norms = torch.stack([part.frobenius_norm() for part in self.parts])
        return torch.linalg.norm(norms)

    def spectral_norm(self) -> Tensor:
        """Largest of the parts' norms."""
        tops = torch.stack([part.spectral_norm() for part in self.parts])
        return tops.max()

    def eigenvalues(self) -> Tensor:
        """All parts' eigenvalues, sorted."""
        values = torch.cat([part.eigenvalues() for part in self.parts])
        return values.sort().values

    def quadratic(self, stats: AnyStats) -> Tensor:
        """Sum of the parts' inner products with their own columns of F."""
        products = []
        for part, columns in self._slices():
            own = stats.inputs(columns)
            products.append(part.quadratic(own))
        return torch.stack(products).sum()

    @property
    def rounding(self) -> float:
        """The largest of the parts'."""
        largest = 0.0
        for part in self.parts:
            largest = max(largest, part.rounding)
        return largest

    def scaled(self, c: Scalar) -> DirectSum:
        """c times every part."""
        c = checked_scalar(c, "factor", self)
        parts = []
        for part in self.parts:
            parts.append(part.scaled(c))
        return DirectSum(tuple(parts))

    def _powered(self, p: float, damping: Scalar) -> DirectSum:
        powers = []
        for part in self.parts:
            powers.append(part.powered(p, damping))
        return DirectSum(tuple(powers))

    def _powered_factored(self, p: float, damping: Scalar) -> DirectSum:
        """Kronecker parts damped by factors, the others exactly."""
        powers = []
        for part in self.parts:
            # the bias has no factors: its own lambda is what factored damping stands in for
            style: DampingStyle = "factored" if part.has_factors else "exact"
            powers.append(part.powered(p, damping, style))
        return DirectSum(tuple(powers))

    def rescued(self, p: float, damping: Scalar) -> DirectSum:
        """Part by part."""
        powers = []
        for part in self.parts:
            powers.append(part.rescued(p, damping))
        return DirectSum(tuple(powers))

    @property
    def signature(self) -> Hashable:
        """Those of the parts; alone where one of them is."""
        signatures = []
        for part in self.parts:
            signature = part.signature
            if signature is None:
                return None
            signatures.append(signature)
        return "DirectSum", tuple(signatures)

    def stack(self, others: Sequence[DirectSum]) -> DirectSum:
        """Part by part."""
        if not others:
            return self
        joined = []
        for i, part in enumerate(self.parts):
            rest = []
            for other in others:
                rest.append(other.parts[i])
            joined.append(part.stack(rest))
        return DirectSum(tuple(joined))

    def part(self, index: int, count: int) -> DirectSum:
        """Part by part."""
        check_index(index, count)
        if count == 1:
            return self
        pieces = []
        for part in self.parts:
            pieces.append(part.part(index, count))
        return DirectSum(tuple(pieces))
