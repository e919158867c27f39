"""Matrices of equal structure as one: L layers `[d_out, d_in]` are groups of one matrix over `[L * d_out, d_in]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fisher_lab.matrices import BlockDiagonal, DiagonalMatrix, DirectSum, EigenbasisDiagonal, FisherMatrix, Kronecker


def signature(matrix: FisherMatrix) -> Any:
    """What two matrices must share to be stacked; None for structures that stay alone."""
    if isinstance(matrix, DirectSum):
        parts = [signature(piece) for piece in matrix.parts]
        return None if None in parts else ("DirectSum", tuple(parts))
    if isinstance(matrix, Kronecker) and matrix.decomposed:  # which joining would forget
        return None
    rows = isinstance(matrix, BlockDiagonal) and matrix.groups is None
    if rows or isinstance(matrix, Kronecker | EigenbasisDiagonal | DiagonalMatrix):
        return type(matrix).__name__, tuple((name, tuple(x.shape)) for name, x in matrix.tensors().items())
    return None


def stacked(matrices: Sequence[FisherMatrix]) -> FisherMatrix:
    """One matrix over the rows of all; a single one as it is."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, DirectSum):
        parts = zip(*(matrix.parts for matrix in matrices if isinstance(matrix, DirectSum)), strict=True)
        return DirectSum(tuple(stacked(pieces) for pieces in parts))
    tensors = [matrix.tensors() for matrix in matrices]
    joined = first.with_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})
    return _with_rows(joined, first.shape[0] * len(matrices))


def part(matrix: FisherMatrix, index: int, count: int) -> FisherMatrix:
    """One of the `count` equal matrices that were stacked."""
    if count == 1:
        return matrix
    if isinstance(matrix, DirectSum):
        return DirectSum(tuple(part(piece, index, count) for piece in matrix.parts))
    tensors = {name: x.chunk(count)[index] for name, x in matrix.tensors().items()}
    return _with_rows(matrix.with_tensors(tensors), matrix.shape[0] // count)


def _with_rows(matrix: FisherMatrix, rows: int) -> FisherMatrix:
    if isinstance(matrix, BlockDiagonal):
        return dataclasses.replace(matrix, weight_shape=(rows, matrix.weight_shape[1]))
    return matrix
