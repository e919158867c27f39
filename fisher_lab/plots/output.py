"""Figures as files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fisher_lab._ground.arguments import check_kind
from fisher_lab._ground.files import check_output, file_names, write_atomically
from fisher_lab.errors.measures import Judges, judging
from fisher_lab.plots.bars import errors
from fisher_lab.plots.cost import cost
from fisher_lab.plots.heatmap import heatmap
from fisher_lab.plots.reading import checked, errors_of
from fisher_lab.plots.style import RC
from fisher_lab.plots.sweeps import damping, training
from fisher_lab.plots.traces import found_traces, traces
from fisher_lab.results import Comparison

ENDINGS = (".svg", ".png", ".pdf")
# What a file would say about the time and the machine it was made at.
SILENT = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate",), "png": ()}
# Of the errors that judge one of these, the first is drawn along a training.
ALONG: tuple[Judges, ...] = ("matrix", "direction")
IDENTIFIER = r"[A-Za-z][A-Za-z0-9_-]*"


@dataclass(frozen=True)
class Drawing:
    """A figure and what it shows.

    Attributes:
        kind: "errors", "heatmap", "traces", "cost", "damped" or "training".
        error: the measure it shows, as the comparison calls it; None for traces.
        figure: the figure.
    """

    kind: str
    error: str | None
    figure: Figure

    @property
    def name(self) -> str:
        """What a file of it would like to be called; the error in it may be any text."""
        if self.error is None or self.kind == "cost":
            return self.kind
        if self.kind == "damped":
            return "damped-" + self.error.removeprefix("damped_").replace("_", "-")
        return f"{self.kind}-{self.error}"


def drawings(comparison: Comparison) -> list[Drawing]:
    """Every figure that a comparison has the numbers for.

    Args:
        comparison: a Comparison.

    Returns:
        Bars and a heat map of every undamped measure but the trace ratio, traces, cost, and damped
        errors.

    Raises:
        TypeError: for anything but a comparison.
    """
    found: list[Drawing] = []
    plain = _undamped(checked(comparison))
    # Measures of the size alone say the same; the first, the trace, as a difference more clearly.
    repeated = judging("size", plain)[1:]
    for error in plain:
        if error not in repeated:
            found.append(Drawing("errors", error, errors(comparison, error)))
            found.append(Drawing("heatmap", error, heatmap(comparison, error)))
    if found_traces(comparison):
        found.append(Drawing("traces", None, traces(comparison)))
    if comparison.costs and plain:
        best_known_first = judging("matrix", plain) + plain
        main = best_known_first[0]
        found.append(Drawing("cost", main, cost(comparison, main)))
    damped = [row for row in comparison.rows if row.damping is not None]
    for error in errors_of(damped):
        dampings = {row.damping for row in damped if row.error == error}
        if len(dampings) < 2:
            continue  # a curve of one point; the table has it
        found.append(Drawing("damped", error, damping(comparison, error)))
    return found


def training_drawings(comparisons: Iterable[Comparison]) -> list[Drawing]:
    """Figures against the training step, where the comparisons are of one problem at several steps.

    Args:
        comparisons: Comparisons, each of another step.

    Returns:
        One of the Frobenius error and one of the cosine, where all comparisons hold them; none of
        other comparisons.
    """
    given = [checked(comparison) for comparison in comparisons]
    steps: dict[int, Comparison] = {}
    names = set()
    for comparison in given:
        step = (comparison.settings.problem or {}).get("steps")
        # A problem of one's own may call something else so.
        if not isinstance(step, int):
            return []
        steps[step] = comparison
        names.add(comparison.settings.problem_name)
    one_problem_at_several_steps = len(names) == 1 and len(steps) == len(given) > 1
    if not one_problem_at_several_steps:
        return []
    held_by_all = set(_undamped(given[0]))
    for comparison in given[1:]:
        held_by_all &= set(_undamped(comparison))
    found = []
    for what in ALONG:
        for error in judging(what, held_by_all)[:1]:
            found.append(Drawing("training", error, training(steps, error)))
    return found


def _undamped(comparison: Comparison) -> list[str]:
    """Names of the errors that it holds without damping, in order."""
    return errors_of([row for row in comparison.rows if row.damping is None])


def figures(comparison: Comparison) -> dict[str, Figure]:
    """Every figure that a comparison has the numbers for, by a name that can be a file's.

    Args:
        comparison: a Comparison.

    Returns:
        Bars and a heat map of every undamped measure but the trace ratio, traces, cost, and damped
        errors.

    Raises:
        TypeError: for anything but a comparison.

    Example:
        >>> sorted(fl.plots.figures(comparison))[:2]
        ['cost', 'errors-cosine']
    """
    found = drawings(comparison)
    names = file_names(drawing.name for drawing in found)
    return {name: drawing.figure for name, drawing in zip(names, found, strict=True)}


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a `.svg`, `.png` or `.pdf` file; the same results give the same file.

    Raises:
        ValueError: for another ending, or a folder that cannot be written.

    Example:
        >>> fl.plots.save(fl.plots.traces(comparison), "traces.svg").name
        'traces.svg'
    """
    path = check_output(path, ENDINGS)
    write_atomically(path, _printed(figure, path.suffix.removeprefix(".")))
    return path


def svg(figure: Figure, prefix: str = "") -> str:
    """The figure as an `<svg>` element to put into a page, without reference to anything outside.

    Args:
        figure: the figure.
        prefix: put before all identifiers inside, so that several figures fit into one page; ASCII
            letters, digits, "-" and "_" behind a letter.

    Raises:
        ValueError: for another prefix.

    Example:
        >>> fl.plots.svg(fl.plots.traces(comparison)).lstrip()[:4]
        '<svg'
    """
    # It goes into attributes as it is.
    check_kind("prefix", prefix, str, "text")
    if prefix and not re.fullmatch(IDENTIFIER, prefix):
        raise ValueError(
            f"Got prefix={prefix!r}, expected ASCII letters, digits, - and _ behind a letter."
        )
    page = _printed(figure, "svg").decode()
    element = page[page.index("<svg") :]
    element = re.sub(r'\bid="', f'id="{prefix}', element)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", element)


def _printed(figure: Figure, kind: str) -> bytes:
    """The contents of a file of the figure."""
    check_kind("figure", figure, Figure, "a figure that one of fl.plots drew")
    out = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(out, format=kind, metadata=dict.fromkeys(SILENT[kind]))
    return out.getvalue()
