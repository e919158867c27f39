"""The Fisher of the whole network beside that of its layers, from the columns of all layers.

The Gram matrix of the columns of the whole network is the sum of its layers' Gram matrices K_l, so

    |F|^2 = |sum_l K_l|^2    and
    |F outside the blocks|^2 = |sum_l K_l|^2 - sum_l |K_l|^2 = 2 sum_{l < m} <K_l, K_m>,

a sum of inner products of PSD matrices, none negative, so that nothing cancels. The dense twin
stands in tests/scale/test_across.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch

from fisher_lab.errors.quantities import Asked, NetworkQuantities, quantity
from fisher_lab.statistics import LayerStats, contractions
from fisher_lab.statistics.pieces import slices

Columns = Mapping[str, LayerStats]  # of some examples, by layer


class Network(Asked):
    """The columns of all layers, and the quantities of the whole network's F.

    Args:
        pieces: columns of some examples at a time, of the same layers each.
    """

    kind = NetworkQuantities

    def __init__(self, pieces: Sequence[Columns]) -> None:
        first = next(iter(pieces[0].values()))
        super().__init__(eps=torch.finfo(first.g.dtype).eps)
        self.pieces = pieces

    @quantity
    def square_outside(self) -> float:
        """|F outside the blocks of the layers|_F^2."""
        outside, _ = self._squares
        return outside

    @quantity
    def square_network(self) -> float:
        """|F|_F^2 of the whole network."""
        _, whole = self._squares
        return whole

    @cached_property
    def _squares(self) -> tuple[float, float]:
        """Both, from every pair of pieces once."""
        outside = 0.0
        whole = 0.0
        for i, mine in enumerate(self.pieces):
            for j in range(i, len(self.pieces)):
                theirs = self.pieces[j]
                times = 1 if i == j else 2  # the pair across the diagonal is the same
                for rows in _few_rows(mine, theirs):
                    off, square = _products(rows, theirs)
                    outside += times * off
                    whole += times * square
        return outside, whole


def _few_rows(mine: Columns, theirs: Columns) -> Iterator[Columns]:
    """Columns of a few examples at a time, so that their rows of Gram matrices fit into memory."""
    N = next(iter(mine.values())).N
    for part in slices(N, _row_bytes(mine, theirs)):
        rows = {}
        for name, stats in mine.items():
            rows[name] = stats.examples(part)
        yield rows


def _products(mine: Columns, theirs: Columns) -> tuple[float, float]:
    """Sum over l != m of <K_l, K_m>, and |sum_l K_l|^2, for some rows of the Gram matrices."""
    names = list(mine)
    total = contractions.gram(mine[names[0]], theirs[names[0]])
    outside = 0.0
    for name in names[1:]:
        K = contractions.gram(mine[name], theirs[name])
        inner = (total * K).sum()  # with all layers before this one
        outside += 2 * float(inner)
        total += K
    whole = total.square().sum()
    return outside, float(whole)


def _row_bytes(mine: Columns, theirs: Columns) -> float:
    """Bytes of the rows of one example in the Gram matrix of two pieces."""
    one = next(iter(mine.values()))
    other = next(iter(theirs.values()))
    entries = one.R * other.R * other.N
    return entries * one.g.element_size()
