"""Comparison: what `compare` measured, as rows, tables and files that can be trusted later."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fisher_lab._ground.files import check_output, read_own, write_atomically

if TYPE_CHECKING:
    import pandas

FORMAT = "fisher_lab comparison"
VERSION = 1
CURE = "expected a .json or .csv file written by Comparison.save"
ALL = "(all)"  # the layer name of errors over all layers


@dataclass(frozen=True)
class Row:
    """One error of one approximation on one layer.

    Attributes:
        layer: module name, or "(all)" for the block-diagonal matrix of all layers.
        approximation: class name, then non-default options in brackets.
        error: name of the measure.
        value: the error.
        noise: its noise floor; a value below it is reported as 0.
        damping: relative to tr F / d, for damped measures.
        checked: relative deviation of the captured exact block from torch.func along one random direction.
        fisher: which Fisher was measured: "true", "mc" or "empirical".
        stderr: standard error over the examples, where it was asked for and could be had.
    """

    layer: str
    approximation: str
    error: str
    value: float
    noise: float
    damping: float | None = None
    checked: float | None = None
    fisher: str = "true"
    stderr: float | None = None


@dataclass(frozen=True)
class Cost:
    """What one approximation of one layer took: seconds to build it and bytes to hold it."""

    layer: str
    approximation: str
    seconds: float
    bytes: int


class Difference(NamedTuple):
    """A difference of two errors with its standard error; significant beyond about two of them."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Comparison:
    """Errors of approximations against the exact Fisher, layer by layer and over all layers.

    Attributes:
        rows: the errors.
        costs: seconds and bytes per layer and approximation.
        settings: everything that determines the result (versions, seed, N, C, Fisher kind, dtype, problem, layers).
        quantities: the numbers the errors are made of (traces, squared norms, inner products), per layer.
        covariances: with standard errors, per layer and error the covariance matrix of the approximations' values.
    """

    rows: tuple[Row, ...]
    costs: tuple[Cost, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    quantities: tuple[dict[str, Any], ...] = ()
    covariances: tuple[dict[str, Any], ...] = ()

    @property
    def layers(self) -> list[str]:
        """Names of the layers measured, "(all)" not among them."""
        return [name for name in dict.fromkeys(row.layer for row in self.rows) if name != ALL]

    @property
    def approximations(self) -> list[str]:
        """Labels of the approximations."""
        return list(dict.fromkeys(row.approximation for row in self.rows))

    @property
    def errors(self) -> list[str]:
        """Names of the measures."""
        return list(dict.fromkeys(row.error for row in self.rows))

    def value(self, layer: str, approximation: str, error: str, damping: float | None = None) -> float:
        """One value.

        Raises:
            KeyError: if it was not measured.
        """
        for row in self.rows:
            if (row.layer, row.approximation, row.error, row.damping) == (layer, approximation, error, damping):
                return row.value
        raise KeyError(f"No {error} of {approximation} on layer {layer!r} (damping {damping}) was measured.")

    def difference(self, layer: str, a: str, b: str, error: str) -> Difference:
        """How much larger an error of `a` is than that of `b`, and the standard error of that difference.

        The examples are the same for both, so that much of their chance cancels.

        Raises:
            KeyError: if the errors or their standard errors were not measured.
        """
        value = self.value(layer, a, error) - self.value(layer, b, error)
        for found in self.covariances:
            names = found["approximations"]
            if (found["layer"], found["error"]) == (layer, error) and a in names and b in names:
                i, j, C = names.index(a), names.index(b), found["matrix"]
                return Difference(value, math.sqrt(max(0.0, C[i][i] + C[j][j] - 2 * C[i][j])))
        raise KeyError(
            f"No standard error of {error} of {a} and {b} on layer {layer!r} was measured; "
            "use compare(..., standard_errors=True)."
        )

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, with the seconds and bytes of each approximation."""
        import pandas

        costs = {(c.layer, c.approximation): c for c in self.costs}
        records = []
        for row in self.rows:
            cost = costs.get((row.layer, row.approximation))
            extra = {"seconds": cost.seconds if cost else math.nan, "bytes": cost.bytes if cost else math.nan}
            records.append(asdict(row) | extra)
        return pandas.DataFrame.from_records(records)

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write `.json` (or `.csv`) atomically: the file is the old one or the new one, never half of it.

        Raises:
            ValueError: for another ending, or a folder that cannot be written.
        """
        path = check_output(path)
        text = self._to_csv() if path.suffix == ".csv" else self._to_json()
        write_atomically(path, text)
        return path

    def _without_rows(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "settings": self.settings, "costs": [asdict(c) for c in self.costs],
            "quantities": list(self.quantities), "covariances": list(self.covariances),
        }  # fmt: skip

    def _to_json(self) -> str:
        rows = {"rows": [asdict(row) for row in self.rows]}
        return json.dumps(_encode(self._without_rows() | rows), indent=1, allow_nan=False) + "\n"

    def _to_csv(self) -> str:
        out = io.StringIO()
        out.write("# " + json.dumps(_encode(self._without_rows()), allow_nan=False) + "\n")
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in self.rows)
        return out.getvalue()

    # -- for people ------------------------------------------------------------------------------------------------
    def __str__(self) -> str:
        return self.table()

    def table(self, errors: Sequence[str] | None = None, width: int = 110) -> str:
        """The errors as text: one block of lines per layer, then over all layers.

        Args:
            errors: measures to show, None for all that were measured.
            width: characters per line.
        """
        from fisher_lab.results.tables import render

        return render(self, errors, width)


def load_comparison(path: str | Path) -> Comparison:
    """Read a file that `Comparison.save` wrote.

    Raises:
        ValueError: if the file is missing, truncated, or not a comparison.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}), {CURE}.") from error
    return _parsed(content, path)


def load_unfinished(path: Path) -> Comparison | None:
    """Read the file that an interrupted run left; None if there is none.

    Raises:
        NotOwnFileError: for a link, or a file of another user.
        ValueError: if it cannot be read, is truncated, or no comparison.
    """
    try:
        content = read_own(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}), {CURE}.") from error
    return None if content is None else _parsed(content, path)


def _parsed(content: bytes, path: Path) -> Comparison:
    """The comparison that a file holds."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}), {CURE}.") from error
    try:
        if path.suffix == ".csv":
            first, _, rest = text.partition("\n")
            body = json.loads(first.removeprefix("# "))
            body["rows"] = list(csv.DictReader(io.StringIO(rest)))
        else:
            body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("settings"), dict):
            raise ValueError("not a comparison")
        if body["version"] > VERSION:
            raise ValueError(f"written by a newer fisher_lab, format {body['version']}")
        return Comparison(
            tuple(_row(_decode(row)) for row in body["rows"]),
            tuple(Cost(c["layer"], c["approximation"], float(c["seconds"]), int(c["bytes"])) for c in body["costs"]),
            _decode(body["settings"]),
            tuple(_decode(q) for q in body["quantities"]),
            tuple(_decode(c) for c in body.get("covariances", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or foreign ({error}), {CURE}.") from error


def _row(row: dict[str, Any]) -> Row:
    def number(name: str) -> float | None:
        return None if row.get(name) in (None, "") else float(row[name])

    value, noise = number("value"), number("noise")
    if value is None or noise is None:
        raise ValueError("a row without value")
    return Row(
        row["layer"],
        row["approximation"],
        row["error"],
        value,
        noise,
        number("damping"),
        number("checked"),
        row["fisher"],
        number("stderr"),
    )


def _encode(value: Any) -> Any:
    """JSON has no infinities and NaNs: they become strings."""
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"float:{value}"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, str) and value.startswith("float:"):
        return float(value.removeprefix("float:"))
    return value
