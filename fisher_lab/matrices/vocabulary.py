"""The exact block of a vocabulary: N columns of V x d_in numbers that are formed anew in every
pass, a slice of the rows at a time.

The spectral norm of its difference from a matrix K that is diagonal in a basis I (x) B of the rows
and columns of W (KFAC, EKFAC and their like have no other here) takes no Lanczos vectors, which
are as large as W. With U the columns over sqrt(N) and

    M(l) = U^T (K + l)^-1 U        [N, N],

F - K has as many eigenvalues above l > 0 as M(l) has above 1, and x = (K + l)^-1 U c is the
eigenvector where M(l) c = c. The largest is found by Rayleigh quotients of such x. Eigenvalues of
K - F above m are those of K above m, less those that the columns pull below: the inertia of

    [K - m   U]
    [U^T     1]

says that they are as many as K has above m and I - U^T (K - m)^-1 U has above 0, less N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.matrices.base import AnyStats, FisherMatrix, Scalar, checked_scalar
from fisher_lab.matrices.diagonal import DiagonalMatrix
from fisher_lab.matrices.eigenbasis import EigenbasisDiagonal
from fisher_lab.matrices.in_passes import InPasses
from fisher_lab.matrices.kronecker import Kronecker
from fisher_lab.statistics import VocabularyStats, VocabularySums

TOLERANCE = 1e-3  # relative residual at which the norm of a difference is known
MOST_STEPS = 20  # passes for one end of the spectrum
PROBES = 4  # numbers of eigenvalues that one pass counts


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyBlock(InPasses):
    """U U^T for the columns U of a vocabulary, never formed whole.

    Args:
        sums: what the columns follow from, with what was computed of them already.

    Example:
        >>> from fisher_lab.statistics.vocabulary import VocabularyStats, VocabularySums
        >>> W, a = torch.randn(5, 3), torch.randn(4, 1, 3)
        >>> log_sum = (a @ W.T).logsumexp(-1)
        >>> label, one = torch.arange(4)[:, None], torch.ones(4, 1)
        >>> none = torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0, 3)
        >>> stats = VocabularyStats(W, a, label, one, log_sum, *none, bias=False)
        >>> fl.matrices.VocabularyBlock(VocabularySums(stats)).shape
        (5, 3)
    """

    sums: VocabularySums

    @property
    def stats(self) -> VocabularyStats:
        """What the columns follow from."""
        return self.sums.stats

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.stats.shape

    @property
    def examples(self) -> int:
        """Those of the columns."""
        return self.stats.N

    def _apply(self, X: Tensor) -> Tensor:
        return self.sums.apply(X)

    def trace(self) -> Tensor:
        """Mean squared norm of the columns."""
        return self.gram.diagonal().sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the Gram matrix."""
        return torch.linalg.norm(self.gram)

    @cached_property
    def gram(self) -> Tensor:
        """K = U^T U `[N, N]`, whose eigenvalues are those of F besides zeros."""
        return self.sums.gram() / self.stats.N

    @cached_property
    def _top(self) -> Tensor:
        return torch.linalg.eigvalsh(self.gram)[-1]

    def eigenvalues(self) -> Tensor:
        """Those of the Gram matrix, padded with zeros."""
        if self.dim <= self.stats.N:
            return super().eigenvalues()
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0)
        zeros = values.new_zeros(self.dim - len(values))
        return torch.cat([zeros, values])

    def scaled(self, c: Scalar) -> VocabularyBlock:
        """Columns times sqrt(c)."""
        c = checked_scalar(c, "factor", self)
        return VocabularyBlock(VocabularySums(self.stats.scaled(c)))

    def _dense(self) -> Tensor:
        return self.sums.dense()

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self>, by products with the columns of F."""
        total = self.gram.new_zeros(())
        for P in stats.per_example():
            flat = P.flatten(2, 3)  # [R, n, V, d_in]
            s = self.sums.project(flat)
            total = total + s.square().sum()
        return total / (stats.N * self.stats.N)

    def _inner_by_columns(self, other: FisherMatrix) -> Tensor:
        if _has_diagonal_rows(other):
            return other.quadratic(self.sums)
        # one of another kind asks for more than these sums have
        return FisherMatrix.quadratic(other, self.sums)

    @property
    def product_flops(self) -> float:
        """Output gradients and their products with the inputs, twice."""
        return 4.0 * self.stats.N * self.stats.T * self.dim

    # -- the spectral norm of a difference ---------------------------------------------------------
    def norm_of_difference(self, other: FisherMatrix) -> tuple[float, float] | None:
        """|F - K|_2 for a K that is diagonal in a basis of the columns of W."""
        diagonal = _in_basis_of_columns(other)
        if diagonal is None:
            return None
        right, values = diagonal
        pencil = _Pencil(self.stats, self.gram, right, values)
        high, residual = pencil.highest()
        low, unknown = pencil.lowest(high)
        if low > high:
            return low, unknown
        return high, residual


def _has_diagonal_rows(matrix: FisherMatrix) -> bool:
    """Whether a matrix is one of the structures, of one group, that are diagonal over the rows."""
    if isinstance(matrix, DiagonalMatrix):
        return True
    if isinstance(matrix, Kronecker):
        return len(matrix.factors) == 2 and matrix.factors[0].shape[:-1] == (1,)
    if isinstance(matrix, EigenbasisDiagonal):
        return matrix.basis[0] is None and len(matrix.basis) == 2 and len(matrix.values) == 1
    return False


def _in_basis_of_columns(matrix: FisherMatrix) -> tuple[Tensor | None, Tensor] | None:
    """B `[d_in, d_in]` or None, and the values `[V, d_in]` of K = (I (x) B) values (I (x) B)^T;
    None for another matrix.
    """
    if not _has_diagonal_rows(matrix):
        return None
    if isinstance(matrix, DiagonalMatrix):
        return None, matrix.values
    if isinstance(matrix, Kronecker):
        matrix = matrix.eigenbasis
    assert isinstance(matrix, EigenbasisDiagonal)
    right = matrix.basis[1]
    if right is not None:
        right = right[0]
    return right, matrix.values[0]


@dataclass(frozen=True)
class _Pencil:
    """F - K in the basis in which K is diagonal.

    Args:
        stats: of the columns.
        gram: U^T U `[N, N]`.
        right: B; None for the identity.
        values: of K `[V, d_in]`.
    """

    stats: VocabularyStats
    gram: Tensor
    right: Tensor | None
    values: Tensor

    def highest(self) -> tuple[float, float]:
        """The largest eigenvalue of F - K and its residual; 0 where none is positive."""
        shift = float(torch.linalg.eigvalsh(self.gram)[-1])  # of F alone: an upper bound
        found = 0.0
        residual = 0.0
        for _ in range(MOST_STEPS):
            if not shift > 0:
                return 0.0, 0.0
            M, M2 = self._moments([shift], (1, 2))
            found, residual = self._rayleigh(shift, M, M2)
            if residual <= TOLERANCE * abs(found):
                break
            shift = found
        return max(found, 0.0), residual

    def _rayleigh(self, shift: float, M: Tensor, M2: Tensor) -> tuple[float, float]:
        """x^T (F - K) x / x^T x and the residual for x = (K + l)^-1 U c, c the first eigenvector
        of M(l).

        As F x = m U c and K x = U c - l x, (F - K) x = (m - 1) U c + l x.
        """
        of_M, vectors = torch.linalg.eigh(M)
        m = float(of_M[-1])
        c = vectors[:, -1]
        size = float(c @ M2 @ c)  # |x|^2
        columns = float(c @ self.gram @ c)  # |U c|^2
        quotient = shift + (m - 1) * m / size
        beside = max(0.0, columns - m**2 / size)  # of U c, beside x
        residual = abs(m - 1) * (beside / size) ** 0.5
        return quotient, residual

    def lowest(self, beyond: float) -> tuple[float, float]:
        """The largest eigenvalue of K - F and half of the interval that it is known to lie in;
        0 where it is not larger than `beyond`.
        """
        above = float(self.values.max())
        if above <= beyond:
            return 0.0, 0.0
        # no eigenvalue is below a diagonal entry
        below = max(beyond, self._largest_entry())
        for _ in range(MOST_STEPS):
            middle = (above + below) / 2
            if above - below <= 4 * TOLERANCE * middle:
                break
            # the first one ends it where there is nothing above, or little
            step = (above - below) / PROBES
            probes = [below * (1 + TOLERANCE)]
            probes += [below + step * i for i in range(1, PROBES)]
            counts = self._counts(probes)
            for probe, count in zip(probes, counts, strict=True):
                if count:
                    below = probe
                else:
                    above = probe
                    break
        if below <= beyond:
            return 0.0, 0.0
        return (above + below) / 2, (above - below) / 2

    def _largest_entry(self) -> float:
        """Of the diagonal of K - F."""
        largest = -torch.inf
        for rows, P in self.stats.sliced(self.right):
            squares = P.square_().sum(0) / self.stats.N
            entry = (self.values[rows] - squares).max()
            largest = max(largest, float(entry))
        return largest

    def _counts(self, probes: Sequence[float]) -> list[int]:
        """How many eigenvalues of K - F lie above each number."""
        N = self.stats.N
        found = []
        moments = self._moments([-probe for probe in probes], (1,))
        eye = torch.eye(N, dtype=self.gram.dtype, device=self.gram.device)
        for probe, M in zip(probes, moments, strict=True):
            of_K = int((self.values > probe).sum())
            positive = int((torch.linalg.eigvalsh(eye - M) > 0).sum())
            found.append(of_K + positive - N)
        return found

    def _moments(self, shifts: Sequence[float], powers: Sequence[int]) -> list[Tensor]:
        """U^T (K + l)^-p U for every l and p, in one pass."""
        totals = [torch.zeros_like(self.gram) for _ in range(len(shifts) * len(powers))]
        for rows, P in self.stats.sliced(self.right):
            flat = P.flatten(1)
            which = 0
            for shift in shifts:
                inverse = (self.values[rows] + shift).reciprocal().flatten()
                weighted = flat
                for _ in powers:
                    weighted = weighted * inverse
                    totals[which].addmm_(weighted, flat.T)
                    which += 1
        return [total / self.stats.N for total in totals]
