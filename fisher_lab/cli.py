"""The command line: `fisher-lab compare | plot | report | train | tune | problems`, also `python -m fisher_lab`."""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from fisher_lab import approximations as methods
from fisher_lab import problems as named_problems
from fisher_lab.approximations import Approximation
from fisher_lab.comparison import Comparison, check_output, load_comparison
from fisher_lab.diagnose import DifferentRunError
from fisher_lab.diagnose import compare as run_compare
from fisher_lab.errors import DAMPINGS
from fisher_lab.memory import readable


@dataclass(frozen=True)
class ProblemOptions:
    """Which problem.

    Args:
        problem: its name (see `fisher-lab problems`), package.module:function, or path/file.py:function.
        steps: its training steps.
        examples: its measuring examples.
        seed: of the problem, of sampled labels and of random directions.
        set: its further settings, as name=value.
    """

    problem: str = "martens_grosse"
    steps: int | None = None
    examples: int | None = None
    seed: int = 0
    set: tuple[str, ...] = ()

    def load(self) -> named_problems.Problem:
        """Build the problem; settings that were not given are left to it."""
        common = {"steps": self.steps, "examples": self.examples}
        given: dict[str, Any] = {key: value for key, value in common.items() if value is not None}
        for text in self.set:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"Got --set {text!r}, expected name=value, for instance --set steps=100.")
            given[key] = value
        return named_problems.load(self.problem, {"seed": self.seed}, **given)


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure.

    Args:
        approximations: for instance KFAC "MiniBlock(linear=col)"; all if none are named.
        layers: names of layers; all if none are named.
        errors: "default", "all", or names of error measures.
        dampings: for the damped measures, relative to tr F / d.
        fisher: which Fisher; the problem's own choice if not given.
        exact: "captured" (checked against torch.func) or "func" (torch.func throughout, slower).
        dtype: precision.
        memory: budget in GiB; half of what is free if not given.
    """

    approximations: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    errors: tuple[str, ...] = ("default",)
    dampings: tuple[float, ...] = DAMPINGS
    fisher: Literal["true", "mc", "empirical"] | None = None
    exact: Literal["captured", "func"] = "captured"
    dtype: Literal["float64", "float32"] = "float64"
    memory: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `compare`; `fisher` may be None."""
        chosen = [parse_approximation(text) for text in self.approximations]
        return {
            "approximations": chosen or None, "layers": list(self.layers) or None, "dampings": self.dampings,
            "errors": self.errors[0] if len(self.errors) == 1 else self.errors, "fisher": self.fisher,
            "exact": self.exact, "dtype": getattr(torch, self.dtype), "memory": self.memory,
        }  # fmt: skip


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

    if not files:
        raise ValueError("Got no files, expected at least one that `fisher-lab compare --output` wrote.")
    loaded = {path: load_comparison(path) for path in files}
    for path, comparison in loaded.items():
        start = f"{path.stem}-" if len(files) > 1 else ""
        for name, figure in plots.figures(comparison).items():
            print(plots.save(figure, output / f"{start}{name}.{form}"))
    steps = {c.settings["problem"]["steps"]: c for c in loaded.values() if "steps" in c.settings.get("problem", {})}
    if len(steps) == len(loaded) > 1:
        print(plots.save(plots.training(steps), output / f"training-frobenius.{form}"))


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
            return run()
        except DifferentRunError:  # what an earlier, different run left behind is of no use
            partial.unlink()
            return run()
    except KeyboardInterrupt:
        if partial.exists():
            print(load_comparison(partial))
            if output is not None:
                print(f"Stopped; finished layers are kept, the same command goes on from {partial}.", file=sys.stderr)
        raise


def _partial(output: Path | None) -> Path:
    """Where finished layers are kept while a run goes on."""
    if output is None:
        return Path(tempfile.gettempdir()) / f"fisher-lab-{os.getpid()}.json"
    return output.with_name(f".{output.stem}.partial.json")


def problems() -> None:
    """List the problems with their settings."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("problem", "what it is", "settings"):
        table.add_column(title, no_wrap=title == "problem")
    for name, about in named_problems.describe().items():
        settings = ", ".join(f"{key}={value}" for key, value in about.settings.items())
        table.add_row(name, about.summary, settings)
    Console().print(table)
    print(
        "\nYour own: --problem package.module:function or path/file.py:function, returning (model, likelihood, data)."
    )


def parse_approximation(text: str) -> Approximation:
    """`KFAC` or `MiniBlock(linear=col)` as an Approximation.

    Raises:
        ValueError: unknown names or options, or text that is neither.
    """
    name, bracket, rest = text.partition("(")
    known = methods.registry()
    if name not in known or (bracket and not rest.endswith(")")):
        raise ValueError(f"Got approximation {text!r}, expected one of {', '.join(known)}, options as in TN(modes=2).")
    options = {}
    for part in filter(None, (p.strip() for p in rest.removesuffix(")").split(","))):
        key, _, value = part.partition("=")
        options[key.strip()] = _literal(value.strip())
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(f"Got approximation {text!r}, expected options that {name} has ({error}).") from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


COMMANDS: dict[str, Any] = {"compare": compare, "plot": plot, "report": report, "problems": problems}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `fisher-lab`; bad input ends with one sentence and exit code 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="fisher-lab", description=__doc__, args=arguments, config=(tyro.conf.OmitArgPrefixes,)
        )
    except (ValueError, TypeError) as error:
        print(f"fisher-lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
