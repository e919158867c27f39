"""`fisher-lab compare`, `plot` and `report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fisher_lab._ground.files import NotOwnFileError, check_output, file_names, inside
from fisher_lab._ground.memory import readable
from fisher_lab._ground.ranks import is_first
from fisher_lab.cli.options import MeasureOptions, ProblemOptions, ShowOptions
from fisher_lab.diagnose import DifferentRunError
from fisher_lab.diagnose import compare as run_compare
from fisher_lab.errors.judging import distance
from fisher_lab.errors.measures import chosen
from fisher_lab.results import Comparison, load_comparison, load_unfinished, tables
from fisher_lab.results.grid import columns_of, layer_lines, ordered

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compare(
    problem: ProblemOptions = ProblemOptions(),
    measure: MeasureOptions = MeasureOptions(),
    show: ShowOptions = ShowOptions(),
    output: Path | None = None,
    quiet: bool = False,
) -> None:
    """Measure how far every approximation is from the exact Fisher block of every layer.

    A run that was stopped goes on where it was when the same command is given again.

    Args:
        problem: the problem.
        measure: what to measure.
        show: what of it the table shows.
        output: file to save to, .json or .csv.
        quiet: no progress bar and no table.
    """
    if output is not None:
        check_output(output)
    show.check([row.name for row in chosen(measure.errors)])
    with _partial(output) as partial:
        found = _measured(problem, measure, partial, quiet)
        # first the file: a terminal that is gone, full or of another alphabet must not cost the
        # result
        saved = ""
        if output is not None and is_first():
            saved = f", saved to {found.save(output)}"
    if not quiet:
        _show(found, show)
    spent = found.settings
    print(f"{spent['seconds']:.1f} s, peak memory {readable(spent['peak_bytes'])}{saved}")


def recommend(
    files: tyro.conf.Positional[tuple[Path, ...]] = (),
    problem: ProblemOptions = ProblemOptions(),
    measure: MeasureOptions = MeasureOptions(errors=("default", "network_efficiency")),
    damping: float | None = None,
) -> None:
    """Say what to use: for the network and every layer an approximation, its damping, what it keeps
    of the best step, what it costs, and the optimizer's line.

    Args:
        files: files that `compare --output` wrote; without any the problem is measured.
        problem: the problem, if no files are given.
        measure: what to measure, if no files are given.
        damping: at which steps are judged, relative to tr F / d; 0.01 if it was measured, else the
            middle one.
    """
    if not files:
        with _partial(None) as partial:
            found = _measured(problem, measure, partial, quiet=False)
        print(found.recommend(damping))
        return
    for path in files:
        if len(files) > 1:
            print(f"{path}:")
        print(load_comparison(path).recommend(damping))


def plot(
    files: tyro.conf.Positional[tuple[Path, ...]],
    output: Path = Path("figures"),
    form: Literal["svg", "png", "pdf"] = "svg",
) -> None:
    """Draw the figures of saved comparisons; several of one problem at different steps also along
    its training.

    Args:
        files: files that `compare --output` wrote.
        output: folder for the figures.
        form: what kind of files.
    """
    from fisher_lab import plots
    from fisher_lab.plots.output import training_drawings

    if not files:
        raise ValueError(
            "Got no files, expected at least one that `fisher-lab compare --output` wrote."
        )
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
    """Write a page that says what was measured, the answer for every layer, tables and figures: one
    HTML file.

    Args:
        files: files that `compare --output` wrote; without any the problem is measured.
        problem: the problem, if no files are given.
        measure: what to measure, if no files are given.
        output: the .html file.
    """
    from fisher_lab.report import write_report

    check_output(output, (".html",))
    if files:
        print(write_report(files, output))
        return
    with _partial(output) as partial:
        found = _measured(problem, measure, partial, quiet=False)
        if is_first():
            print(write_report(found, output))


def _measured(
    options: ProblemOptions, measure: MeasureOptions, partial: Path, quiet: bool
) -> Comparison:
    """Run `compare`, keeping every finished layer in the file `partial`."""
    problem = options.load()  # first: its file may define approximations
    arguments = measure.arguments()
    arguments["fisher"] = arguments["fisher"] or problem.fisher
    settings: dict[str, Any] = {
        "seed": options.seed,
        "progress": False if quiet else None,
        "problem": problem.settings,
        "labels": problem.labels,
        "output": problem.output,
    }

    def run() -> Comparison:
        return run_compare(
            problem.model, problem.likelihood, problem.data, **arguments, **settings, resume=partial
        )

    try:
        load_unfinished(partial)
    except NotOwnFileError:
        raise
    except ValueError:
        _set_aside(partial, "is damaged or foreign")
    try:
        try:
            return run()
        except DifferentRunError:
            _set_aside(partial, "holds another comparison")
            return run()
    except KeyboardInterrupt:
        finished = load_unfinished(partial)
        if finished is not None:
            print(finished)
        raise


def _show(found: Comparison, options: ShowOptions) -> None:
    """Print the table that was asked for."""
    columns = columns_of(found, options.columns or None)
    groups = layer_lines(found, columns)
    if options.sort or options.top:
        groups = ordered(found, groups, distance, options.sort, options.top)
    tables.show(found, tables.View(columns, groups, bool(options.columns), distance))


def _set_aside(partial: Path, reason: str) -> None:
    """Rename a file that the run cannot go on from, and say so."""
    if not is_first():
        return
    for number in count(1):
        aside = partial.with_name(f"{partial.name}.{number}")
        if not os.path.lexists(aside):
            break
    partial.rename(aside)
    print(
        f"{partial} {reason}; it is kept as {aside.name}, and the run starts from its beginning.",
        file=sys.stderr,
    )


@contextmanager
def _partial(output: Path | None) -> Iterator[Path]:
    """Where finished layers are kept while a run goes on; removed when the block ends well.

    With an output the name is fixed, so that the same command finds it again: `.NAME.partial.json`
    beside it. Without one nothing is found again, and the file lies in a new folder that nobody
    else can write to.
    """
    if output is None:
        with TemporaryDirectory(prefix="fisher-lab-") as folder:
            yield Path(folder) / "partial.json"
        return
    partial = output.with_name(f".{output.stem}.partial.json")
    try:
        yield partial
    except KeyboardInterrupt:
        if partial.exists():
            print(
                f"Stopped; finished layers are kept, the same command goes on from {partial}.",
                file=sys.stderr,
            )
        raise
    partial.unlink(missing_ok=True)
