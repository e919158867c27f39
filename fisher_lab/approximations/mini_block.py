"""MiniBlock: Bahamou, Goldfarb & Ren (2023), mini-block Fisher (MBF).

The layer's block is replaced by many small diagonal blocks of F:

    Linear  row:      one [d_in, d_in] block per output (bias inside)
            row_avg:  their average, I (x) U2 / d_out
            col:      one [d_out, d_out] block per input
            col_avg:  their average, U1 / d_in (x) I
    conv    kernel:   one [kh kw, kh kw] block per (output, input) channel, the bias diagonal
            filter:   one block per output channel (bias inside)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    Example:
        >>> K = fl.estimate(fl.MiniBlock(), model, loss, (x, y))["0"]
        >>> K.nbytes == 8 * 6 * 9**2  # one block for each of 6 outputs
        True
    """

    linear: Literal["row", "col", "row_avg", "col_avg"] = "row"
    conv: Literal["kernel", "filter"] = "kernel"

    def __post_init__(self) -> None:
        check_choice("MiniBlock", "linear", self.linear, ("row", "col", "row_avg", "col_avg"))
        check_choice("MiniBlock", "conv", self.conv, ("kernel", "filter"))

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """The average block; blocks of every row or column know what they need."""
        if len(kernel) > 1:
            return ()
        sizes = {"row_avg": (kernel[0] + bias,), "col_avg": (rows,)}
        return sizes.get(self.linear, ())

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
            blocks = sums.column_blocks()
            return {"col": blocks.view(shape)}
        in_blocks = rows * d_in**2
        in_factors = sums.N * (rows + d_in)
        # of columns of rank one the factors tell all, in fewer numbers where the examples are few
        if sums.rank_one and sums.Q == 1 and in_factors < in_blocks:
            return _factored(sums)
        _check_memory(self, in_blocks, sums)
        return {"row": sums.row_blocks(d_in)}

    def _conv_moments(self, sums: Sums) -> dict[str, Tensor]:
        """The blocks of a layer with several input modes."""
        rows, d_in = sums.shape
        if self.conv == "filter":
            return {"row": sums.row_blocks(d_in)}
        without_bias = math.prod(sums.kernel)
        weight = sums.inputs(slice(0, without_bias))
        width = math.prod(sums.kernel[1:])  # of one channel
        blocks = weight.row_blocks(width)
        found = {"kernel": blocks.unflatten(0, (rows, -1))}
        if sums.bias:
            bias = sums.inputs(slice(-1, None))
            diagonal = bias.squares()
            found["bias"] = diagonal.flatten(0, 1)
        return found

    def assemble(self, moments: Moments) -> FisherMatrix:
        """The blocks as a matrix."""
        if isinstance(moments, Rows):
            return FactoredRows(moments.a, moments.w)
        if "row_avg" in moments:
            return _of_averaged_rows(moments["row_avg"], moments.shape)
        if "col_avg" in moments:
            return _of_averaged_columns(moments["col_avg"], moments.shape)
        if "col" in moments:
            M = moments["col"]  # [Q, d_in, d_out, d_out]
            blocks = M.flatten(0, 1)
            return BlockDiagonal(blocks, moments.shape, groups=len(M))
        if "row" in moments:
            return BlockDiagonal(moments["row"], moments.shape)
        weight = _of_kernels(moments["kernel"])
        if "bias" not in moments:
            return weight
        bias = DiagonalMatrix(moments["bias"])
        return DirectSum((weight, bias))


def _factored(sums: Sums) -> Rows:
    """Row blocks 1/N a^T diag(g_i^2) a as their factors."""
    a, g = sums.stats.vectors()
    squares = g.square()
    w = squares.sum(0)  # [N, d_out]
    return Rows(a, w / sums.N)


def _of_averaged_rows(U2: Tensor, shape: tuple[int, int]) -> Kronecker:
    """I (x) U2 / d_out, for U2 `[Q, d_in, d_in]`."""
    rows, _ = shape
    Q = len(U2)
    d_out = rows // Q
    identity = U2.new_ones(Q, d_out)  # its diagonal
    return Kronecker((identity, U2 / d_out), identities=(0,))


def _of_averaged_columns(U1: Tensor, shape: tuple[int, int]) -> Kronecker:
    """U1 / d_in (x) I, for U1 `[Q, d_out, d_out]`."""
    _, d_in = shape
    Q = len(U1)
    identity = U1.new_ones(Q, d_in)  # its diagonal
    return Kronecker((U1 / d_in, identity), identities=(1,))


def _of_kernels(M: Tensor) -> BlockDiagonal:
    """The blocks `[rows, channels, width, width]` of all kernels."""
    rows, channels, width, _ = M.shape
    blocks = M.flatten(0, 1)
    shape = (rows, channels * width)
    return BlockDiagonal(blocks, shape)


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
