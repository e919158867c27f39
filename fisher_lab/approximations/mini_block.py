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

from torch import Tensor

from fisher_lab._ground.memory import available_bytes, readable
from fisher_lab.approximations.base import Approximation, check_choice
from fisher_lab.approximations.moments import Moments, Rows
from fisher_lab.matrices import (
    BlockDiagonal,
    DiagonalMatrix,
    DirectSum,
    FactoredRows,
    FisherMatrix,
    Kronecker,
)
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class MiniBlock(Approximation):
    """Block-diagonal in small pieces of the weight; keeps the trace, and every entry inside a block
    is exact.

    `row` is exact for one output, and for a last layer with squared or Bernoulli loss. Row blocks
    that would be larger than the columns they are made of stay factored.

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

    def moments(self, sums: Sums) -> Moments | dict[str, Tensor]:
        """Blocks under the name of their kind, in a shape that tells their number; or Rows."""
        if len(sums.kernel) > 1:
            return self._conv_moments(sums)
        rows, d_in = sums.shape
        if self.linear == "row_avg":
            return {"row_avg": sums.right()}
        if self.linear == "col_avg":
            return {"col_avg": sums.left()}
        if self.linear == "col":
            shape = (sums.Q, d_in, sums.d_out, sums.d_out)
            _check_memory(self, math.prod(shape), sums)
            return {"col": sums.column_blocks().view(shape)}
        in_blocks = rows * d_in**2
        in_factors = sums.N * (rows + d_in)
        # of columns of rank one the factors tell all, in fewer numbers where the examples are few
        if sums.rank_one and sums.Q == 1 and in_factors < in_blocks:
            a, g = sums.stats.vectors()
            w = g.square().sum(0)  # [N, d_out]
            return Rows(a, w / sums.N)
        _check_memory(self, in_blocks, sums)
        return {"row": sums.row_blocks(d_in)}

    def _conv_moments(self, sums: Sums) -> dict[str, Tensor]:
        """The blocks of a layer with several input modes."""
        rows, d_in = sums.shape
        if self.conv == "filter":
            return {"row": sums.row_blocks(d_in)}
        weight = sums.inputs(slice(0, math.prod(sums.kernel)))
        width = math.prod(sums.kernel[1:])
        blocks = weight.row_blocks(width)
        found = {"kernel": blocks.unflatten(0, (rows, -1))}
        if sums.bias:
            bias = sums.inputs(slice(-1, None))
            found["bias"] = bias.squares().flatten(0, 1)
        return found

    def assemble(self, moments: Moments) -> FisherMatrix:
        """The blocks as a matrix."""
        if isinstance(moments, Rows):
            return FactoredRows(moments.a, moments.w)
        rows, d_in = moments.shape
        if "row_avg" in moments:
            M = moments["row_avg"]
            Q = len(M)
            d_out = rows // Q
            identity = M.new_ones(Q, d_out)  # its diagonal
            return Kronecker((identity, M / d_out), identities=(0,))
        if "col_avg" in moments:
            M = moments["col_avg"]
            identity = M.new_ones(len(M), d_in)
            return Kronecker((M / d_in, identity), identities=(1,))
        if "col" in moments:
            M = moments["col"]  # [Q, d_in, d_out, d_out]
            blocks = M.flatten(0, 1)
            return BlockDiagonal(blocks, moments.shape, groups=len(M))
        if "row" in moments:
            return BlockDiagonal(moments["row"], moments.shape)
        M = moments["kernel"]  # [rows, channels, width, width]
        _, channels, width, _ = M.shape
        weight = BlockDiagonal(M.flatten(0, 1), (rows, channels * width))
        if "bias" not in moments:
            return weight
        bias = DiagonalMatrix(moments["bias"])
        return DirectSum((weight, bias))


def _check_memory(approximation: MiniBlock, numbers: int, sums: Sums) -> None:
    """Refuse blocks that do not fit twice: as moments, and while two of them mix."""
    need = 2 * numbers * sums.stats.itemsize
    free = available_bytes()
    if need > free:
        raise ValueError(
            f"{approximation.label} on a layer {sums.shape} needs {readable(need)} and "
            f"{readable(free)} is free; use "
            'MiniBlock(linear="row_avg") or "col_avg".'
        )
