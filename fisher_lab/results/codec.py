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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fisher_lab.results.cells import escaped, unescaped, unseparated
from fisher_lab.results.rows import Cost, Row, Settings, is_writable, plain

FORMAT = "fisher_lab comparison"
VERSION = 2
CURE = "expected a .json or .csv file written by Comparison.save"
TEXTS = ("layer", "approximation", "error", "fisher", "precision")  # of a row
NUMBER = "$number"  # the key under which a number stands that JSON has no word for
TABLE = "$table"  # the key of a table that has one of these two keys itself

Object = dict[str, Any]  # of JSON
Contents = Object  # the arguments of a Comparison


# -- writing ---------------------------------------------------------------------------------------
def to_json(contents: Contents) -> str:
    """A comparison as JSON."""
    body = _encoded_whole(contents)
    body["digest"] = digest(body)
    text = json.dumps(body, indent=1, allow_nan=False)
    return f"{text}\n"


def to_csv(contents: Contents) -> str:
    """A comparison as CSV: a comment with everything but the rows, then the rows."""
    _encoded_whole(contents)  # for what it refuses
    rows = _csv_text(contents["rows"])
    table = _body(contents)
    # files of the first version hold names as they are, and do not say this
    table["escaped"] = True
    body = encoded(table)
    body["digest"] = digest(body, rows)
    about = json.dumps(body, allow_nan=False)
    return f"# {unseparated(about)}\n{rows}"


def _encoded_whole(contents: Contents) -> Object:
    """Everything as plain JSON.

    Raises:
        TypeError: for what could not be read again.
    """
    # here, since most runs write no file
    from fisher_lab.results.schema import COMPARISON, checked

    table = _body(contents)
    table["rows"] = _as_tables(contents["rows"])
    body: Object = encoded(table)
    try:
        checked(COMPARISON, _known(decoded(body)))
    except ValueError as error:
        raise TypeError(
            f"Got a comparison that no file can hold ({error}), expected entries of the documented "
            "types; convert them."
        ) from error
    return body


def _csv_text(rows: Sequence[Row]) -> str:
    """The rows with their header."""
    text = io.StringIO()
    columns = [column.name for column in fields(Row)]
    # all but numbers in quotation marks, so that an end of line in a name is no end of a row
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    for row in rows:
        cells = []
        for name in columns:
            value = getattr(row, name)
            cells.append(_cell(value))
        writer.writerow(cells)
    return text.getvalue()


def _body(contents: Contents) -> Object:
    """Everything but the rows."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": contents["settings"],
        "costs": _as_tables(contents["costs"]),
        "quantities": list(contents["quantities"]),
        "covariances": list(contents["covariances"]),
    }


def _as_tables(records: Sequence[Row] | Sequence[Cost]) -> list[Object]:
    return [asdict(record) for record in records]


def _cell(value: str | float | None) -> str | float:
    """A value as it stands in a CSV file."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return plain(value, "a number of a row")
    if not is_writable(value):
        raise ValueError(
            f"Got the name {value!r}, which has half a character, expected text that a CSV file "
            "can hold; rename it or save as .json."
        )
    return escaped(value)


def encoded(value: Any) -> Any:
    """Plain JSON: infinities and NaNs under a key of their own, tables with such a key inside
    another.
    """
    if isinstance(value, Mapping):
        table = {}
        for key, entry in value.items():
            table[str(key)] = encoded(entry)
        # a table of the user's that would be taken for one of ours
        if NUMBER in table or TABLE in table:
            return {TABLE: list(table.items())}
        return table
    if isinstance(value, list | tuple):
        return [encoded(entry) for entry in value]
    # numbers of other libraries, which people write into their own results
    value = plain(value, "a value")
    # which JSON has no words for
    is_word = isinstance(value, float) and not math.isfinite(value)
    if is_word:
        return {NUMBER: str(value)}
    return value


def digest(body: Mapping[str, Any], rows: str = "") -> str:
    """SHA-256 of the contents of a file, whatever its layout.

    Args:
        body: what the JSON holds; its own digest does not count.
        rows: the text of the rows, where they are not in the body.
    """
    counted = dict(body)
    counted.pop("digest", None)
    # the order of the keys and the white space of a file are no contents
    text = json.dumps(counted, sort_keys=True, allow_nan=False)
    whole = f"{text}\n{rows}"
    hashed = hashlib.sha256(whole.encode())
    return hashed.hexdigest()


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
        raise unreadable(path, error) from error
    try:
        if path.suffix == ".csv":
            return _from_csv(text, check)
        return _from_json(text, check)
    # numbers without end, tables in tables in tables, and quotation marks that never close are no
    # ValueErrors
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is truncated or foreign ({error}), {CURE}.") from error


def unreadable(path: Path, error: Exception) -> ValueError:
    """What is raised for a file that is not there, closed, or no text."""
    return ValueError(f"{path} cannot be read ({error}), {CURE}.")


def _from_json(text: str, check: bool) -> Contents:
    body = json.loads(text)
    table = _checked(body, "", check)
    return _contents(table)


def _from_csv(text: str, check: bool) -> Contents:
    """The contents of a first line of JSON with the rows below it."""
    first, _, rows = text.partition("\n")
    body = json.loads(first.removeprefix("# "))
    table = _checked(body, rows, check)
    are_escaped = bool(table.get("escaped"))
    table["rows"] = _csv_rows(rows, are_escaped)
    return _contents(table)


def _csv_rows(text: str, are_escaped: bool) -> list[Object]:
    """The rows of a CSV file."""
    reader = csv.DictReader(io.StringIO(text))
    rows = []
    for cells in reader:
        row: Object = {}
        for name, cell in cells.items():
            row[name] = _of_cell(name, cell, are_escaped)
        rows.append(row)
    return rows


def _of_cell(name: str, cell: str | None, is_escaped: bool) -> str | float | None:
    """The value that a cell of a CSV file stands for; the inverse of `_cell`."""
    if name in TEXTS:
        if name == "precision" and not cell:
            return None
        return unescaped(cell) if is_escaped and cell else cell
    if not cell:
        return None
    return float(cell)


def _checked(body: Any, rows: str, check: bool) -> Object:
    """The table that a file holds.

    Raises:
        ValueError: if it is of a format that is not known, or its digest is another.
    """
    version = _version(body)
    has_digest = version > 1
    if check and has_digest and body.get("digest") != digest(body, rows):
        raise ValueError(
            "its contents are not those that were written; load_comparison(path, check=False) "
            "reads edited files"
        )
    table = decoded(body, version)
    return _table(table)


def _version(body: Any) -> int:
    if not isinstance(body, dict):
        raise TypeError("not a comparison")
    if body.get("format") != FORMAT:
        raise ValueError("not a comparison")
    version = body.get("version")
    # True is a whole number to Python
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"format version {version!r}")
    if version < 1:
        raise ValueError(f"format version {version!r}")
    if version > VERSION:
        raise ValueError(f"written by a newer fisher_lab, format {version}")
    return version


def decoded(value: Any, version: int = VERSION) -> Any:
    """The inverse of `encoded`, of a file of that version."""
    if isinstance(value, list):
        return [decoded(entry, version) for entry in value]
    if isinstance(value, dict):
        return _decoded_table(value, version)
    if version == 1 and isinstance(value, str):
        return _decoded_text(value)
    return value


def _decoded_table(value: Object, version: int) -> Any:
    """A table, or the number that it stands for."""
    keys = set(value)
    entries = value.items()
    if version > 1 and keys == {NUMBER}:
        return float(value[NUMBER])
    if version > 1 and keys == {TABLE}:
        entries = value[TABLE]
    found = {}
    for key, entry in entries:
        found[key] = decoded(entry, version)
    return found


def _decoded_text(value: str) -> str | float:
    """A text of version 1, which may stand for a number."""
    # a text of the user's that began so itself
    if value.startswith("float:text:"):
        return value.removeprefix("float:text:")
    number = value.removeprefix("float:")
    if number == value:
        return value
    try:
        return float(number)
    except ValueError:
        return value  # a note that somebody wrote, which the first version did not mark


# -- what a file holds, checked: whoever wrote it --------------------------------------------------
def _contents(body: Object) -> Contents:
    """The arguments of a Comparison."""
    # here, since most runs read no file
    from fisher_lab.results.schema import COMPARISON, checked

    table = checked(COMPARISON, _known(body))
    rows = [Row(**row) for row in table["rows"]]
    costs = [Cost(**cost) for cost in table["costs"]]
    return {
        "rows": tuple(rows),
        "costs": tuple(costs),
        "settings": Settings(body["settings"] | table["settings"]),
        "quantities": tuple(table["quantities"]),
        "covariances": tuple(table.get("covariances", ())),
    }


def _known(body: Object) -> Object:
    """The body without settings that are nobody's but the writer's, under whatever names."""
    settings = body.get("settings")
    if not isinstance(settings, dict):
        return body
    known = {}
    for name in Settings.__annotations__:
        if name in settings:
            known[name] = settings[name]
    return body | {"settings": known}


def _table(value: Any) -> Object:
    if not isinstance(value, dict):
        raise TypeError("no table where one belongs")
    return value
