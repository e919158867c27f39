"""The command line: `fisher-lab compare | plot | report | train | tune | problems`, also `python -m fisher_lab`."""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from fisher_lab import approximations as methods
from fisher_lab import problems as named_problems
from fisher_lab.approximations import Approximation
from fisher_lab.comparison import check_output, load_comparison
from fisher_lab.diagnose import DifferentRunError
from fisher_lab.diagnose import compare as run_compare
from fisher_lab.memory import readable


def compare(
    problem: str = "martens_grosse",
    output: Path | None = None,
    approximations: tuple[str, ...] = (),
    layers: tuple[str, ...] = (),
    errors: tuple[str, ...] = ("default",),
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    fisher: Literal["true", "mc", "empirical"] | None = None,
    exact: Literal["captured", "func"] = "captured",
    dtype: Literal["float64", "float32"] = "float64",
    steps: int | None = None,
    examples: int | None = None,
    seed: int = 0,
    set: tuple[str, ...] = (),
    memory: float | None = None,
    quiet: bool = False,
) -> None:
    """Measure how far every approximation is from the exact Fisher block of every layer.

    A run that was stopped goes on where it was when the same command is given again.

    Args:
        problem: name of a problem (see `fisher-lab problems`), package.module:function, or path/file.py:function.
        output: file to save to, .json or .csv.
        approximations: for instance KFAC "MiniBlock(linear=col)"; all if none are named.
        layers: names of layers; all if none are named.
        errors: "default", "all", or names of error measures.
        dampings: for the damped measures, relative to tr F / d.
        fisher: which Fisher; the problem's own choice if not given.
        exact: "captured" (checked against torch.func) or "func" (torch.func throughout, slower).
        dtype: precision.
        steps: training steps of the problem.
        examples: measuring examples of the problem.
        seed: of the problem, of sampled labels and of random directions.
        set: further settings of the problem, as name=value.
        memory: budget in GiB; half of what is free if not given.
        quiet: no progress bar and no table.
    """
    chosen = [parse_approximation(text) for text in approximations] or None
    if output is not None:
        check_output(output)
    loaded = load_problem(problem, set, seed, steps=steps, examples=examples)
    if output is None:  # for the table of the finished layers, should the run be stopped
        partial = Path(tempfile.gettempdir()) / f"fisher-lab-{os.getpid()}.json"
    else:
        partial = output.with_name(f".{output.stem}.partial.json")
    arguments: dict[str, Any] = {
        "fisher": fisher or loaded.fisher, "layers": list(layers) or None, "dampings": dampings, "exact": exact,
        "errors": errors[0] if len(errors) == 1 else errors, "dtype": getattr(torch, dtype), "seed": seed,
        "memory": memory, "progress": False if quiet else None, "problem": loaded.settings, "resume": partial,
    }  # fmt: skip
    try:
        try:
            found = run_compare(loaded.model, loaded.likelihood, loaded.data, chosen, **arguments)
        except DifferentRunError:  # what an earlier, different run left behind is of no use
            partial.unlink()
            found = run_compare(loaded.model, loaded.likelihood, loaded.data, chosen, **arguments)
    except KeyboardInterrupt:
        if partial.exists():
            print(load_comparison(partial))
            if output is not None:
                print(f"Stopped; finished layers are kept, the same command goes on from {partial}.", file=sys.stderr)
        raise
    if not quiet:
        print(found)
    spent = found.settings
    print(f"{spent['seconds']:.1f} s, peak memory {readable(spent['peak_bytes'])}", end="")
    if output is not None:
        print(f", saved to {found.save(output)}", end="")
    print()
    partial.unlink(missing_ok=True)


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


def load_problem(spec: str, settings: tuple[str, ...], seed: int, **common: Any) -> Any:
    """The problem with `name=value` settings; common settings that are None are left to the problem."""
    given: dict[str, Any] = {key: value for key, value in common.items() if value is not None}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"Got --set {text!r}, expected name=value, for instance --set steps=100.")
        given[key] = value
    return named_problems.load(spec, {"seed": seed}, **given)


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


COMMANDS = {"compare": compare, "problems": problems}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `fisher-lab`; bad input ends with one sentence and exit code 2."""
    import tyro

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
