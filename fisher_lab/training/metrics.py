"""Files of metrics: JSON lines, one per epoch, each with a digest of itself and of those before it.

A line that was changed, lost or moved is told from what was written; that lines at the end are
missing is not, since every run begins with fewer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_lab._ground.arguments import check_kind, path_of
from fisher_lab._ground.files import append, write_atomically
from fisher_lab.results.codec import digest

Record = dict[str, Any]
DIGEST = "digest"
CURE = "expected a .jsonl file of metrics that a training wrote"


class Metrics:
    """A file that grows by one line per epoch.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = ""  # the digest of the last line

    def write(self, records: Sequence[Record]) -> None:
        """Begin anew with some records."""
        self._last = ""
        lines = map(self._line, records)
        write_atomically(self.path, "".join(lines))

    def add(self, record: Record) -> None:
        """One more."""
        append(self.path, self._line(record))

    def _line(self, record: Record) -> str:
        self._last = digest(_plain(record), self._last)
        return json.dumps({**record, DIGEST: self._last}) + "\n"


def _plain(record: Record) -> Record:
    """The record as it is read again."""
    # numbers that JSON has no words for (a test loss of NaN) are read as they are written
    return {"record": json.dumps(record, sort_keys=True)}


def load_metrics(path: str | Path, check: bool = True) -> list[Record]:
    """Read the metrics that `fit` or `fisher-lab train` wrote.

    Args:
        path: of the file.
        check: whether its lines must be those that were written; False for a file that was edited
            by hand or written by an earlier version.

    Returns:
        One record per epoch, as `fit` returns them.

    Raises:
        ValueError: if the file is missing, damaged, or holds something else.
        TypeError: for what is no path.

    Example:
        >>> opt = fl.optim.KFAC(model, loss)
        >>> written = {"metrics": "run.jsonl", "progress": False}
        >>> records = fl.training.fit(model, opt, loss, (x, y), epochs=2, **written)
        >>> fl.training.load_metrics("run.jsonl") == records
        True
    """
    from fisher_lab.results.schema import RECORDS, checked

    path = path_of("path", path)
    check_kind("check", check, bool, "True or False")
    try:
        text = path.read_bytes().decode("utf-8")
        if check and not text.endswith("\n"):
            raise ValueError("its last line has no end")
        records = checked(RECORDS, list(map(json.loads, text.splitlines())))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as metrics ({error}), {CURE}.") from error
    last = ""
    found: list[Record] = []
    for number, entry in enumerate(records, 1):
        record: Record = dict(entry)
        written = record.pop(DIGEST, None)
        last = digest(_plain(record), last)
        if check and written != last:
            raise ValueError(
                f"Line {number} of {path} is not what was written, {CURE}; "
                "load_metrics(path, check=False) reads edited files."
            )
        found.append(record)
    return found
