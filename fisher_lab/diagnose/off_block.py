"""How much of the whole network's Fisher lies outside the layer blocks, in Frobenius norm.

The Gram matrix of the columns of the whole network is the sum of its layers' Gram matrices K_l, so

    |F outside the blocks|^2 = |sum_l K_l|^2 - sum_l |K_l|^2 = 2 sum_{l < m} <K_l, K_m>,

a sum of inner products of PSD matrices, none negative, so that nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.memory import readable
from fisher_lab._passes.source import Source
from fisher_lab.errors import Measured
from fisher_lab.statistics import LayerStats, contractions
from fisher_lab.statistics.pieces import slices

OFF_BLOCK = "off_block"


def split(errors: str | Sequence[str]) -> tuple[list[str], bool]:
    """The errors of layers, and whether `off_block` was among them."""
    names = names_of("errors", errors)
    rest = [name for name in names if name != OFF_BLOCK]
    return rest, OFF_BLOCK in names


def off_block(source: Source) -> Measured:
    """|F outside the blocks of the layers measured|_F / |F|_F.

    Raises:
        ValueError: if the columns of all layers do not fit the budget together.
    """
    need = source.N * source.example_bytes(source.layers)
    if need > source.budget.total:
        raise ValueError(
            f"off_block needs the columns of all layers at once, {readable(need)}, expected at most "
            f'{readable(source.budget.total)}; use fewer examples, fisher="mc", or raise memory=.'
        )
    pieces = list(source.sweep())
    outside = whole = 0.0
    for i, mine in enumerate(pieces):
        for j in range(i, len(pieces)):
            for part in slices(_first(mine).N, _row_bytes(mine, pieces[j])):
                rows = {name: stats.examples(part) for name, stats in mine.items()}
                off, total = _products(rows, pieces[j])
                outside, whole = outside + (2 - (i == j)) * off, whole + (2 - (i == j)) * total
    eps = torch.finfo(source.dtype).eps
    value = math.sqrt(max(outside, 0.0) / whole) if whole > 0 else 0.0
    return Measured(value, 16 * eps * value)


def _products(mine: dict[str, LayerStats], theirs: dict[str, LayerStats]) -> tuple[float, float]:
    """Sum over l != m of <K_l, K_m>, and |sum_l K_l|^2, for some rows of the Gram matrices."""
    total, outside = None, 0.0
    for name, stats in mine.items():
        K = contractions.gram(stats, theirs[name])
        if total is None:
            total = K
            continue
        outside += 2 * float((total * K).sum())
        total += K
    assert total is not None
    return outside, float(total.square().sum())


def _first(stats: dict[str, LayerStats]) -> LayerStats:
    return next(iter(stats.values()))


def _row_bytes(mine: dict[str, LayerStats], theirs: dict[str, LayerStats]) -> float:
    one, other = _first(mine), _first(theirs)
    return one.R * other.R * other.N * one.g.element_size()
