"""What the figures read from a comparison: rows by layer and approximation, names and titles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.text import printable
from fisher_lab.errors.measures import MEASURES
from fisher_lab.results import ALL, Comparison, Row

Cells = dict[tuple[str, str], Row]  # (layer, approximation) -> the row of one error
LONGEST_NAME = 40  # characters of a problem's name; a wider title leaves no room for the axes


# -- texts -----------------------------------------------------------------------------------------
def plain(text: str) -> str:
    """A text of the results as it is to be drawn: one line, in which dollar signs are no formulas."""
    line = re.sub(r"[\t\n]", " ", printable(text))
    # matplotlib leaves labels that begin with an underscore out of its legends
    if line.startswith("_"):
        line = f" {line}"
    return line.replace("$", r"\$")


def title_of(error: str, damping: float | None = None) -> str:
    """The error's name and formula, for an axis."""
    title = plain(error)
    if damping is not None:
        title = f"{title} at damping {damping:g} tr F / d"
    measure = MEASURES.get(error)
    if measure is not None and measure.symbol:
        title = f"{title}\n{measure.symbol}"
    return title


def layer_title(comparison: Comparison, layer: str, separator: str = "\n") -> str:
    """The layer's name and shape."""
    if layer == ALL:
        return "all layers"
    title = plain(layer) or "(model)"
    shape = comparison.settings.about(layer).shape
    if shape:
        title = f"{title}{separator}{shape[0]}x{shape[1]}"
    return title


def layer_titles(comparison: Comparison, layers: Iterable[str], separator: str = "\n") -> list[str]:
    """The names and shapes of several layers."""
    return [layer_title(comparison, layer, separator) for layer in layers]


def about(comparison: Comparison) -> str:
    """One line that says what was measured."""
    settings = comparison.settings
    # of a path, the file; of a class, all of it
    name = str(settings.problem_name or settings.model or "").rpartition("/")[2]
    if len(name) > LONGEST_NAME:
        name = "…" + name[1 - LONGEST_NAME :]
    parts = [name] if name else []
    if "fisher" in settings:
        parts.append(f"{settings.fisher} Fisher")
    if "N" in settings:
        parts.append(f"N = {settings.N}")
    return plain(", ".join(parts))


# -- rows ------------------------------------------------------------------------------------------
def checked(comparison: Comparison) -> Comparison:
    """The comparison itself.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(
            f"Got {type(comparison).__name__}, expected a Comparison; compare gives one, "
            "fl.load_comparison reads one from a file."
        )
    return comparison


def pick(comparison: Comparison, error: str, damping: float | None = None) -> Cells:
    """The rows of one error by (layer, approximation).

    Raises:
        TypeError: for anything but a comparison.
        ValueError: if it was not measured, or a damping has to be chosen first.
    """
    rows = [row for row in checked(comparison).rows if row.error == error]
    if not rows:
        measured = ", ".join(comparison.errors) or "nothing"
        raise ValueError(
            f"The comparison holds no error {error!r}, expected one of those measured: {measured}."
        )
    found: Cells = {}
    for row in rows:
        if row.damping == damping:
            found[row.layer, row.approximation] = row
    if not found:
        dampings = [f"{row.damping:g}" for row in rows if row.damping is not None]
        known = ", ".join(dict.fromkeys(dampings)) or "no damping"
        raise ValueError(
            f"The comparison holds no {error} for damping={damping}, expected damping= one of "
            f"{known}."
        )
    return found


def layers_of(rows: Iterable[Row]) -> list[str]:
    """Layer names in order, "(all)" last."""
    names = list(dict.fromkeys(row.layer for row in rows))
    if ALL in names:
        names.remove(ALL)
        names.append(ALL)
    return names


def labels_of(rows: Iterable[Row]) -> list[str]:
    """Labels of the approximations in order."""
    return list(dict.fromkeys(row.approximation for row in rows))


def errors_of(rows: Iterable[Row]) -> list[str]:
    """Names of the errors in order."""
    return list(dict.fromkeys(row.error for row in rows))


def values_at(rows: Iterable[Row], layers: Sequence[str]) -> list[float]:
    """The values at some of the layers."""
    return [row.value for row in rows if row.layer in layers]


def chosen_layers(rows: Iterable[Row], layers: Sequence[str] | None) -> list[str]:
    """The layers to draw.

    Raises:
        ValueError: for names that were not measured.
    """
    known = layers_of(rows)
    if layers is None:
        return known
    chosen = names_of("layers", layers)
    for name in chosen:
        check_layer(name, known)
    return chosen


def check_layer(name: str, known: Sequence[str]) -> None:
    """Refuse a layer that was not measured.

    Raises:
        ValueError: which says the known ones.
    """
    if name not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"Got layer {name!r}, expected one of {listed}.")
