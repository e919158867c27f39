"""What the figures read from results: rows by attribute, and the scale on which an error is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.text import printable
from fisher_lab.errors.measures import MEASURES, exact_value

ALL = "(all)"
SPREAD = 30  # a ratio of largest to smallest error above which a log axis reads better


def plain(text: str) -> str:
    """A text of the results as it is to be drawn: in one line, and its dollar signs are no
    formulas.
    """
    line = re.sub(r"[\t\n]", " ", printable(text))
    if line.startswith("_"):
        line = f" {line}"  # matplotlib leaves labels that begin with this out of its legends
    return line.replace("$", r"\$")


def title_of(error: str, damping: float | None = None) -> str:
    """The error's name and formula, for an axis."""
    title = plain(error)
    if damping is not None:
        title = f"{title} at damping {damping:g} tr F / d"
    if error in MEASURES and MEASURES[error].symbol:
        title = f"{title}\n{MEASURES[error].symbol}"
    return title


def pick(comparison: Any, error: str, damping: float | None = None) -> dict[tuple[str, str], Any]:
    """The rows of one error by (layer, approximation).

    Raises:
        ValueError: if it was not measured, or a damping has to be chosen first.
    """
    if not hasattr(comparison, "rows"):
        raise TypeError(
            f"Got {comparison!r}, expected a Comparison; read a file with fl.load_comparison."
        )
    rows = [row for row in comparison.rows if row.error == error]
    if not rows:
        measured = ", ".join(dict.fromkeys(row.error for row in comparison.rows)) or "nothing"
        raise ValueError(
            f"The comparison holds no error {error!r}, expected one of those measured: {measured}."
        )
    found = {(row.layer, row.approximation): row for row in rows if row.damping == damping}
    if not found:
        known = (
            ", ".join(f"{d:g}" for d in dict.fromkeys(row.damping for row in rows) if d is not None)
            or "no damping"
        )
        raise ValueError(
            f"The comparison holds no {error} for damping={damping}, expected damping= one of "
            f"{known}."
        )
    return found


def layers_of(rows: Iterable[Any]) -> list[str]:
    """Layer names in order, "(all)" last."""
    names = list(dict.fromkeys(row.layer for row in rows))
    return [name for name in names if name != ALL] + [name for name in names if name == ALL]


def layer_title(comparison: Any, layer: str, separator: str = "\n") -> str:
    """The layer's name and shape."""
    if layer == ALL:
        return "all layers"
    title = plain(layer) or "(model)"
    about = comparison.settings.get("layers", {}).get(layer, {})
    shape = about.get("shape")
    if shape:
        title = f"{title}{separator}{shape[0]}x{shape[1]}"
    return title


def about(comparison: Any) -> str:
    """One line that says what was measured."""
    settings = comparison.settings
    name = str(
        (settings.get("problem") or {}).get("name") or settings.get("model") or ""
    ).rpartition("/")[2]
    if len(name) > 40:  # a wider title leaves no room for the axes
        name = f"…{name[-39:]}"
    parts = [name]
    if "fisher" in settings:
        parts.append(f"{settings['fisher']} Fisher")
    if "N" in settings:
        parts.append(f"N = {settings['N']}")
    return plain(", ".join(part for part in parts if part))


def chosen_layers(rows: Iterable[Any], layers: Sequence[str] | None) -> list[str]:
    """The layers to draw.

    Raises:
        ValueError: for names that were not measured.
    """
    known = layers_of(rows)
    chosen = known if layers is None else names_of("layers", layers)
    for name in chosen:
        if name not in known:
            raise ValueError(f"Got layer {name!r}, expected one of {', '.join(map(repr, known))}.")
    return chosen


@dataclass(frozen=True)
class Scale:
    """How the values of one error are placed on an axis.

    Attributes:
        log: whether the axis is logarithmic; zeros are then drawn at `floor`.
        exact: the value of the exact block; None where the measure says none.
        floor: where a log axis draws zero.
        low: where a log axis begins.
        high: where a log axis ends.
        top: where any axis draws infinity.
        infinite: whether there is an infinite value.
    """

    log: bool
    exact: float | None
    floor: float
    low: float
    high: float
    top: float
    infinite: bool

    @classmethod
    def of(cls, error: str, values: Iterable[float]) -> Scale:
        """The scale that suits these values."""
        values = [v for v in values if not math.isnan(v)]
        finite = [v for v in values if math.isfinite(v)]
        positive = [v for v in finite if v > 0]
        exact = exact_value(error)
        if exact is None:
            # where nothing says what a zero means, it is drawn as one
            suits = bool(positive) and min(finite) > 0
        else:
            suits = exact == 0 and bool(positive) and min(finite) >= 0
        log = suits and max(positive) / min(positive) > SPREAD
        floor = 10 ** math.floor(math.log10(min(positive)) - 0.3) if log and 0 in finite else 0.0
        low = (floor or min(positive)) / 1.6 if log else 0.0
        top = (max(finite, default=1.0) or 1.0) * (10 if log else 1.3)
        infinite = len(finite) < len(values)
        high = 1.6 * (top if infinite else max(positive)) if log else 0.0
        return cls(log, exact, floor, low, high, top, infinite)

    def place(self, value: float) -> float:
        """Where the value is drawn."""
        if math.isinf(value):
            return self.top
        return self.floor if self.log and value <= 0 else value

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
        for value, word in (
            (self.base, "exact"),
            (self.top if self.infinite else None, "infinite"),
        ):
            if value is None:
                continue
            axes.axhline(
                value,
                color="black",
                linewidth=1.0,
                linestyle=(0, (5, 3)),
                zorder=1.5,
                label=f"_{word}",
            )
            axes.annotate(
                word, (1.0, value), (3, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8
            )  # fmt: skip


def whisker(row: Any, scale: Scale) -> tuple[float, float]:
    """The lengths down and up of one standard error where the row has one, otherwise 0."""
    error = getattr(row, "stderr", None)
    if not error or not math.isfinite(error) or not math.isfinite(row.value):
        return 0.0, 0.0
    middle = scale.place(row.value)
    down = min(error, middle - scale.place(0.0)) if scale.log and scale.floor else error
    return (min(down, 0.999 * middle) if scale.log else down), error
