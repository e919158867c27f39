"""Progress on stderr for whatever takes longer than a moment."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_EVERY = 30.0  # seconds between two lines where stderr is no terminal
BAR_EVERY = 0.5  # and between two messages that a bar cannot show for nothing


class Progress:
    """What is being done and the time left: a bar where stderr is a terminal, elsewhere (a file, a
    notebook) a line now and then.

    Args:
        enabled: False for nothing at all.
        total: amount of work, in any unit.

    Attributes:
        every: seconds between two messages that are worth some trouble.
    """

    def __init__(self, enabled: bool | None = None, total: float = 1) -> None:
        self.total = total
        self.done = 0.0
        self.unit = 1.0
        self._shown = enabled is not False
        self._terminal = self._shown and sys.stderr.isatty()
        self.every = math.inf
        if self._shown:
            self.every = BAR_EVERY if self._terminal else LINE_EVERY
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._started = self._told = time.perf_counter()

    def __enter__(self) -> Self:
        self._started = self._told = time.perf_counter()
        if self._terminal:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def announce(self, line: str) -> None:
        """A line that stays, unless nothing is shown."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def weigh(self, unit: float) -> None:
        """Steps are so much work from now on."""
        self.unit = unit

    def say(self, what: str) -> None:
        """Show what is being done now."""
        self._what = what
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        self._tell()

    def advance(self, steps: float = 1) -> None:
        """So many steps are done."""
        self.done += steps * self.unit
        if self._bar is not None:
            self._bar.advance(self._task, steps * self.unit)
        self._tell()

    def _tell(self) -> None:
        """A line where there is no bar, if the last one is long ago."""
        if not self._shown or self._terminal:
            return
        now = time.perf_counter()
        if now - self._told < LINE_EVERY:
            return
        self._told = now
        share = min(self.done / self.total, 1.0) if self.total else 0.0
        left = ""
        if share > 0:
            seconds = (now - self._started) * (1 - share) / share
            left = f", {duration(seconds)} left"
        print(f"{share:.0%}{left}  {self._what}", file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds for people, rounded as a guess is: "40 s", "7 min", "2.5 h"."""
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.0f} min"
    if minutes < 90:
        return f"{round(minutes / 5) * 5} min"
    return f"{minutes / 60:.2g} h"
