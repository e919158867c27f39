"""MiniBlock: Bahamou, Goldfarb & Ren (2023), mini-block Fisher (MBF).

The layer's block is replaced by many small diagonal blocks of F:

    Linear  row:      one [d_in, d_in] block per output (bias inside)        row_avg: their average, I (x) U2 / d_out
            col:      one [d_out, d_out] block per input                     col_avg: their average, U1 / d_in (x) I
    conv    kernel:   one [kh kw, kh kw] block per (output, input) channel, the bias diagonal
            filter:   one block per output channel (bias inside)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fisher_lab._ground.memory import available_bytes, readable
from fisher_lab.approximations.base import Approximation, Moments, check_choice
from fisher_lab.matrices import BlockDiagonal, DiagonalMatrix, DirectSum, FactoredRows, FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats


@dataclass(frozen=True)
class MiniBlock(Approximation):
    """Block-diagonal in small pieces of the weight; keeps the trace, and every entry inside a block is exact.

    `row` is exact for one output, and for a last layer with squared or Bernoulli loss. Row blocks that would be larger
    than the columns they are made of stay factored.

    Args:
        linear: blocks of layers with one input mode.
        conv: blocks of convolutions.

    State: row d_out d_in^2, col d_in d_out^2, kernel d_out d_in kh kw. See also: Diagonal, LNGD.
    """

    linear: Literal["row", "col", "row_avg", "col_avg"] = "row"
    conv: Literal["kernel", "filter"] = "kernel"

    def __post_init__(self) -> None:
        check_choice("MiniBlock", "linear", self.linear, ("row", "col", "row_avg", "col_avg"))
        check_choice("MiniBlock", "conv", self.conv, ("kernel", "filter"))

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """Blocks under the name of their kind, in a shape that tells W's; or `a` and `w` of factored rows."""
        if len(stats.kernel) > 1:
            return self._conv_moments(stats)
        rows, d_in = stats.shape
        if self.linear == "row_avg":
            return {"row_avg": stats.right(), "ones": stats.g.new_ones(stats.Q, stats.d_out)}
        if self.linear == "col_avg":
            return {"col_avg": stats.left(), "ones": stats.g.new_ones(stats.Q, d_in)}
        if self.linear == "col":
            _check_memory(self, d_in * stats.Q * stats.d_out**2, stats)
            return {"col": stats.column_blocks().view(stats.Q, d_in, stats.d_out, stats.d_out)}
        if stats.rank_one and stats.Q == 1 and stats.N * (rows + d_in) < rows * d_in**2:
            assert stats.a is not None
            return {"a": stats.a[:, 0, 0], "w": stats.g[:, :, 0, 0].square().sum(0) / stats.N}
        _check_memory(self, rows * d_in**2, stats)
        return {"row": stats.row_blocks(d_in)}

    def _conv_moments(self, stats: LayerStats) -> Moments:
        if self.conv == "filter":
            return {"row": stats.row_blocks(stats.shape[1])}
        weight = stats.inputs(slice(0, math.prod(stats.kernel)))
        width = math.prod(stats.kernel[1:])
        moments = {"kernel": weight.row_blocks(width).unflatten(0, (stats.shape[0], -1))}
        return {**moments, "bias": stats.inputs(slice(-1, None)).squares().flatten(0, 1)} if stats.bias else moments

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """The blocks as a matrix."""
        (kind, M), *_ = moments.items()
        if kind == "a":
            return FactoredRows(moments["a"], moments["w"])
        if kind == "row_avg":
            return Kronecker((moments["ones"], M / moments["ones"].shape[1]), identities=(0,))
        if kind == "col_avg":
            return Kronecker((M / moments["ones"].shape[1], moments["ones"]), identities=(1,))
        if kind == "col":
            Q, d_in, d_out, _ = M.shape
            return BlockDiagonal(M.flatten(0, 1), (Q * d_out, d_in), groups=Q)
        if kind == "row":
            return BlockDiagonal(M, (M.shape[0], M.shape[1]))
        rows, pieces, width, _ = M.shape
        blocks = BlockDiagonal(M.flatten(0, 1), (rows, pieces * width))
        return DirectSum((blocks, DiagonalMatrix(moments["bias"]))) if "bias" in moments else blocks

    def average(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """Linear mix of blocks; factored rows are concatenated until their blocks would be smaller."""
        if "a" in old and "a" in new:
            mixed = {
                "a": torch.cat([old["a"], new["a"]]),
                "w": torch.cat([old["w"] * (1 - weight), new["w"] * weight]),
            }
            d_in, d_out = mixed["a"].shape[1], mixed["w"].shape[1]
            if mixed["a"].shape[0] * (d_in + d_out) < d_out * d_in**2:
                return mixed
        return super().average(_formed(old), _formed(new), weight)


def _formed(moments: Moments) -> Moments:
    return {"row": FactoredRows(moments["a"], moments["w"]).formed().blocks} if "a" in moments else moments


def _check_memory(approximation: MiniBlock, numbers: int, stats: LayerStats) -> None:
    need = 2 * numbers * stats.g.element_size()
    if need > available_bytes():
        raise ValueError(
            f"{approximation.label} on a layer {stats.shape} needs {readable(need)} and "
            f'{readable(available_bytes())} is free; use MiniBlock(linear="row_avg") or "col_avg".'
        )
