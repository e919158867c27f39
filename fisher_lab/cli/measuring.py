"""`fisher-lab compare`, `plot` and `report`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fisher_lab._ground.files import check_output, file_names, inside
from fisher_lab._ground.memory import readable
from fisher_lab.cli.options import MeasureOptions, ProblemOptions
from fisher_lab.diagnose import DifferentRunError
from fisher_lab.diagnose import compare as run_compare
from fisher_lab.results.comparison import Comparison, load_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compare(
    problem: ProblemOptions = ProblemOptions(),
    measure: MeasureOptions = MeasureOptions(),
    output: Path | None = None,
    quiet: bool = False,
) -> None:
    """Measure how far every approximation is from the exact Fisher block of every layer.

    A run that was stopped goes on where it was when the same command is given again.

    Args:
        problem: the problem.
        measure: what to measure.
        output: file to save to, .json or .csv.
        quiet: no progress bar and no table.
    """
    if output is not None:
        check_output(output)
    found = _measured(problem, measure, output, quiet)
    if not quiet:
        print(found)
    spent = found.settings
    saved = "" if output is None else f", saved to {found.save(output)}"
    print(f"{spent['seconds']:.1f} s, peak memory {readable(spent['peak_bytes'])}{saved}")
    _partial(output).unlink(missing_ok=True)


def plot(
    files: tyro.conf.Positional[tuple[Path, ...]],
    output: Path = Path("figures"),
    form: Literal["svg", "png", "pdf"] = "svg",
) -> None:
    """Draw the figures of saved comparisons; several of one problem at different steps also along its training.

    Args:
        files: files that `compare --output` wrote.
        output: folder for the figures.
        form: what kind of files.
    """
    from fisher_lab import plots
    from fisher_lab.plots.output import training_drawings

    if not files:
        raise ValueError("Got no files, expected at least one that `fisher-lab compare --output` wrote.")
    loaded = {path: load_comparison(path) for path in files}
    wishes: list[str] = []
    figures: list[Figure] = []
    for path, comparison in loaded.items():
        start = f"{path.stem}-" if len(loaded) > 1 else ""
        for name, figure in plots.figures(comparison).items():
            wishes.append(start + name)
            figures.append(figure)
    for drawing in training_drawings(loaded.values()):
        wishes.append(drawing.name)
        figures.append(drawing.figure)
    # Files and errors may have any name: all wishes together, so that no figure overwrites another.
    for name, figure in zip(file_names(wishes), figures, strict=True):
        print(plots.save(figure, inside(output, f"{name}.{form}")))


def report(
    files: tyro.conf.Positional[tuple[Path, ...]] = (),
    problem: ProblemOptions = ProblemOptions(),
    measure: MeasureOptions = MeasureOptions(errors=("all",)),
    output: Path = Path("report.html"),
) -> None:
    """Write a page that says what was measured, the answer for every layer, tables and figures: one HTML file.

    Args:
        files: files that `compare --output` wrote; without any the problem is measured.
        problem: the problem, if no files are given.
        measure: what to measure, if no files are given.
        output: the .html file.
    """
    from fisher_lab.report import write_report

    check_output(output, (".html",))
    found: Sequence[Path | Comparison] = files or [_measured(problem, measure, output, False)]
    print(write_report(found, output))
    if not files:
        _partial(output).unlink(missing_ok=True)


def _measured(options: ProblemOptions, measure: MeasureOptions, output: Path | None, quiet: bool) -> Comparison:
    """Run `compare`, keeping every finished layer in a file beside `output`."""
    problem, partial = options.load(), _partial(output)  # first: its file may define approximations
    arguments = measure.arguments()
    arguments["fisher"] = arguments["fisher"] or problem.fisher
    settings: dict[str, Any] = {"seed": options.seed, "progress": False if quiet else None, "problem": problem.settings}

    def run() -> Comparison:
        return run_compare(problem.model, problem.likelihood, problem.data, **arguments, **settings, resume=partial)

    try:
        try:
            if partial.exists():
                load_comparison(partial)
        except ValueError:
            _set_aside(partial, "is damaged or foreign")
        try:
            return run()
        except DifferentRunError:
            _set_aside(partial, "holds another comparison")
            return run()
    except KeyboardInterrupt:
        if partial.exists():
            print(load_comparison(partial))
            if output is not None:
                print(f"Stopped; finished layers are kept, the same command goes on from {partial}.", file=sys.stderr)
        raise


def _set_aside(partial: Path, reason: str) -> None:
    """Rename a file that the run cannot go on from, and say so."""
    aside = next(p for i in count(1) if not (p := partial.with_name(f"{partial.name}.{i}")).exists())
    partial.rename(aside)
    print(f"{partial} {reason}; it is kept as {aside.name}, and the run starts from its beginning.", file=sys.stderr)


def _partial(output: Path | None) -> Path:
    """Where finished layers are kept while a run goes on."""
    if output is None:
        return Path(tempfile.gettempdir()) / f"fisher-lab-{os.getpid()}.json"
    return output.with_name(f".{output.stem}.partial.json")
