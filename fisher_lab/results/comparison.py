"""Comparison: what `compare` measured, as rows, tables and files that can be trusted later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fisher_lab._ground.arguments import check_kind, path_of, shown
from fisher_lab._ground.files import check_output, read_own, write_atomically
from fisher_lab._ground.optional import require
from fisher_lab.results import codec, html, tables
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.recommendation import Recommendation, recommend
from fisher_lab.results.rows import costs_by_pair

if TYPE_CHECKING:
    import pandas


class Difference(NamedTuple):
    """A difference of two errors with its standard error; significant beyond about two of them."""

    value: float
    stderr: float


@dataclass(frozen=True, repr=False)
class Comparison(Measurements):
    """Errors of approximations against the exact Fisher, layer by layer and over all layers.

    Attributes:
        rows: the errors.
        costs: seconds and bytes per layer and approximation.
        settings: everything that determines the result (versions, seed, N, Fisher kind, dtype,
            problem, layers), by attribute or as a mapping.
        quantities: the numbers the errors are made of (traces, squared norms, inner products), per
            layer.
        covariances: with standard errors, per layer and error the covariance matrix of the
            approximations' values.

    Example:
        >>> comparison.layers
        ['0', '2']
        >>> row = comparison.rows[0]
        >>> row.layer, row.error
        ('0', 'trace')
    """

    def value(
        self, layer: str, approximation: str, error: str, damping: float | None = None
    ) -> float:
        """One value.

        Raises:
            KeyError: if it was not measured.
            TypeError: for names that are none.
        """
        names = {"layer": layer, "approximation": approximation, "error": error}
        for what, name in names.items():
            check_kind(what, name, str, "a name")
        wanted = (layer, approximation, error, damping)
        for row in self.rows:
            key = (row.layer, row.approximation, row.error, row.damping)
            if key == wanted:
                return row.value
        raise KeyError(
            f"No {shown(error)} of {shown(approximation)} on layer {shown(layer)} (damping "
            f"{shown(damping)}) was measured, expected one of those that were."
        )

    def difference(
        self, layer: str, a: str, b: str, error: str, damping: float | None = None
    ) -> Difference:
        """How much larger an error of `a` is than that of `b`, and the standard error of that
        difference.

        The examples are the same for both, so that much of their chance cancels. Efficiencies
        (with a damping) always have one: the chance of the examples that judge the two steps.

        Raises:
            KeyError: if the errors or their standard errors were not measured.
            TypeError: for names that are none.
        """
        value_a = self.value(layer, a, error, damping)
        value_b = self.value(layer, b, error, damping)
        for found in self.covariances:
            names = found["approximations"]
            if (found["layer"], found["error"], found.get("damping")) != (layer, error, damping):
                continue
            if a not in names or b not in names:
                continue
            i = names.index(a)
            j = names.index(b)
            C = found["matrix"]
            # Var(a - b) = Var a + Var b - 2 Cov(a, b)
            both = C[i][i] + C[j][j]
            variance = both - 2 * C[i][j]
            # rounding takes the difference of two equal errors below zero
            stderr = math.sqrt(max(0.0, variance))
            return Difference(value_a - value_b, stderr)
        raise KeyError(
            f"No standard error of {error} of {a} and {b} on layer {layer!r} was measured; "
            "use compare(..., standard_errors=True)."
        )

    def recommend(self, damping: float | None = None) -> Recommendation:
        """What to use for the network and for every layer.

        The approximation whose damped step keeps most of the best decrease, its damping, what it
        costs on this machine, what is as good by chance, and the optimizer's line.

        Args:
            damping: at which steps are judged, relative to tr F / d; None for 0.01 where it was
                measured, else the middle one.

        Raises:
            ValueError: if no efficiency was measured, or none at that damping.
        """
        return recommend(self, damping)

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, with the seconds and bytes of each approximation.

        Raises:
            ValueError: if pandas is not installed.
        """
        pandas = require("pandas", "pandas")

        costs = costs_by_pair(self.costs)
        records = []
        for row in self.rows:
            record = asdict(row)
            # errors over all layers have no cost of their own
            record["seconds"] = math.nan
            record["bytes"] = math.nan
            cost = costs.get((row.layer, row.approximation))
            if cost is not None:
                record["seconds"] = cost.seconds
                record["bytes"] = cost.bytes
            records.append(record)
        return pandas.DataFrame.from_records(records)

    # -- files -------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write `.json` (or `.csv`) atomically: the file is the old one or the new one, never half
        of it.

        Raises:
            ValueError: for another ending, or a folder that cannot be written.
        """
        path = check_output(path)
        contents = self._contents()
        if path.suffix == ".csv":
            text = codec.to_csv(contents)
        else:
            text = codec.to_json(contents)
        write_atomically(path, text)
        return path

    def _contents(self) -> codec.Contents:
        return {
            "rows": self.rows,
            "costs": self.costs,
            "settings": self.settings,
            "quantities": self.quantities,
            "covariances": self.covariances,
        }

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.approximations)} approximations on {len(self.layers)} layers, "
            f"{len(self.rows)} rows)"
        )

    # -- for people --------------------------------------------------------------------------------
    def __str__(self) -> str:
        return self.table()

    def table(self, errors: str | Sequence[str] | None = None, width: int | None = None) -> str:
        """The errors as text: one block of lines per layer, then over all layers.

        Args:
            errors: measures to show: all of them, in further tables if they are too many for one.
                None for as many as one table holds; the others are named below it.
            width: characters per line, 60 or more; None for those of the terminal.

        Raises:
            ValueError: for an error that was not measured.
        """
        return tables.render(self, errors, width)

    def _repr_html_(self) -> str:
        """The table in a notebook, whose columns sort at a click."""
        return html.comparison_table(self)


def load_comparison(path: str | Path, check: bool = True) -> Comparison:
    """Read a file that `Comparison.save` wrote.

    Args:
        path: of the file.
        check: whether its contents must be those that were written; False for a file that was
            edited by hand.

    Raises:
        ValueError: if the file is missing, damaged, or not a comparison.
        TypeError: for what is no path.

    Example:
        >>> path = comparison.save("run.json")
        >>> fl.load_comparison(path).rows == comparison.rows
        True
    """
    path = path_of("path", path)
    check_kind("check", check, bool, "True or False")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise codec.unreadable(path, error) from error
    contents = codec.parsed(content, path, check)
    return Comparison(**contents)


def load_unfinished(path: Path) -> Comparison | None:
    """Read the file that an interrupted run left; None if there is none.

    Raises:
        NotOwnFileError: for a link, or a file of another user.
        ValueError: if it cannot be read, is damaged, or no comparison.
    """
    try:
        content = read_own(path)
    except OSError as error:
        raise codec.unreadable(path, error) from error
    if content is None:
        return None
    contents = codec.parsed(content, path)
    return Comparison(**contents)
