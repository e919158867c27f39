"""Moments in checkpoints of version 1: dictionaries, of which the approximation told the kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisher_lab.approximations.base import Approximation, as_moments
from fisher_lab.approximations.corrected import EigenvalueCorrected, WithSquares
from fisher_lab.approximations.exact import ColumnsOrBlock, Exact
from fisher_lab.approximations.kpsvd import KPSVD, FirstColumns
from fisher_lab.approximations.mini_block import MiniBlock
from fisher_lab.approximations.moments import Columns, Moments, Rows
from fisher_lab.approximations.tengrad import TENGraD
from fisher_lab.layers import Layer
from fisher_lab.statistics import LayerStats


def moments_of_any_version(
    found: Moments | Mapping[str, Any] | None,
    approximation: Approximation,
    layer: Layer,
) -> Moments | None:
    """Moments as they are now.

    Args:
        found: what a checkpoint holds: nothing, Moments, or a dictionary of version 1.
        approximation: whose moments they are.
        layer: that they are of.
    """
    if found is None or isinstance(found, Moments):
        return found
    return _of_version_1(dict(found), approximation, layer)


def _of_version_1(found: dict[str, Tensor], approximation: Approximation, layer: Layer) -> Moments:
    """The kind that the approximation makes of its tensors."""
    if isinstance(approximation, EigenvalueCorrected):
        s = found.pop("s", None)
        base = _of_version_1(found, approximation.base, layer)
        return WithSquares(base, s)
    if isinstance(approximation, MiniBlock) and "a" in found:
        return Rows(found["a"], found["w"])
    if "g" in found:
        columns = _columns(found, approximation, layer)
        if columns is not None:
            return columns
    if isinstance(approximation, Exact):
        rows, width = layer.shape
        d = rows * width
        # it had the shape of W twice
        found["block"] = found["block"].reshape(d, d)
    return as_moments(found, layer.shape, approximation.label)


def _columns(
    found: dict[str, Tensor],
    approximation: Approximation,
    layer: Layer,
) -> Columns | None:
    """The examples that were kept; None for an approximation that keeps none."""
    a = found.get("a")
    g = found["g"]
    weight = found.get("weight")
    stats = LayerStats(a, g, layer.kernel, layer.bias)
    if isinstance(approximation, TENGraD):
        return Columns(stats, weight, approximation.batch)
    if isinstance(approximation, KPSVD):
        return FirstColumns(stats, weight)
    if isinstance(approximation, Exact):
        return ColumnsOrBlock(stats, weight)
    return None
