"""Which approximations a layer of a vocabulary can have: those that read no more of its rows than
diagonals.
"""

from __future__ import annotations

import torch

from fisher_lab.approximations.base import Approximation, build
from fisher_lab.matrices import VocabularyBlock
from fisher_lab.statistics import VocabularyStats, VocabularySums


def has_diagonal_rows(approximation: Approximation) -> bool:
    """Whether an approximation can be built of the statistics of a vocabulary, and be measured
    beside its block: tried on a small one.
    """
    sums = VocabularySums(_small())
    try:
        matrix = build(approximation, sums)
        matrix.frobenius_norm()
        VocabularyBlock(sums).inner(matrix)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, IndexError):
        return False
    return True


def _small() -> VocabularyStats:
    """Two examples of two positions and one lookup, of five rows."""
    W = torch.arange(10, dtype=torch.float64).view(5, 2) / 10
    a = torch.arange(8, dtype=torch.float64).view(2, 2, 2) - 3
    label = torch.tensor([[0, 3], [1, 1]])
    scale = torch.ones(2, 2, dtype=torch.float64)
    log_sum = (a @ W.T).logsumexp(-1)
    index = torch.tensor([[4], [1]])
    e = torch.ones(2, 1, 2, dtype=torch.float64)
    return VocabularyStats(W, a, label, scale, log_sum, index, e, bias=False)
