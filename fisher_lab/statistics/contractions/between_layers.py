"""Between the layers of a network: inner products of the Gram matrices of their columns.

With U_l the columns of layer l and K_l = U_l^T U_l, the block of the network's F between two layers
is F_lm = U_l U_m^T / N, and |F_lm|_F^2 = <K_l, K_m> / N^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fisher_lab.statistics.contractions.gram import gram
from fisher_lab.statistics.layer_stats import LayerStats
from fisher_lab.statistics.pieces import slices

Columns = Mapping[str, LayerStats]  # of some examples, by layer


def gram_products(pieces: Sequence[Columns]) -> Tensor:
    """<K_l, K_m> `[L, L]` of every two layers, over the columns of all pieces.

    Naive form: `(K_l * K_m).sum()` with the Gram matrices of all columns; the blocks of the dense
    matrix in tests/network/test_fisher.py and tests/scale/test_across.py.

    Args:
        pieces: some examples each, of the same layers.
    """
    first = next(iter(pieces[0].values()))
    layers = len(pieces[0])
    total = first.g.new_zeros(layers, layers)
    for i, mine in enumerate(pieces):
        for j in range(i, len(pieces)):
            theirs = pieces[j]
            times = 1 if i == j else 2  # the pair across the diagonal is the same
            for rows in _few_rows(mine, theirs):
                grams = [gram(stats, theirs[name]).flatten() for name, stats in rows.items()]
                K = torch.stack(grams)
                total += times * (K @ K.T)
    return total


def _few_rows(mine: Columns, theirs: Columns) -> Iterator[Columns]:
    """Columns of a few examples at a time, so that their rows of all Gram matrices fit."""
    one = next(iter(mine.values()))
    other = next(iter(theirs.values()))
    entries = one.R * other.R * other.N
    bytes_each = len(mine) * entries * one.itemsize
    for part in slices(one.N, bytes_each):
        rows = {}
        for name, stats in mine.items():
            rows[name] = stats.examples(part)
        yield rows
