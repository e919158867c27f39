"""Comparisons as files: JSON, or CSV with everything but the rows in its first line.

Version 2 (this one) writes numbers that JSON has no words for as `{"$number": "nan"}`, and the
SHA-256 of its contents, so that a file that was changed by accident is told from what was measured.
Version 1 wrote such numbers as text that begins with "float:", and no digest; its files are read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fisher_lab.results.cells import escaped, unescaped, unseparated
from fisher_lab.results.rows import Cost, LayerAbout, Row, Settings

FORMAT = "fisher_lab comparison"
VERSION = 2
CURE = "expected a .json or .csv file written by Comparison.save"
TEXTS = ("layer", "approximation", "error", "fisher")  # of a row
NUMBER = "$number"  # the key under which a number stands that JSON has no word for
TABLE = "$table"  # the key of a table that has one of these two keys itself

Contents = dict[str, Any]  # the arguments of a Comparison


# -- writing ---------------------------------------------------------------------------------------
def to_json(contents: Contents) -> str:
    """A comparison as JSON."""
    body = encoded(_body(contents) | {"rows": [asdict(row) for row in contents["rows"]]})
    body["digest"] = digest(body)
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def to_csv(contents: Contents) -> str:
    """A comparison as CSV: a comment with everything but the rows, then the rows."""
    table = io.StringIO()
    # all but numbers in quotation marks, so that an end of line in a name is no end of a row
    columns = [column.name for column in fields(Row)]
    writer = csv.DictWriter(table, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in contents["rows"]:
        writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
    # files of the first version hold names as they are
    body = encoded(_body(contents) | {"escaped": True})
    body["digest"] = digest(body, table.getvalue())
    about = json.dumps(body, allow_nan=False)
    return f"# {unseparated(about)}\n{table.getvalue()}"


def _body(contents: Contents) -> dict[str, Any]:
    """Everything but the rows."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": contents["settings"],
        "costs": [asdict(cost) for cost in contents["costs"]],
        "quantities": list(contents["quantities"]),
        "covariances": list(contents["covariances"]),
    }


def _cell(value: str | float | None) -> str | float:
    """A value as it stands in a CSV file."""
    if isinstance(value, str):
        return escaped(value)
    return "" if value is None else value


def encoded(value: Any) -> Any:
    """Plain JSON: infinities and NaNs under a key of their own, tables with such a key inside
    another.
    """
    if isinstance(value, Mapping):
        table = {str(key): encoded(entry) for key, entry in value.items()}
        if NUMBER in table or TABLE in table:
            return {TABLE: list(table.items())}
        return table
    if isinstance(value, list | tuple):
        return [encoded(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {NUMBER: str(value)}
    return value


def digest(body: Mapping[str, Any], rows: str = "") -> str:
    """SHA-256 of the contents of a file, whatever its layout.

    Args:
        body: what the JSON holds; its own digest does not count.
        rows: the text of the rows, where they are not in the body.
    """
    counted = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(counted, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{text}\n{rows}".encode()).hexdigest()


# -- reading ---------------------------------------------------------------------------------------
def parsed(content: bytes, path: Path, check: bool = True) -> Contents:
    """The contents of a file.

    Args:
        content: its bytes.
        path: its name, which tells the form, and for the message.
        check: compare the digest; False for files that were edited by hand.

    Raises:
        ValueError: if the file is damaged, or not a comparison.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}), {CURE}.") from error
    try:
        body, rows = _from_csv(text) if path.suffix == ".csv" else _from_json(text)
        version = _version(body)
        if check and version > 1 and body.get("digest") != digest(body, rows):
            raise ValueError(
                "its contents are not those that were written; load_comparison(path, check=False) "
                "reads edited files"
            )
        table = _table(decoded(body, version))
        if path.suffix == ".csv":
            table["rows"] = _csv_rows(rows, bool(table.get("escaped")))
        return _contents(table)
    # numbers without end, tables in tables in tables, and quotation marks that never close are no
    # ValueErrors
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is truncated or foreign ({error}), {CURE}.") from error


def _from_json(text: str) -> tuple[Any, str]:
    return json.loads(text), ""


def _from_csv(text: str) -> tuple[Any, str]:
    """The first line, and the text of the rows."""
    first, _, rest = text.partition("\n")
    return json.loads(first.removeprefix("# ")), rest


def _csv_rows(text: str, are_escaped: bool) -> list[dict[str, Any]]:
    """The rows of a CSV file."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if are_escaped:
        for row in rows:
            for name in TEXTS:
                row[name] = unescaped(row[name])
    return rows


def _version(body: Any) -> int:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError("not a comparison")
    version = body.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format version {version!r}")
    if version > VERSION:
        raise ValueError(f"written by a newer fisher_lab, format {version}")
    return version


def decoded(value: Any, version: int) -> Any:
    """The inverse of `encoded`, of a file of that version."""
    if isinstance(value, list):
        return [decoded(entry, version) for entry in value]
    if isinstance(value, dict):
        if version > 1 and set(value) == {NUMBER}:
            return float(value[NUMBER])
        if version > 1 and set(value) == {TABLE}:
            return {key: decoded(entry, version) for key, entry in value[TABLE]}
        return {key: decoded(entry, version) for key, entry in value.items()}
    if version == 1 and isinstance(value, str):
        return _decoded_text(value)
    return value


def _decoded_text(value: str) -> str | float:
    """A text of version 1, which may stand for a number."""
    if value.startswith("float:text:"):
        return value.removeprefix("float:text:")
    if value.startswith("float:"):
        return float(value.removeprefix("float:"))
    return value


# -- what a file holds, checked: whoever wrote it --------------------------------------------------
def _contents(body: dict[str, Any]) -> Contents:
    """The arguments of a Comparison; every reader below raises what `parsed` tells as one sentence."""
    return {
        "rows": tuple(_row(row) for row in _tables(body["rows"])),
        "costs": tuple(_cost(cost) for cost in _tables(body["costs"])),
        "settings": _settings(_table(body["settings"])),
        "quantities": tuple(_quantity(quantity) for quantity in _tables(body["quantities"])),
        "covariances": tuple(_tables(body.get("covariances", []))),
    }


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
    if value is None or value == "":
        return None
    return float(value)


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
    return Cost(
        layer=_text(cost, "layer"),
        approximation=_text(cost, "approximation"),
        seconds=float(cost["seconds"]),
        bytes=int(cost["bytes"]),
    )


def _settings(settings: dict[str, Any]) -> Settings:
    """The settings, if the tables in them that figures and pages read are tables."""
    _table(settings.get("problem") or {})
    _table(settings.get("left_out") or {})
    for about in _table(settings.get("layers", {})).values():
        _about(_table(about))
    return Settings(settings)


def _about(about: dict[str, Any]) -> LayerAbout:
    shape = about.get("shape", [0, 0])
    if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
        raise TypeError("a shape that is not two whole numbers")
    return LayerAbout(about)


def _quantity(quantity: dict[str, Any]) -> dict[str, Any]:
    _text(quantity, "layer")
    _text(quantity, "approximation")
    for name in ("trace_exact", "trace_approx"):
        if not isinstance(quantity.get(name, 0.0), int | float):
            raise TypeError(f"{name} is no number")
    return quantity
