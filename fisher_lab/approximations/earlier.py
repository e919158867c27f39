"""Moments in checkpoints of version 1, which were dictionaries: the approximation alone told what
they held.
"""

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
        return WithSquares(_of_version_1(found, approximation.base, layer), s)
    if isinstance(approximation, TENGraD):
        stats = _stats(found, layer)
        return Columns(stats, found.get("weight"), approximation.batch)
    if isinstance(approximation, KPSVD) and "g" in found:
        return FirstColumns(_stats(found, layer), found.get("weight"))
    if isinstance(approximation, Exact):
        if "g" in found:
            return ColumnsOrBlock(_stats(found, layer), found.get("weight"))
        rows, columns = layer.shape
        d = rows * columns
        found["block"] = found["block"].reshape(d, d)  # it had the shape of W twice
    if isinstance(approximation, MiniBlock) and "a" in found:
        return Rows(found["a"], found["w"])
    return as_moments(found, layer.shape, approximation.label)


def _stats(found: dict[str, Tensor], layer: Layer) -> LayerStats:
    """The examples that were kept."""
    return LayerStats(found.get("a"), found["g"], layer.kernel, layer.bias)
