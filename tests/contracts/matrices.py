"""An instance of every structure of FisherMatrix, and dense algebra for them.

A new structure joins by one line in `MATRICES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fisher_lab._ground.linalg import shifted_power
from fisher_lab.matrices import (
    BlockDiagonal,
    Dense,
    DiagonalMatrix,
    DirectSum,
    EigenbasisDiagonal,
    FactoredRows,
    FisherMatrix,
    Kronecker,
    LowRank,
    Streamed,
    VocabularyBlock,
)
from fisher_lab.statistics import LayerStats, VocabularyStats, VocabularySums
from tests.helpers import random_orthogonal, random_stats

POWERS = (-1.0, -0.5, 0.5, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(*shape: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Random PSD matrices `[..., n, n]`, of full rank unless `rank` says otherwise."""
    X = normal(*shape[:-1], rank or 2 * shape[-1], seed=seed)
    return X @ X.transpose(-1, -2) / X.shape[-1]


def positive(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).square() + 0.1


def bases(Q: int, n: int) -> Tensor:
    return torch.stack([random_orthogonal(n, 7 * q + n) for q in range(Q)])


def pieces_of(stats: LayerStats, size: int) -> Iterator[LayerStats]:
    return (stats.examples(slice(i, i + size)) for i in range(0, stats.N, size))


def streamed(stats: LayerStats, size: int) -> Streamed:
    """The block of `stats` in pieces of `size` examples."""
    return Streamed(partial(pieces_of, stats, size), stats.N, stats.shape, stats.g.new_ones(()))


def vocabulary_sums(d_out: int = 4, d_in: int = 3) -> VocabularySums:
    """Of four examples of three positions and two lookups."""
    W = normal(d_out, d_in)
    a = normal(4, 3, d_in, seed=1)
    label = torch.arange(12).reshape(4, 3) % d_out
    log_sum = (a @ W.T).logsumexp(-1)
    index = torch.arange(8).reshape(4, 2) % d_out
    index[0, 0] = -1  # of a row that is not trained
    e = normal(4, 2, d_in, seed=2)
    scale = positive(4, 3)
    return VocabularySums(VocabularyStats(W, a, label, scale, log_sum, index, e, bias=False))


@dataclass(frozen=True, eq=False)
class Own(FisherMatrix):
    """A user's structure that gives the abstract members alone: c I + diag(values)."""

    c: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.values.shape[0], self.values.shape[1]

    def _apply(self, X: Tensor) -> Tensor:
        return (self.c + self.values) * X

    def trace(self) -> Tensor:
        """Sum of the diagonal."""
        return (self.c + self.values).sum()

    def frobenius_norm(self) -> Tensor:
        """Norm of the diagonal."""
        return torch.linalg.norm(self.c + self.values)

    def scaled(self, c: float | Tensor) -> FisherMatrix:
        """c times both."""
        return Own(self.c * c, self.values * c)

    def _powered(self, p: float, damping: float | Tensor) -> FisherMatrix:
        return Own(torch.zeros_like(self.c), shifted_power(self.c + self.values, p, damping))


MATRICES: dict[str, Callable[[], FisherMatrix]] = {
    "Kronecker": lambda: Kronecker((psd(1, 3, 3), psd(1, 4, 4, seed=1))),
    "Kronecker, two groups": lambda: Kronecker((psd(2, 3, 3), psd(2, 4, 4, seed=1))),
    "Kronecker, three modes": lambda: Kronecker(
        (psd(1, 2, 2), psd(1, 3, 3, seed=1), psd(1, 2, 2, seed=2))
    ),
    "Kronecker, four modes, two groups": lambda: Kronecker(
        tuple(psd(2, 2, 2, seed=s) for s in range(4))
    ),
    "Kronecker, one mode": lambda: Kronecker((psd(1, 4, 4),)),
    "Kronecker, diagonal left": lambda: Kronecker((positive(2, 3), psd(2, 4, 4))),
    "Kronecker, diagonal right": lambda: Kronecker((psd(1, 3, 3), positive(1, 4))),
    "Kronecker, diagonals": lambda: Kronecker((positive(1, 3), positive(1, 4, seed=1))),
    "Kronecker, singular": lambda: Kronecker((psd(1, 3, 3, rank=1), psd(1, 4, 4, rank=2))),
    "Kronecker, identity left": lambda: Kronecker(
        (torch.ones(2, 3).double(), psd(2, 4, 4)), identities=(0,)
    ),
    "Kronecker, identity right": lambda: Kronecker(
        (psd(1, 3, 3), torch.ones(1, 4).double()), identities=(1,)
    ),
    "Kronecker, identity between": lambda: Kronecker(
        (psd(1, 2, 2), torch.ones(1, 3).double(), psd(1, 2, 2, seed=1)), identities=(1,)
    ),
    "Kronecker, nothing but identities": lambda: Kronecker(
        (torch.ones(1, 3).double(),), identities=(0,)
    ),
    "Kronecker, of eigenpairs": lambda: Kronecker.of_eigenpairs(
        [(positive(2, 3), bases(2, 3)), (positive(2, 4, seed=1), bases(2, 4))]
    ),
    "EigenbasisDiagonal": lambda: EigenbasisDiagonal((bases(1, 3), bases(1, 4)), positive(1, 3, 4)),
    "EigenbasisDiagonal, two groups": lambda: EigenbasisDiagonal(
        (bases(2, 3), bases(2, 4)), positive(2, 3, 4)
    ),
    "EigenbasisDiagonal, one-sided": lambda: EigenbasisDiagonal(
        (None, bases(1, 4)), positive(1, 3, 4)
    ),
    "EigenbasisDiagonal, three modes": lambda: EigenbasisDiagonal(
        (bases(1, 3), bases(1, 2), bases(1, 2)), positive(1, 3, 2, 2)
    ),
    "BlockDiagonal, rows": lambda: BlockDiagonal(psd(3, 4, 4), (3, 4)),
    "BlockDiagonal, kernels": lambda: BlockDiagonal(psd(6, 2, 2), (3, 4)),
    "BlockDiagonal, columns": lambda: BlockDiagonal(psd(4, 3, 3), (3, 4), 1),
    "BlockDiagonal, columns, two groups": lambda: BlockDiagonal(psd(8, 3, 3), (6, 4), 2),
    "DiagonalMatrix": lambda: DiagonalMatrix(positive(3, 4)),
    "LowRank, few columns": lambda: LowRank(random_stats(0, N=3, R=1, d_out=3, d_in=4)),
    "LowRank, many columns": lambda: LowRank(random_stats(0, N=9, R=2, d_out=3, d_in=4)),
    "LowRank, positions and groups": lambda: LowRank(
        random_stats(0, N=3, T=3, Q=2, R=2, d_out=3, d_in=4)
    ),
    "LowRank, explicit gradients": lambda: LowRank(
        type(random_stats(0)).of_gradients(normal(2, 3, 1, 3, 4))
    ),
    "Streamed": lambda: streamed(random_stats(0, N=7, R=2, d_out=3, d_in=4), 3),
    "Streamed, positions and groups": lambda: streamed(
        random_stats(0, N=5, T=3, Q=2, R=2, d_out=3, d_in=4), 2
    ),
    "VocabularyBlock": lambda: VocabularyBlock(vocabulary_sums()),
    "Dense": lambda: Dense(psd(12, 12), (3, 4)),
    "Dense, singular": lambda: Dense(psd(12, 12, rank=5), (3, 4)),
    "BlockDiagonal, large blocks": lambda: BlockDiagonal(psd(2, 20, 20), (2, 20)),
    "BlockDiagonal, large columns": lambda: BlockDiagonal(psd(2, 20, 20), (20, 2), 1),
    "BlockDiagonal, singular": lambda: BlockDiagonal(psd(3, 4, 4, rank=2), (3, 4)),
    "DiagonalMatrix, singular": lambda: DiagonalMatrix(
        positive(3, 4) * (torch.arange(12).reshape(3, 4) % 3 > 0)
    ),
    "DirectSum": lambda: DirectSum(
        (Kronecker((psd(1, 3, 3), psd(1, 2, 2), psd(1, 2, 2))), Dense(psd(3, 3), (3, 1)))
    ),
    "DirectSum, blocks": lambda: DirectSum(
        (BlockDiagonal(psd(6, 2, 2), (3, 4)), DiagonalMatrix(positive(3, 1)))
    ),
    "a user's own": lambda: Own(positive(1), positive(3, 4)),
    "FactoredRows": lambda: FactoredRows(normal(5, 4), positive(5, 3)),
    "FactoredRows, few examples": lambda: FactoredRows(normal(2, 4), positive(2, 3)),
}
FACTORED = [name for name in MATRICES if name.startswith("Kronecker")]


def dense_of(matrix: FisherMatrix) -> Tensor:
    """The matrix by its action on unit vectors, one at a time `[d, d]`."""
    d_out, d_in = matrix.shape
    columns = []
    for i in range(d_out * d_in):
        unit = torch.zeros(d_out * d_in, dtype=matrix.dtype)
        unit[i] = 1
        columns.append((matrix @ unit.reshape(d_out, d_in)).reshape(-1))
    return torch.stack(columns, 1)


def dense_power(M: Tensor, p: float, damping: float) -> Tensor:
    """(M + damping)^p by eigh; eigenvalues that are rounding noise have no negative power."""
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    shifted = values.clamp(min=0) + damping
    noise = shifted <= 1e-12 * shifted.max()
    powers = torch.where(noise, torch.zeros_like(shifted), shifted.clamp(min=1e-300) ** p)
    return (vectors * powers) @ vectors.T
