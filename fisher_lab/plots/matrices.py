"""Blocks as pictures and their spectra, read from FisherMatrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fisher_lab.plots.reading import plain
from fisher_lab.plots.style import EXACT, new_figure, styled, styles

DECADES = 5  # shown below the largest entry
PIXELS = 1000  # a side; larger blocks show the largest entry of each cell
MOST_LINES = 64  # more mini-block lines than these would hide the picture
Array = np.ndarray[Any, Any]


@styled
def blocks(
    exact: Any, approximations: Mapping[str, Any], inverse_damping: float | None = None
) -> Figure:
    """The exact block beside approximations as pictures of log10 |entry|, one scale for a row of
    pictures.

    Thin lines separate the mini-blocks: entries that belong to one row of W (one output).

    Args:
        exact: FisherMatrix of a layer.
        approximations: `{label: FisherMatrix}` of the same layer.
        inverse_damping: also show (F + damping tr F / d I)^-1 of each in a second row of pictures.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: for blocks of other shapes, or a damping that is not positive.
    """
    matrices = {"exact": exact, **approximations}
    for label, matrix in matrices.items():
        if tuple(matrix.shape) != tuple(exact.shape):
            raise ValueError(
                f"{label} has shape {tuple(matrix.shape)}, expected {tuple(exact.shape)}: pass "
                "one layer's matrices."
            )
    rows = [("log10 |F|", {label: matrix.dense() for label, matrix in matrices.items()})]
    if inverse_damping is not None:
        if not inverse_damping > 0:
            raise ValueError(
                f"Got inverse_damping={inverse_damping}, expected a positive number such as 0.01."
            )
        damping = inverse_damping * float(exact.trace()) / exact.dim
        inverses = {
            label: matrix.powered(-1.0, damping).dense() for label, matrix in matrices.items()
        }
        rows.append((f"log10 |(F + {inverse_damping:g} tr F/d)$^{{-1}}$|", inverses))
    figure = new_figure(1.0 + 2.3 * len(matrices), 2.55 * len(rows))
    grid = figure.subplots(len(rows), len(matrices), squeeze=False)
    for line, (word, arrays) in zip(grid, rows, strict=True):
        pictures = {label: _logarithm(array.cpu().numpy()) for label, array in arrays.items()}
        top = max(picture.max() for picture in pictures.values())
        for axes, (label, picture) in zip(line, pictures.items(), strict=True):
            size = exact.dim
            image = axes.imshow(picture, vmin=top - DECADES, vmax=top, extent=(0, size, size, 0))
            axes.grid(visible=False)
            axes.set_xticks([0, size])
            axes.set_yticks([0, size])
            axes.set_title(plain(label))
            _mini_block_lines(axes, exact.shape)
        figure.colorbar(image, ax=list(line), label=word, extend="min", pad=0.01)
    return figure


def _logarithm(array: Array) -> Array:
    """log10 |entries| `[p, p]`, in cells of at most PIXELS a side, zeros far below."""
    size = np.abs(array)
    step = math.ceil(len(size) / PIXELS)
    if step > 1:
        padding = -len(size) % step
        size = np.pad(size, (0, padding))
        size = size.reshape(len(size) // step, step, -1, step).max((1, 3))
    return np.log10(np.maximum(size, 1e-300))


def _mini_block_lines(axes: Any, shape: tuple[int, int]) -> None:
    if 1 < shape[0] <= MOST_LINES and shape[1] > 1:
        for place in range(shape[1], shape[0] * shape[1], shape[1]):
            axes.axhline(place, color="white", linewidth=0.3, alpha=0.6)
            axes.axvline(place, color="white", linewidth=0.3, alpha=0.6)


@styled
def spectrum(exact: Any, approximations: Mapping[str, Any]) -> Figure:
    """Sorted eigenvalues, relative to the largest of the exact block, on log axes.

    Args:
        exact: FisherMatrix of a layer.
        approximations: `{label: FisherMatrix}`.

    Returns:
        A matplotlib Figure; eigenvalues that are rounding errors (below 1e-12 of the largest) are
        left out.
    """
    found = {
        "exact": exact.eigenvalues(),
        **{label: m.eigenvalues() for label, m in approximations.items()},
    }
    arrays = {label: np.sort(values.cpu().numpy())[::-1] for label, values in found.items()}
    top = arrays["exact"][0]
    if not top > 0:
        raise ValueError(
            "The exact block is zero, expected a positive eigenvalue: nothing is relative to it."
        )
    figure = new_figure(6.0, 3.8)
    axes = figure.add_subplot()
    for label, style in {"exact": EXACT, **styles(approximations)}.items():
        values = arrays[label] / top
        values = values[values > 1e-12]
        places = np.arange(1, len(values) + 1)
        marks = sorted({int(place) - 1 for place in np.geomspace(1, max(len(values), 1), 9)})
        axes.loglog(
            places, values, style.line, color=style.color, marker=style.marker or None, markevery=marks,
            markeredgecolor="0.15", markeredgewidth=0.4, linewidth=2.4 if label == "exact" else 1.2, label=plain(label),
        )  # fmt: skip
    axes.set_xlabel("index of the eigenvalue")
    axes.set_ylabel(r"eigenvalue $/\;\lambda_{\max}(F)$")
    figure.legend(loc="outside right upper")
    return figure
