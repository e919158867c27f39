"""Pieces of one batch put together as they come, into tensors that are there from the first.

Each piece is dropped at once. Kept until all are there, small tensors would lie between the large
ones of every capture, and what these leave free would be too small for the next.
"""

from __future__ import annotations

from torch import Tensor

from fisher_lab.statistics.layer_stats import LayerStats, joined
from fisher_lab.statistics.vocabulary import VocabularyStats, joined_vocabulary

Stats = LayerStats | VocabularyStats


class Gathered:
    """The statistics of one layer over all examples.

    Args:
        N: how many there will be.
    """

    def __init__(self, N: int) -> None:
        self.N = N
        self._first: Stats | None = None
        self._whole: list[Tensor] = []  # tensors with an axis of N examples
        self._filled = 0
        self._others: list[Stats] = []  # from the first one on that has other sizes

    def add(self, stats: Stats) -> None:
        """The next examples."""
        if self._first is None and stats.N < self.N:
            self._allocate(stats)
        if self._first is None or self._others or not self._fits(stats):
            self._others.append(stats)
            return
        stop = self._filled + stats.N
        for whole, part in zip(self._whole, _tensors(stats), strict=True):
            whole[self._filled : stop] = part
        self._filled = stop

    def whole(self) -> Stats:
        """All of them."""
        parts = list(self._others)
        if self._first is not None:
            filled = [tensor[: self._filled] for tensor in self._whole]
            parts.insert(0, _like(self._first, filled))
        if isinstance(parts[0], VocabularyStats):
            return joined_vocabulary(parts)  # type: ignore[arg-type]
        return joined(parts)  # type: ignore[arg-type]

    def _allocate(self, stats: Stats) -> None:
        self._whole = [part.new_empty(self.N, *part.shape[1:]) for part in _tensors(stats)]
        if isinstance(stats, LayerStats):
            # directions first in memory, as in one piece
            g = stats.g.new_empty(stats.R, self.N, *stats.g.shape[2:])
            self._whole[0] = g.transpose(0, 1)
        none = [tensor[:0] for tensor in self._whole]
        self._first = stats if isinstance(stats, LayerStats) else _like(stats, none)

    def _fits(self, stats: Stats) -> bool:
        """Whether a piece has the sizes of the first."""
        mine = [tensor.shape[1:] for tensor in self._whole]
        return mine == [tensor.shape[1:] for tensor in _tensors(stats)]


def _tensors(stats: Stats) -> list[Tensor]:
    """What there is of every example, the examples first."""
    if isinstance(stats, VocabularyStats):
        return stats.of_examples()
    found = [stats.g.transpose(0, 1)]
    if stats.a is not None:
        found.append(stats.a)
    return found


def _like(stats: Stats, tensors: list[Tensor]) -> Stats:
    """Statistics of the same layer with other tensors, as `_tensors` has them."""
    if isinstance(stats, VocabularyStats):
        return stats.with_examples(tensors)
    g, *others = tensors
    a = others[0] if others else None
    return stats.like(a, g.transpose(0, 1))
