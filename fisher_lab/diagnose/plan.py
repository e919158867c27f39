"""The plan: how every layer is measured, and which layers are measured together, from their sizes
alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import torch

from fisher_lab._passes.source import Source
from fisher_lab.layers import VocabularyLayer

# the route of layers whose columns do not fit into the memory
STREAMED = "columns, read anew for every product"
# that of a vocabulary
SLICED = "columns, formed anew in every pass, some rows of W at a time"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is measured.

    Attributes:
        name: of the layer.
        streamed: whether its columns do not fit into the memory and are read anew for every
            product.
    """

    name: str
    streamed: bool


@dataclass(frozen=True)
class Group:
    """Layers that are measured together.

    Attributes:
        layers: their plans.
        captured_once: whether their columns are captured once and kept.
    """

    layers: tuple[LayerPlan, ...]
    captured_once: bool

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    def only(self, names: Container[str]) -> Group:
        """The group with some of its layers."""
        layers = tuple(layer for layer in self.layers if layer.name in names)
        return replace(self, layers=layers)


def plan(source: Source, names: Iterable[str], candidates: int, exact: str) -> list[Group]:
    """Groups of layers: one by one if the columns are kept, else as many as fit the share of a
    group.

    A layer whose columns alone are more than the budget is measured alone, and its columns are read
    anew for every product; with exact="func" the block is held whatever the columns take.

    Args:
        source: the question.
        names: layers to measure.
        candidates: number of approximations.
        exact: "captured" or "func".
    """
    itemsize = torch.finfo(source.dtype).bits // 8
    everything = source.fits_at_once()
    groups: list[list[LayerPlan]] = []
    once: list[bool] = []
    room = 0.0
    for name in names:
        if isinstance(source.layers[name], VocabularyLayer):
            groups.append([LayerPlan(name, streamed=False)])
            source.check_vocabulary(name)
            once.append(True)
            room = 0.0
            continue
        rows, columns = source.layers[name].shape
        of_example = source.column_numbers(name)
        # the block itself, or its columns
        held = min(float(rows * columns) ** 2, source.N * of_example)
        need = source.budget.for_block(held * itemsize)
        streamed = need > source.budget.total and exact == "captured"
        layer = LayerPlan(name, streamed)
        kept = everything or source.fits_at_once([name])
        if streamed or kept:
            groups.append([layer])
            once.append(kept)
            room = 0.0
            continue
        # a matrix of every candidate with its factors, and the columns three times: captured, kept,
        # and at work
        matrices = candidates * (rows**2 + columns**2 + 2 * rows * columns)
        need = itemsize * (matrices + 3 * held)
        if room < need:
            groups.append([])
            once.append(False)
            room = source.budget.for_group
        groups[-1].append(layer)
        room -= need
    return [Group(tuple(layers), kept) for layers, kept in zip(groups, once, strict=True)]
