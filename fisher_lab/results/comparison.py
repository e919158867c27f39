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
from fisher_lab._ground.optional import require
from fisher_lab.results.cells import escaped, unescaped, unseparated

if TYPE_CHECKING:
    import pandas

FORMAT = "fisher_lab comparison"
VERSION = 1
CURE = "expected a .json or .csv file written by Comparison.save"
TEXTS = ("layer", "approximation", "error", "fisher")  # of a row
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
        """The rows as a pandas DataFrame, with the seconds and bytes of each approximation.

        Raises:
            ValueError: if pandas is not installed.
        """
        pandas = require("pandas", "pandas")

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
        # Files of earlier versions hold names as they are.
        about = json.dumps(_encode(self._without_rows() | {"escaped": True}), allow_nan=False)
        out.write(f"# {unseparated(about)}\n")
        # All but numbers in quotation marks, so that an end of line in a name is no end of a row.
        columns = [column.name for column in fields(Row)]
        writer = csv.DictWriter(out, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
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
        body = _from_csv(text) if path.suffix == ".csv" else _decode(json.loads(text))
        return _comparison(body)
    # Numbers without end, tables in tables in tables, and quotation marks that never close are no ValueErrors.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is truncated or foreign ({error}), {CURE}.") from error


def _cell(value: str | float | None) -> str | float:
    """A value as it stands in a CSV file."""
    if isinstance(value, str):
        return escaped(value)
    return "" if value is None else value


def _from_csv(text: str) -> dict[str, Any]:
    """What a JSON file of the same comparison holds."""
    first, _, rest = text.partition("\n")
    body = _table(_decode(json.loads(first.removeprefix("# "))))
    rows = list(csv.DictReader(io.StringIO(rest)))
    if body.get("escaped"):
        for row in rows:
            for name in TEXTS:
                row[name] = unescaped(row[name])
    body["rows"] = rows
    return body


# -- what a file holds, checked: whoever wrote it ------------------------------------------------------------------
def _comparison(body: Any) -> Comparison:
    """A comparison of the contents of a file; every reader below raises what `_parsed` tells as one sentence."""
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("settings"), dict):
        raise ValueError("not a comparison")
    if body["version"] > VERSION:
        raise ValueError(f"written by a newer fisher_lab, format {body['version']}")
    return Comparison(
        rows=tuple(_row(row) for row in _tables(body["rows"])),
        costs=tuple(_cost(cost) for cost in _tables(body["costs"])),
        settings=_settings(body["settings"]),
        quantities=tuple(_quantity(quantity) for quantity in _tables(body["quantities"])),
        covariances=tuple(_tables(body.get("covariances", []))),
    )


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise TypeError("no list where one belongs")
    return [_table(entry) for entry in value]


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("no table where one belongs")
    return value


def _text(table: dict[str, Any], name: str) -> str:
    value = table[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _optional(table: dict[str, Any], name: str) -> float | None:
    """A number, or None where it is left out."""
    value = table.get(name)
    return None if value is None or value == "" else float(value)


def _row(row: dict[str, Any]) -> Row:
    value = _optional(row, "value")
    noise = _optional(row, "noise")
    if value is None or noise is None:
        raise ValueError("a row without value")
    return Row(
        layer=_text(row, "layer"),
        approximation=_text(row, "approximation"),
        error=_text(row, "error"),
        value=value,
        noise=noise,
        damping=_optional(row, "damping"),
        checked=_optional(row, "checked"),
        fisher=_text(row, "fisher"),
        stderr=_optional(row, "stderr"),
    )


def _cost(cost: dict[str, Any]) -> Cost:
    return Cost(_text(cost, "layer"), _text(cost, "approximation"), float(cost["seconds"]), int(cost["bytes"]))


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, if the tables in them that figures and pages read are tables."""
    _table(settings.get("problem") or {})
    _table(settings.get("left_out") or {})
    for about in _table(settings.get("layers", {})).values():
        shape = _table(about).get("shape", [0, 0])
        if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
            raise TypeError("a shape that is not two whole numbers")
    return settings


def _quantity(quantity: dict[str, Any]) -> dict[str, Any]:
    _text(quantity, "layer")
    _text(quantity, "approximation")
    for name in ("trace_exact", "trace_approx"):
        if not isinstance(quantity.get(name, 0.0), int | float):
            raise TypeError(f"{name} is no number")
    return quantity


def _encode(value: Any) -> Any:
    """JSON has no infinities and NaNs: they become strings, and strings that look like these longer ones."""
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"float:{value}"
    if isinstance(value, str) and value.startswith("float:"):
        return f"float:text:{value}"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, str) and value.startswith("float:text:"):
        return value.removeprefix("float:text:")
    if isinstance(value, str) and value.startswith("float:"):
        return float(value.removeprefix("float:"))
    return value
