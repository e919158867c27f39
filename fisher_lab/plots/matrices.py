"""Blocks as pictures and their spectra, read from FisherMatrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab._ground.arguments import number, shown
from fisher_lab.matrices import FisherMatrix
from fisher_lab.plots.reading import name_of
from fisher_lab.plots.style import EXACT, Style, draw_legend, new_figure, room_for, styled, styles

DECADES = 5  # shown below the largest entry
PIXELS = 1000  # a side; larger blocks show the largest entry of each cell
MOST_LINES = 64  # more mini-block lines than these would hide the picture
ROUNDING = 1e-12  # of the largest eigenvalue; what is smaller is noise
MARKS = 9  # on the line of a spectrum
Array = np.ndarray[Any, Any]
Labelled = list[tuple[str, FisherMatrix]]


# -- pictures --------------------------------------------------------------------------------------
@styled
def blocks(
    exact: FisherMatrix,
    approximations: Mapping[str, FisherMatrix],
    inverse_damping: float | None = None,
) -> Figure:
    """The exact block beside approximations as pictures of log10 |entry|.

    A row of pictures has one scale. Thin lines separate the mini-blocks: entries that belong to one
    row of W (one output).

    Args:
        exact: FisherMatrix of a layer.
        approximations: `{label: FisherMatrix}` of the same layer.
        inverse_damping: also show (F + damping tr F / d I)^-1 of each in a second row of pictures.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything but FisherMatrices.
        ValueError: for blocks of other shapes, or a damping that is not positive.

    Example:
        >>> figure = fl.plots.blocks(exact, {"KFAC": kfac}, inverse_damping=0.01)
    """
    matrices = _labelled(exact, approximations)
    for label, matrix in matrices:
        shape = tuple(matrix.shape)
        expected = tuple(exact.shape)
        if shape != expected:
            raise ValueError(
                f"{label} has shape {shape}, expected {expected}: pass one layer's matrices."
            )
    rows = [("log10 |F|", matrices)]
    if inverse_damping is not None:
        if not 0 < number(inverse_damping) < math.inf:
            raise ValueError(
                f"Got inverse_damping={shown(inverse_damping)}, expected a finite number > 0, or "
                "None for no inverses."
            )
        title = f"log10 |(F + {inverse_damping:g} tr F/d)$^{{-1}}$|"
        rows.append((title, _inverses(matrices, inverse_damping)))
    width = 1.0 + 2.3 * len(matrices)
    figure = new_figure(width, 2.55 * len(rows))
    grid = figure.subplots(len(rows), len(matrices), squeeze=False)
    for line, (title, row) in zip(grid, rows, strict=True):
        _draw_row(figure, list(line), title, row)
    return figure


def _labelled(exact: FisherMatrix, approximations: Mapping[str, FisherMatrix]) -> Labelled:
    """The exact block first, then the others under their labels, one of which may be
    "exact" too.
    """
    if not isinstance(approximations, Mapping):
        raise TypeError(
            f"Got approximations of type {type(approximations).__name__}, expected "
            "{label: FisherMatrix}."
        )
    found = [("exact", exact)]
    for label, matrix in approximations.items():
        found.append((str(label), matrix))
    for label, matrix in found:
        if not isinstance(matrix, FisherMatrix):
            raise TypeError(
                f"Got {label} of type {type(matrix).__name__}, expected a FisherMatrix, such as "
                "exact_fisher and estimate give for a layer."
            )
    return found


def _inverses(matrices: Labelled, inverse_damping: float) -> Labelled:
    """(F + lambda I)^-1 of each, lambda relative to the mean eigenvalue of the exact one."""
    if not inverse_damping > 0:
        raise ValueError(
            f"Got inverse_damping={inverse_damping}, expected a positive number such as 0.01."
        )
    _, exact = matrices[0]
    damping = inverse_damping * float(exact.trace()) / exact.dim
    return [(label, matrix.powered(-1.0, damping)) for label, matrix in matrices]


def _draw_row(figure: Figure, line: list[Axes], title: str, matrices: Labelled) -> None:
    """Pictures beside each other on one scale, and their colour bar."""
    pictures = [_logarithm(matrix.dense().cpu().numpy()) for _, matrix in matrices]
    top = max(picture.max() for picture in pictures)
    for axes, picture, (label, matrix) in zip(line, pictures, matrices, strict=True):
        size = matrix.dim
        image = axes.imshow(picture, vmin=top - DECADES, vmax=top, extent=(0, size, size, 0))
        axes.grid(visible=False)
        axes.set_xticks([0, size])
        axes.set_yticks([0, size])
        axes.set_title(name_of(label))
        _mini_block_lines(axes, matrix.shape)
    figure.colorbar(image, ax=line, label=title, extend="min", pad=0.01)


def _logarithm(array: Array) -> Array:
    """log10 |entries| `[p, p]`, in cells of at most PIXELS a side, zeros far below."""
    size = np.abs(array)
    step = math.ceil(len(size) / PIXELS)
    if step > 1:
        padding = -len(size) % step
        size = np.pad(size, (0, padding))
        size = size.reshape(len(size) // step, step, -1, step)
        size = size.max((1, 3))
    return np.log10(np.maximum(size, 1e-300))


def _mini_block_lines(axes: Axes, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if 1 < rows <= MOST_LINES and columns > 1:
        for place in range(columns, rows * columns, columns):
            axes.axhline(place, color="white", linewidth=0.3, alpha=0.6)
            axes.axvline(place, color="white", linewidth=0.3, alpha=0.6)


# -- spectra ---------------------------------------------------------------------------------------
@styled
def spectrum(
    exact: FisherMatrix,
    approximations: Mapping[str, FisherMatrix],
    *,
    columns: int | None = None,
) -> Figure:
    """Sorted eigenvalues, relative to the largest of the exact block, on log axes.

    Args:
        exact: FisherMatrix of a layer.
        approximations: `{label: FisherMatrix}`.
        columns: 1 or 2 for a figure as wide as one or two columns of a paper.

    Returns:
        A matplotlib Figure; eigenvalues that are rounding errors (below 1e-12 of the largest) are
        left out.

    Raises:
        TypeError: for anything but FisherMatrices.
        ValueError: if the exact block is zero.

    Example:
        >>> figure = fl.plots.spectrum(exact, {"KFAC": kfac})
    """
    matrices = _labelled(exact, approximations)
    falling = [_falling(matrix) for _, matrix in matrices]
    top = falling[0][0]
    if not top > 0:
        raise ValueError(
            "The exact block is zero, expected a positive eigenvalue: nothing is relative to it."
        )
    looks = [EXACT, *styles(approximations).values()]
    height = 3.8 if columns is None else 2.6
    figure = new_figure(6.0 + room_for(approximations, 25), height, columns)
    axes = figure.add_subplot()
    for (label, _), style, values in zip(matrices, looks, falling, strict=True):
        relative = values / top
        _draw_line(axes, relative[relative > ROUNDING], label, style)
    axes.set_xlabel("index of the eigenvalue")
    axes.set_ylabel(r"eigenvalue $/\;\lambda_{\max}(F)$")
    draw_legend(figure)
    return figure


def _falling(matrix: FisherMatrix) -> Array:
    """The eigenvalues, the largest first."""
    rising = np.sort(matrix.eigenvalues().cpu().numpy())
    return rising[::-1]


def _draw_line(axes: Axes, values: Array, label: str, style: Style) -> None:
    places = np.arange(1, len(values) + 1)
    # as many marks on each decade
    marked = np.geomspace(1, max(len(values), 1), MARKS).astype(int)
    marks = np.unique(marked - 1).tolist()
    axes.loglog(
        places,
        values,
        style.line,
        color=style.color,
        marker=style.marker or None,
        markevery=marks,
        markeredgecolor="0.15",
        markeredgewidth=0.4,
        linewidth=2.4 if style is EXACT else 1.2,
        label=name_of(label),
    )
