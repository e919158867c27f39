"""The Fisher of the whole network beside that of its layers, from the columns of all layers.

The Gram matrix of the columns of the whole network is the sum of its layers' Gram matrices K_l, so

    |F|^2 = |sum_l K_l|^2    and
    |F outside the blocks|^2 = |sum_l K_l|^2 - sum_l |K_l|^2 = 2 sum_{l < m} <K_l, K_m>,

a sum of inner products of PSD matrices, none negative, so that nothing cancels. The dense twin
stands in tests/scale/test_across.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.arguments import check_kind
from fisher_lab.errors.quantities import Asked, NetworkQuantities, quantity
from fisher_lab.statistics import LayerStats, contractions
from fisher_lab.statistics.contractions import Columns

COLUMNS = "{layer: LayerStats}, or a list of such pieces"


class Network(Asked):
    """The columns of all layers, and the quantities of the whole network's F.

    Args:
        pieces: columns of some examples at a time, of the same layers each.
    """

    kind = NetworkQuantities

    def __init__(self, pieces: Sequence[Columns]) -> None:
        for piece in pieces:
            check_kind("columns", piece, Mapping, COLUMNS)
            for stats in piece.values():
                check_kind("columns", stats, LayerStats, COLUMNS)
        if not pieces or not pieces[0]:
            raise ValueError(f"Got no columns, expected {COLUMNS}.")
        first = next(iter(pieces[0].values()))
        super().__init__(eps=torch.finfo(first.g.dtype).eps)
        self.pieces = pieces

    @quantity
    def square_outside(self) -> float:
        """|F outside the blocks of the layers|_F^2."""
        products = self._products
        between = products - torch.diag(products.diagonal())
        return float(between.sum())

    @quantity
    def square_network(self) -> float:
        """|F|_F^2 of the whole network."""
        return float(self._products.sum())

    @cached_property
    def _products(self) -> Tensor:
        """<K_l, K_m> `[L, L]`."""
        return contractions.gram_products(self.pieces)
