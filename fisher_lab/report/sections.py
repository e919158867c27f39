"""What the page says: sections, figures along a training, and the meaning of the measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fisher_lab import errors
from fisher_lab._ground.memory import readable
from fisher_lab._passes.labels import described
from fisher_lab.plots.output import Drawing, drawings, training_drawings
from fisher_lab.report.answers import answers
from fisher_lab.results import ALL, Comparison, Cost, Row
from fisher_lab.results.grid import as_text

Column = tuple[str, float | None]  # an error, and the damping if it is a damped one
CAPTIONS = {
    "errors": "{error} of every approximation, layer by layer.",
    "heatmap": "The same as a table in colours.",
    "traces": "Trace of every block (black) and of its approximations.",
    "cost": "Error against what the approximation costs; nothing beats those on the line in both.",
    "damped": "{error} against the damping, which is relative to tr F / d.",
    "training": "{error} along the training.",
}
# The figures that are shown at once, in this order; the others are folded away.
FIRST = ("errors-frobenius", "heatmap-frobenius", "traces", "cost", "damped-cosine")


def section(title: str, comparison: Comparison, identifier: str) -> dict[str, Any]:
    """One comparison as the template reads it.

    Args:
        title: its heading.
        comparison: with at least one row.
        identifier: of its element in the page; those of its figures begin with it.
    """
    columns = _columns(comparison)
    layers = []
    for name in dict.fromkeys(row.layer for row in comparison.rows):
        layers.append({"value": name, "text": _layer(comparison, name)})
    found = []
    for answer in answers(comparison):
        layer = _layer(comparison, answer.layer)
        found.append({"layer": layer, "text": answer.sentence})
    return {
        "title": title,
        "id": identifier,
        "facts": _facts(comparison),
        "recommendation": _recommendation(comparison),
        "answers": found,
        "figures": _figures(comparison, identifier),
        "layers": layers,
        "approximations": comparison.approximations,
        "head": _head(columns),
        "body": _body(comparison, columns),
        "settings": _flat(comparison.settings),
    }


def _recommendation(comparison: Comparison) -> str | None:
    """What to use, as text; None where no efficiency was measured."""
    try:
        found = comparison.recommend()
    except ValueError:
        return None
    return str(found)


def _layer(comparison: Comparison, name: str) -> str:
    """The layer's name and shape."""
    if name == ALL:
        return "all layers"
    shown = name or "(model)"
    shape = comparison.settings.about(name).shape
    if shape:
        shown = f"{shown} ({shape[0]}x{shape[1]})"
    return shown


# -- figures ---------------------------------------------------------------------------------------
def _figures(comparison: Comparison, identifier: str) -> list[dict[str, Any]]:
    found = sorted(drawings(comparison), key=_place)
    figures = []
    for index, drawing in enumerate(found):
        figures.append(_figure(drawing, f"{identifier}-figure{index}"))
    return figures


def _place(drawing: Drawing) -> int:
    """Where among the figures it stands; those that are folded away come last."""
    if drawing.name in FIRST:
        return FIRST.index(drawing.name)
    return len(FIRST)


def _figure(drawing: Drawing, identifier: str) -> dict[str, Any]:
    """A figure as the template reads it; its identifier is a number, for its error may be
    any text.
    """
    error = drawing.error or ""
    capitalized = error[:1].upper() + error[1:]
    caption = CAPTIONS[drawing.kind].format(error=capitalized)
    first = _place(drawing) < len(FIRST)
    return {"id": identifier, "caption": caption, "figure": drawing.figure, "first": first}


def along_training(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Figures against the training step, where the comparisons are one problem at several steps."""
    figures = []
    for index, drawing in enumerate(training_drawings(comparisons)):
        figures.append(_figure(drawing, f"training{index}"))
    return figures


# -- sentences -------------------------------------------------------------------------------------
def _facts(comparison: Comparison) -> list[str]:
    """What was measured, in sentences."""
    settings = comparison.settings
    facts = [_measured(comparison)]
    checked = [row.checked for row in comparison.rows if row.checked is not None]
    if checked:
        facts.append(
            "The exact blocks agree with an independent computation by torch.func along one "
            f"random direction per layer to {max(checked):.1e} (relative)."
        )
    left_out = settings.left_out or {}
    for name, reason in left_out.items():
        facts.append(f"Left out: {name}: {reason}")
    # files of before say nothing: they were whole
    if settings.complete is False:
        facts.append("Not complete: the run was stopped before all layers were measured.")
    return facts


def _measured(comparison: Comparison) -> str:
    """Which model, Fisher, examples and likelihood; a file need not tell any of them."""
    settings = comparison.settings
    model = settings.get("model", "model")
    if "parameters" in settings:
        model = f"{model} with {settings.parameters} parameters"
    examples = f"{settings.get('N', 'some')} examples"
    if settings.problem_name:
        examples = f"{examples} of the problem {settings.problem_name}"
    fisher = described(settings.fisher)
    likelihood = settings.get("likelihood", "not recorded")
    methods = len(comparison.approximations)
    return (
        f"For every layer of a {model}, the block of {fisher} was computed exactly on {examples} "
        f"and compared with {methods} approximations. The likelihood is {likelihood}; the bias is "
        "the last column of the weight."
    )


def notes(comparisons: Iterable[Comparison]) -> list[tuple[str, str]]:
    """The library's measures in the tables, with the first line of their docstrings."""
    found: dict[str, str] = {}
    for comparison in comparisons:
        for name in comparison.errors:
            measure = errors.MEASURES.get(name)
            if measure is None:
                continue
            text = measure.describe()
            if text:
                found[name] = text
    return list(found.items())


# -- tables ----------------------------------------------------------------------------------------
def _columns(comparison: Comparison) -> list[Column]:
    """The errors, the damped ones at each damping."""
    columns: dict[Column, None] = {}
    for row in comparison.rows:
        columns[row.error, row.damping] = None
    return list(columns)


def _head(columns: list[Column]) -> list[str]:
    """Titles of the columns."""
    head = []
    for error, damping in columns:
        head.append(error if damping is None else f"{error} {damping:g}")
    return [*head, "time", "size"]


def _body(comparison: Comparison, columns: list[Column]) -> list[dict[str, Any]]:
    """A line per layer and approximation with the number and text of every cell."""
    found: dict[tuple[str, str], dict[Column, Row]] = {}
    for row in comparison.rows:
        line = found.setdefault((row.layer, row.approximation), {})
        line[row.error, row.damping] = row
    costs = {(cost.layer, cost.approximation): cost for cost in comparison.costs}
    body = []
    for (layer, label), line in found.items():
        cells = [_error_cell(line.get(column)) for column in columns]
        cells += _cost_cells(costs.get((layer, label)))
        body.append(
            {
                "layer": layer,
                "shown": _layer(comparison, layer),
                "approximation": label,
                "cells": cells,
            }
        )
    return body


def _error_cell(row: Row | None) -> dict[str, str]:
    """What is sorted by, and what is shown."""
    if row is None:
        return {"value": "", "text": as_text(None)}
    text = as_text(row.value)
    if math.isnan(row.value):
        return {"value": "", "text": text}
    return {"value": repr(row.value), "text": text}


def _cost_cells(cost: Cost | None) -> list[dict[str, str]]:
    if cost is None:
        return [{"value": "", "text": "-"}] * 2
    milliseconds = cost.seconds * 1e3
    time = {"value": repr(cost.seconds), "text": f"{milliseconds:.1f} ms"}
    size = {"value": str(cost.bytes), "text": readable(cost.bytes)}
    return [time, size]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The settings as one list: keys of tables in tables are joined."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key or '(model)'}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key} / ")
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value))))
        else:
            found.append((name, str(value)))
    return found
