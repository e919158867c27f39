"""Options that several commands share."""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fisher_lab import approximations as methods
from fisher_lab import problems
from fisher_lab._ground.text import did_you_mean
from fisher_lab._passes.labels import FisherKind
from fisher_lab.approximations import Approximation
from fisher_lab.results.grid import check_measured, check_top


@dataclass(frozen=True)
class ProblemOptions:
    """Which problem.

    Args:
        problem: its name (see `fisher-lab problems`), package.module:function, or
            path/file.py:function; the last two run that code.
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

    def load(self) -> problems.Problem:
        """Build the problem; settings that were not given are left to it."""
        return problems.load(self.problem, {"seed": self.seed}, **self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings that were given."""
        given: dict[str, Any] = {}
        if self.steps is not None:
            given["steps"] = self.steps
        if self.examples is not None:
            given["examples"] = self.examples
        return given | assignments("--set", self.set)


@dataclass(frozen=True)
class ShowOptions:
    """What the table shows.

    Args:
        columns: error measures, in as many tables as they need; as many as fit if none are named.
        sort: the measure by which the lines of each layer stand in order, the best first; a damped
            one at its first damping.
        top: lines of each layer.
    """

    columns: tuple[str, ...] = ()
    sort: str | None = None
    top: int | None = None

    def check(self, errors: Collection[str]) -> None:
        """Refuse before measuring what cannot be shown after it.

        Args:
            errors: the measures that will be measured.

        Raises:
            ValueError: for another measure, or no line at all.
        """
        wanted = list(self.columns)
        if self.sort is not None:
            wanted.append(self.sort)
        check_measured(wanted, errors)
        check_top(self.top)


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure.

    Args:
        approximations: for instance KFAC "MiniBlock(linear=col)"; all if none are named.
        layers: names of layers; all if none are named.
        errors: "default", "all", or names of error measures, for instance frobenius
            damped_efficiency off_block network_efficiency.
        dampings: for the damped measures, relative to tr F / d; 0.01 for the default errors and
            0.0001 to 1 for others if none are given.
        fisher: which Fisher; the problem's own choice if not given.
        exact: "captured" (checked against torch.func) or "func" (torch.func throughout, slower).
        dtype: precision.
        memory: budget in GiB; half of what is free if not given.
    """

    approximations: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    errors: tuple[str, ...] = ("default",)
    dampings: tuple[float, ...] = ()
    fisher: FisherKind | None = None
    exact: Literal["captured", "func"] = "captured"
    dtype: Literal["float64", "float32"] = "float64"
    memory: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `compare`; `fisher` may be None."""
        chosen = list(map(parse_approximation, self.approximations))
        return {
            "approximations": chosen or None,
            "layers": list(self.layers) or None,
            "dampings": self.dampings or None,
            "errors": self.errors,
            "fisher": self.fisher,
            "exact": self.exact,
            "dtype": getattr(torch, self.dtype),
            "memory": self.memory,
        }


def assignments(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """`name=value` texts as a dictionary.

    Raises:
        ValueError: for a text without "=".
    """
    given = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"Got {option} {text!r}, expected name=value, for instance {option} steps=100."
            )
        given[key] = value
    return given


def parse_approximation(text: str) -> Approximation:
    """`KFAC` or `MiniBlock(linear=col)` as an Approximation.

    Raises:
        ValueError: unknown names or options, or text that is neither.
    """
    name, bracket, rest = text.partition("(")
    known = methods.registry()
    if name not in known or (bracket and not rest.endswith(")")):
        raise ValueError(
            f"Got approximation {text!r}{did_you_mean(name, known)}, expected one of "
            f"{', '.join(known)}, options as in TN(modes=2)."
        )
    options = {}
    parts = rest.removesuffix(")").split(",")
    for part in filter(None, map(str.strip, parts)):
        key, _, value = part.partition("=")
        options[key.strip()] = literal(value.strip())
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(
            f"Got approximation {text!r}, expected options that {name} has ({error})."
        ) from error


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
