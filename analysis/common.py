"""What every study shares: checkpoints of a problem, results on disk, tables for the pages.

A study measures (`compare`), saves the rows it shows, and draws from the saved rows; nothing is
measured in a figure.
"""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch

import fisher_lab as fl
from fisher_lab import problems
from fisher_lab.results import Comparison, Row

DOCS = Path(__file__).resolve().parent.parent / "docs" / "studies"
SEED = 0
SMALL = ("2", "4", "6", "8", "10")  # layers of martens_grosse whose blocks are at most 420 x 420


class Study:
    """Name, clock and files of one study.

    Args:
        name: of its page and files.
    """

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.perf_counter()
        self.comparisons: dict[str, Comparison] = {}
        self.numbers: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    def compare(self, key: int | str, problem: Any, *args: Any, **kwargs: Any) -> Comparison:
        """Compare on a problem and keep the rows under `key`."""
        kwargs = {
            "fisher": problem.fisher,
            "progress": False,
            "seed": SEED,
            "problem": problem.settings,
        } | kwargs
        found = fl.compare(problem.model, problem.likelihood, problem.data, *args, **kwargs)
        self.comparisons[str(key)] = found
        return found

    def save(self) -> None:
        """Write the rows and numbers with seed, time and versions, rounded to what can be
        reproduced.
        """
        rows = [
            [key, r.layer, r.approximation, r.error, r.damping, float(f"{r.value:.6g}")]
            for key, comparison in self.comparisons.items()
            for r in comparison.rows
        ]
        first = next(iter(self.comparisons.values()), None)
        settings = dict(first.settings) if first else {}
        kept = {
            k: settings[k]
            for k in ("problem", "fisher", "likelihood", "N", "parameters", "layers")
            if k in settings
        }
        for about in kept.get("layers", {}).values():
            about.pop("seconds", None)
        versions = {
            "fisher-lab": fl.__version__,
            "torch": torch.__version__,
            "matplotlib": matplotlib.__version__,
        }
        body = {
            "study": self.name,
            "command": f"python -m analysis.{self.name}",
            "seed": SEED,
            "seconds": round(time.perf_counter() - self.started, 1),
            "date": datetime.now(UTC).isoformat("T", "seconds"),
            "versions": versions | {"python": platform.python_version()},
            "machine": platform.machine(),
            "settings": self.settings | kept,
            "numbers": self.numbers,
        }
        head = json.dumps(body, indent=1)[:-2]
        lines = ",\n".join(json.dumps(row) for row in rows)
        write(DOCS / "results" / f"{self.name}.json", f'{head},\n "rows": [\n{lines}\n]\n}}\n')

    def draw(self, figure: Any, name: str = "") -> None:
        """Save a figure of this study."""
        fl.plots.save(figure, DOCS / "figures" / f"{self.name}{'-' if name else ''}{name}.png")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], name: str = "") -> None:
        """Write a table that the page includes."""
        lines = [
            "| " + " | ".join(map(cell, row)) + " |" for row in [head, ["---"] * len(head), *rows]
        ]
        body = json.loads((DOCS / "results" / f"{self.name}.json").read_text(encoding="utf-8"))
        stamp = (
            f"`{body['command']}`: seed {body['seed']}, {body['seconds']} s, {body['date'][:10]}, "
            + ", ".join(f"{k} {v}" for k, v in body["versions"].items())
        )
        path = DOCS / "results" / f"{self.name}{'-' if name else ''}{name}.md"
        write(path, "\n".join(lines) + f"\n\n{stamp}\n")


def load(name: str) -> dict[str, Comparison]:
    """The saved rows of a study, as Comparisons by their keys."""
    body = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    found: dict[str, list[Row]] = {}
    for key, layer, approximation, error, damping, value in body["rows"]:
        found.setdefault(key, []).append(Row(layer, approximation, error, value, 0.0, damping))
    return {key: Comparison(tuple(rows), (), body["settings"]) for key, rows in found.items()}


def along(name: str) -> dict[int, Comparison]:
    """The saved rows of a study along training, by step."""
    return {int(key): comparison for key, comparison in load(name).items() if key.isdigit()}


def numbers(name: str) -> dict[str, Any]:
    """The saved numbers of a study."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["numbers"]


def checkpoint(name: str, steps: int, **settings: Any) -> Any:
    """A problem after so many steps of training; the same seed gives the same path."""
    return problems.load(name, steps=steps, seed=SEED, **settings)


def values(
    comparisons: Mapping[Any, Comparison], layer: str, error: str, damping: float | None = None
) -> list[list[Any]]:
    """Table rows: an approximation and its value at every key."""
    labels = next(iter(comparisons.values())).approximations
    return [
        [label, *(c.value(layer, label, error, damping) for c in comparisons.values())]
        for label in labels
    ]


def cell(value: Any) -> str:
    """A number for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    """Write a text file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
