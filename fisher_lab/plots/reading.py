"""What the figures read from a comparison: rows by layer and approximation, names and titles."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from fisher_lab._ground.arguments import check_kind, names_of, number
from fisher_lab._ground.text import did_you_mean, printable
from fisher_lab.errors.measures import MEASURES, judging
from fisher_lab.results import ALL, Comparison, Row

Cells = dict[tuple[str, str], Row]  # (layer, approximation) -> the row of one error
SAME = 1e-9  # a relative difference of two errors that is rounding
LONGEST = 40  # characters of a name; wider ones leave no room for the axes


# -- texts -----------------------------------------------------------------------------------------
def plain(text: str) -> str:
    """A text of the results as it is to be drawn: one line, in which dollar signs are no
    formulas.
    """
    line = re.sub(r"[\t\n]", " ", printable(text))
    # matplotlib leaves labels that begin with an underscore out of its legends
    if line.startswith("_"):
        line = f" {line}"
    return line.replace("$", r"\$")


def name_of(text: str) -> str:
    """A name for a legend or a tick: a long one loses its middle, for its ends tell more."""
    name = plain(text) or "(no name)"
    if len(name) > LONGEST:
        half = LONGEST // 2
        name = f"{name[:half]}…{name[1 - half :]}"
        # a backslash in front of the dots would be none of its own
        name = name.replace("\\…", "…")
    return name


def title_of(error: str, damping: float | None = None) -> str:
    """The error's name and formula, for an axis."""
    title = name_of(error)
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
    title = name_of(layer or "(model)")
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
    if len(name) > LONGEST:
        name = "…" + name[1 - LONGEST :]
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
    check_kind("error", error, str, "the name of a measure")
    if damping is not None and math.isnan(number(damping)):
        raise TypeError(
            f"Got damping of type {type(damping).__name__}, expected a number that was measured."
        )
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


def errors_of(rows: Iterable[Row]) -> list[str]:
    """Names of the errors in order."""
    return list(dict.fromkeys(row.error for row in rows))


def values_at(rows: Iterable[Row], layers: Sequence[str]) -> list[float]:
    """The values at some of the layers."""
    return [row.value for row in rows if row.layer in layers]


# -- what is drawn ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shown:
    """What a figure shows.

    Attributes:
        layers: their names, "(all)" last.
        names: of the approximations, by label; those that are the same as another one that is
            shown stand in its name and have none of their own.
    """

    layers: list[str]
    names: dict[str, str]

    @property
    def labels(self) -> list[str]:
        """Labels of the approximations that are drawn."""
        return list(self.names)


@dataclass(frozen=True)
class OneError:
    """One error of a comparison, as a figure shows it.

    Attributes:
        rows: by (layer, approximation).
        shown: the layers and approximations.
        values: at these layers, of these approximations.
    """

    rows: Cells
    shown: Shown
    values: list[float]


def one_error(
    comparison: Comparison,
    error: str,
    damping: float | None,
    layers: Sequence[str] | None,
    approximations: Sequence[str] | None,
) -> OneError:
    """What is asked for of one error.

    Args:
        comparison: where it was measured.
        error: its name.
        damping: of a damped error.
        layers: names of layers; None for all.
        approximations: labels; None for all.

    Raises:
        TypeError: for anything but a comparison.
        ValueError: for an error, damping, layer or approximation that was not measured.
    """
    rows = pick(comparison, error, damping)
    found = shown([comparison], rows.values(), layers, approximations)
    drawn = [row for row in rows.values() if row.approximation in found.names]
    return OneError(rows, found, values_at(drawn, found.layers))


def shown(
    comparisons: Sequence[Comparison],
    rows: Iterable[Row],
    layers: Sequence[str] | None,
    approximations: Sequence[str] | None,
) -> Shown:
    """What is asked for of what was measured; None asks for all.

    Args:
        comparisons: where the rows come from.
        rows: that can be drawn.
        layers: names of layers.
        approximations: labels of approximations.

    Raises:
        ValueError: for names that were not measured.
    """
    rows = list(rows)
    chosen = _chosen("layer", "layers", layers, layers_of(rows))
    labels = chosen_labels(rows, approximations)
    names = {}
    for first, others in alike(comparisons, labels, chosen).items():
        names[first] = name_of(" = ".join([first, *others]))
    return Shown(chosen, names)


def chosen_labels(rows: Iterable[Row], approximations: Sequence[str] | None) -> list[str]:
    """The labels of the approximations asked for, in order.

    Raises:
        ValueError: for labels that were not measured.
    """
    known = list(dict.fromkeys(row.approximation for row in rows))
    return _chosen("approximation", "approximations", approximations, known)


def _chosen(
    what: str, argument: str, wanted: Sequence[str] | None, known: Sequence[str]
) -> list[str]:
    """The names asked for, each once."""
    if wanted is None:
        return list(known)
    found = names_of(argument, wanted)
    for name in found:
        check_kind(argument, name, str, "names")
    names = list(dict.fromkeys(found))
    for name in names:
        check_known(what, name, known)
    if not names:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"Got {argument}=[], expected None for all, or some of {listed}.")
    return names


def check_known(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that was not measured.

    Raises:
        ValueError: which says the known ones.
    """
    if name not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(
            f"Got {what} {name!r}{did_you_mean(str(name), known)}, expected one of {listed}."
        )


def alike(
    comparisons: Sequence[Comparison], labels: Sequence[str], layers: Sequence[str]
) -> dict[str, list[str]]:
    """Approximations that are one matrix on these layers, as TN and TKFAC are on linear ones.

    Every error that was measured must agree, and one of them look at the whole matrix: methods that
    only keep the same trace are not the same.

    Returns:
        Those to draw, each with the others that are the same.
    """
    tables: dict[str, dict[Hashable, Row]] = {label: {} for label in labels}
    whole_matrix_judged = False
    for index, comparison in enumerate(comparisons):
        for row in comparison.rows:
            if row.approximation in tables and row.layer in layers:
                key = (index, row.layer, row.error, row.damping)
                tables[row.approximation][key] = row
        whole_matrix_judged |= bool(judging("matrix", comparison.errors))
    groups: dict[str, list[str]] = {}
    for label in labels:
        twin = None
        if whole_matrix_judged:
            twin = next((first for first in groups if _agree(tables[first], tables[label])), None)
        if twin is None:
            groups[label] = []
        else:
            groups[twin].append(label)
    return groups


def _agree(one: dict[Hashable, Row], two: dict[Hashable, Row]) -> bool:
    """Whether all errors of two approximations are the same up to their noise."""
    if one.keys() != two.keys():
        return False
    for key, row in one.items():
        other = two[key]
        difference = abs(row.value - other.value)
        size = min(abs(row.value), abs(other.value))
        noise = max(row.noise + other.noise, SAME * size)
        # which NaN and infinity are not: they say nothing of the matrices
        if not difference <= noise:
            return False
    return True
