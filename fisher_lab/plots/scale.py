"""The scale on which the values of one error are drawn: linear or logarithmic, with what
is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.axes import Axes

from fisher_lab.errors.measures import exact_value
from fisher_lab.results import Row

SPREAD = 30  # a ratio of largest to smallest error above which a log axis reads better
LARGEST = 1e100  # of what is drawn as a number: axes overflow long before numbers do
LEAST = 1e-300  # of what a log axis can show
DASHES = (0, (5, 3))


def drawable(value: float) -> bool:
    """Whether the value has a place on an axis; what is larger than LARGEST is as good as
    infinite.
    """
    return abs(value) <= LARGEST


@dataclass(frozen=True)
class Scale:
    """How the values of one error are placed on an axis.

    Attributes:
        log: whether the axis is logarithmic; zeros are then drawn at `floor`.
        exact: the value of the exact block; None where the measure says none.
        floor: where a log axis draws zero.
        low: where a log axis begins.
        high: where a log axis ends.
        top: where any axis draws infinity; and with the other sign, minus infinity.
        infinite: whether there is an infinite value.
        minus_infinite: whether there is one below zero.
    """

    log: bool
    exact: float | None
    floor: float
    low: float
    high: float
    top: float
    infinite: bool
    minus_infinite: bool

    @classmethod
    def of(cls, error: str, values: Iterable[float]) -> Scale:
        """The scale that suits these values."""
        values = [value for value in values if not math.isnan(value)]
        finite = [value for value in values if drawable(value)]
        infinite = any(value > LARGEST for value in values)
        minus_infinite = any(value < -LARGEST for value in values)
        exact = exact_value(error)
        largest = max(finite, default=1.0) or 1.0
        if minus_infinite or not _suits_log(finite, exact):
            top = 1.3 * largest
            if minus_infinite:
                # so that the mirrored place lies below every value
                top = 1.3 * (max(map(abs, finite), default=1.0) or 1.0)
            return cls(False, exact, 0.0, 0.0, 0.0, top, infinite, minus_infinite)
        least = min(value for value in finite if value > 0)
        floor = 0.0
        if 0 in finite:
            # a power of ten clearly below the smallest error, so that zeros stand apart
            exponent = math.floor(math.log10(least) - 0.3)
            floor = max(10.0**exponent, LEAST)
        low = (floor or least) / 1.6
        top = largest * 10
        highest = top if infinite else largest
        return cls(True, exact, floor, low, 1.6 * highest, top, infinite, False)

    def place(self, value: float) -> float:
        """Where the value is drawn."""
        if value > LARGEST:
            return self.top
        if value < -LARGEST:
            return -self.top
        if self.log and value <= 0:
            return self.floor
        return value

    @property
    def base(self) -> float | None:
        """Where a line that says "exact" is drawn; None if the axis cannot show it."""
        if self.log:
            return self.floor or None
        return self.exact

    def apply(self, axes: Axes) -> None:
        """Set the vertical axis and draw the line that says what is exact."""
        if self.log:
            axes.set_yscale("log")
            axes.set_ylim(self.low, self.high)
        if self.base is not None:
            _named_line(axes, self.base, "exact")
        if self.infinite:
            _named_line(axes, self.top, "infinite")
        if self.minus_infinite:
            _named_line(axes, -self.top, "−infinite")

    def whisker(self, row: Row) -> tuple[float, float]:
        """The lengths down and up of one standard error where the row has one, otherwise 0."""
        error = row.stderr
        if not error:
            return 0.0, 0.0
        if not (drawable(error) and drawable(row.value)):
            return 0.0, 0.0
        down = error
        if self.log:
            middle = self.place(row.value)
            # not below the line of zero, and never down to zero itself, which has no logarithm
            if self.floor:
                down = min(down, middle - self.floor)
            down = min(down, 0.999 * middle)
        return down, error


class Series:
    """Rows on their way into a figure: where each stands across, and how high.

    Args:
        scale: that places the values.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.x: list[float] = []
        self.y: list[float] = []
        self.rows: list[Row] = []

    def add(self, x: float, row: Row) -> None:
        """Put a row in at this place."""
        self.x.append(x)
        self.y.append(self.scale.place(row.value))
        self.rows.append(row)

    def draw_whiskers(self, axes: Axes, color: str, capsize: float) -> None:
        """One standard error up and down at each place, where any row has one."""
        down = []
        up = []
        for row in self.rows:
            below, above = self.scale.whisker(row)
            down.append(below)
            up.append(above)
        if not any(up):
            return
        axes.errorbar(
            self.x,
            self.y,
            [down, up],
            fmt="none",
            ecolor=color,
            elinewidth=0.9,
            capsize=capsize,
        )


def _suits_log(finite: list[float], exact: float | None) -> bool:
    """Whether a log axis can show these values and reads better."""
    positive = [value for value in finite if value > 0]
    if not positive or min(positive) < LEAST:
        return False
    if exact is None:
        # where nothing says what a zero means, it is drawn as one
        shown = min(finite) > 0
    else:
        shown = exact == 0 and min(finite) >= 0
    return shown and max(positive) / min(positive) > SPREAD


def _named_line(axes: Axes, height: float, word: str) -> None:
    """A dashed line across, with a word at its right end."""
    axes.axhline(
        height, color="black", linewidth=1.0, linestyle=DASHES, zorder=1.5, label=f"_{word}"
    )
    end = (1.0, height)
    axes.annotate(
        word, end, (3, 0), ("axes fraction", "data"), "offset points", va="center", fontsize="small"
    )
