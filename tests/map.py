"""Which tests hold which module: `python -m tests.map` runs the tests with coverage and writes
tests/README.md.

A module is held by the few test files that together run most of its lines, found greedily: the file
that runs most of them first, then the one that adds most to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fisher_lab"
PAGE = ROOT / "tests" / "README.md"
MOST_FILES = 4  # test files named for one module
SMALLEST_GAIN = 0.03  # share of a module's tested lines that a further test file must add

HEAD = """# Where is it tested?

Written by `python -m tests.map`, which runs the tests with coverage (about ten minutes) and names, for each module, the
test files that together run most of its lines. `tests/docs/test_map.py` checks that every module and every test file
named here exists. Theorems are listed in [docs/theorems.md](../docs/theorems.md) with the tests that prove them.

| folder | what it holds |
| --- | --- |
| `contracts/` | what every registered matrix, approximation, layer and likelihood owes, found in the registries |
| `theorems/` | P1 to P29, and the counterexamples X1 to X12 |
| `peers/` | the same numbers from other libraries |
| `traps/`, `property/` | refusals of what would be silently wrong; random architectures |
| `naive.py`, `layers/oracle.py` | naive twins: the formulas of the papers, written as slowly and plainly as possible |

| module | tests |
| --- | --- |
"""


def run_tests(data_file: Path) -> None:
    """All tests but the slow ones, each line that runs noted with the test that ran it."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", "not slow",
        f"--cov={PACKAGE.name}", "--cov-context=test", "--cov-report=",
    ]  # fmt: skip
    subprocess.run(
        command, cwd=ROOT, check=True, env={**os.environ, "COVERAGE_FILE": str(data_file)}
    )


@dataclass
class Held:
    """What one test file runs of a module: its lines, and by how many tests."""

    lines: set[int] = field(default_factory=set)
    tests: set[str] = field(default_factory=set)


def held_by_test_file(data_file: Path) -> dict[str, dict[str, Held]]:
    """For each module what each test file runs; lines that run on import belong to nobody."""
    from coverage import CoverageData

    data = CoverageData(basename=str(data_file))
    data.read()
    found: dict[str, dict[str, Held]] = {}
    for measured in data.measured_files():
        module = str(Path(measured).resolve().relative_to(ROOT))
        by_file: dict[str, Held] = defaultdict(Held)
        for line, contexts in data.contexts_by_lineno(measured).items():
            for context in contexts:
                if context:
                    held = by_file[context.split("::")[0]]
                    held.lines.add(line)
                    held.tests.add(context)
        found[module] = by_file
    return found


def holders(by_file: dict[str, Held]) -> list[str]:
    """The few test files that together run most of a module's tested lines.

    Of two that add as much, the one with more tests of the module comes first.
    """
    everything: set[int] = set()
    for held in by_file.values():
        everything |= held.lines
    chosen: list[str] = []
    covered: set[int] = set()

    def worth(name: str) -> tuple[int, int]:
        return len(by_file[name].lines - covered), len(by_file[name].tests)

    while len(chosen) < MOST_FILES and covered != everything:
        best = max(sorted(by_file), key=worth)
        gain, _ = worth(best)
        if chosen and gain < SMALLEST_GAIN * len(everything):
            break
        chosen.append(best)
        covered |= by_file[best].lines
    return chosen


def modules() -> list[str]:
    """Every file of the package that holds more than names."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            found.append(str(path.relative_to(ROOT)))
    return found


def page(held: dict[str, dict[str, Held]]) -> str:
    """The page as Markdown."""
    rows = []
    for module in modules():
        tests = ", ".join(f"`{name}`" for name in holders(held.get(module, {})))
        rows.append(
            f"| `{module}` | {tests or 'none: it runs on import, or in processes of its own'} |\n"
        )
    return HEAD + "".join(rows)


def main() -> None:
    """Run the tests and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        data_file = Path(folder) / "coverage"
        run_tests(data_file)
        PAGE.write_text(page(held_by_test_file(data_file)), encoding="utf-8")


if __name__ == "__main__":
    main()
