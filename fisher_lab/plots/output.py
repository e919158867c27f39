"""Figures as files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fisher_lab.plots.bars import errors, heatmap, traces
from fisher_lab.plots.cost import cost
from fisher_lab.plots.style import RC
from fisher_lab.plots.sweeps import damping

ENDINGS = (".svg", ".png", ".pdf")


def figures(comparison: Any) -> dict[str, Figure]:
    """Every figure that a comparison has the numbers for, by a name that can be a file's.

    Args:
        comparison: a Comparison.

    Returns:
        Bars and a heat map of every undamped measure but the trace ratio, traces, cost, and damped errors.
    """
    plain = list(dict.fromkeys(row.error for row in comparison.rows if row.damping is None))
    damped = list(dict.fromkeys(row.error for row in comparison.rows if row.damping is not None))
    found: dict[str, Figure] = {}
    for error in plain:
        if error != "trace_ratio" or "trace" not in plain:
            found[f"errors-{error}"] = errors(comparison, error)
            found[f"heatmap-{error}"] = heatmap(comparison, error)
    if any("trace_approx" in entry for entry in comparison.quantities):
        found["traces"] = traces(comparison)
    if comparison.costs and plain:
        found["cost"] = cost(comparison, "frobenius" if "frobenius" in plain else plain[0])
    for error in damped:
        found[error.replace("_", "-")] = damping(comparison, error)
    return found


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a `.svg`, `.png` or `.pdf` file; the same results give the same file.

    Raises:
        ValueError: for another ending.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"Got figure file {str(path)!r}, expected one ending in {', '.join(ENDINGS)}.")
    out = io.BytesIO()
    _print(figure, out, path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return path


def svg(figure: Figure, prefix: str = "") -> str:
    """The figure as an `<svg>` element to put into a page, without reference to anything outside.

    Args:
        figure: the figure.
        prefix: put before all identifiers inside, so that several figures fit into one page.
    """
    out = io.BytesIO()
    _print(figure, out, "svg")
    text = out.getvalue().decode()
    text = re.sub(r'\bid="', f'id="{prefix}', text[text.index("<svg") :])
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)


def _print(figure: Figure, out: io.BytesIO, kind: str) -> None:
    silent = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate",), "png": ()}[kind]
    with matplotlib.rc_context(RC):
        figure.savefig(out, format=kind, metadata=dict.fromkeys(silent))
