"""What the page says: sections, figures along a training, and the meaning of the measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fisher_lab import errors
from fisher_lab._ground.memory import readable
from fisher_lab.plots.output import Drawing, drawings, training_drawings
from fisher_lab.report.answers import answers
from fisher_lab.results import ALL, Comparison, Cost, Row
from fisher_lab.results.tables import as_text

FISHERS = {
    "true": "the true Fisher (label expectation in closed form)",
    "mc": "the Monte-Carlo Fisher (labels sampled from the model)",
    "empirical": "the empirical Fisher (the labels of the data; not the Fisher itself)",
}
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
    head, body = _table(comparison)
    layers = []
    for name in dict.fromkeys(row.layer for row in comparison.rows):
        layers.append({"value": name, "text": _layer(comparison, name)})
    found = []
    for answer in answers(comparison):
        found.append({"layer": _layer(comparison, answer.layer), "text": answer.sentence})
    return {
        "title": title,
        "id": identifier,
        "facts": _facts(comparison),
        "answers": found,
        "figures": _figures(comparison, identifier),
        "layers": layers,
        "approximations": comparison.approximations,
        "head": head,
        "body": body,
        "settings": _flat(comparison.settings),
    }


def _layer(comparison: Comparison, name: str) -> str:
    """The layer's name and shape."""
    if name == ALL:
        return "all layers"
    shown = name or "(model)"
    shape = comparison.settings.get("layers", {}).get(name, {}).get("shape")
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
    """Where among the figures it stands."""
    return FIRST.index(drawing.name) if drawing.name in FIRST else len(FIRST)


def _figure(drawing: Drawing, identifier: str) -> dict[str, Any]:
    """A figure as the template reads it; its identifier is a number, for its error may be any text."""
    error = drawing.error or ""
    caption = CAPTIONS[drawing.kind].format(error=error[:1].upper() + error[1:])
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
    model = str(settings.get("model", "model"))
    if "parameters" in settings:
        model = f"{model} with {settings['parameters']} parameters"
    examples = f"{settings.get('N', 'some')} examples"
    problem = (settings.get("problem") or {}).get("name")
    if problem:
        examples = f"{examples} of the problem {problem}"
    fisher = FISHERS.get(str(settings.get("fisher")), "the Fisher")
    facts = [
        f"For every layer of a {model}, the block of {fisher} was computed exactly on {examples} "
        f"and compared with {len(comparison.approximations)} approximations. The likelihood is "
        f"{settings.get('likelihood', 'not recorded')}; the bias is the last column of the weight."
    ]
    checked = [row.checked for row in comparison.rows if row.checked is not None]
    if checked:
        facts.append(
            "The exact blocks agree with an independent computation by torch.func along one "
            f"random direction per layer to {max(checked):.1e} (relative)."
        )
    left_out = settings.get("left_out") or {}
    for name, reason in left_out.items():
        facts.append(f"Left out: {name}: {reason}")
    if not settings.get("complete", True):
        facts.append("Not complete: the run was stopped before all layers were measured.")
    return facts


def notes(comparisons: Iterable[Comparison]) -> list[tuple[str, str]]:
    """The library's measures in the tables, with the first line of their docstrings."""
    found: dict[str, str] = {}
    for comparison in comparisons:
        for name in comparison.errors:
            measure = errors.MEASURES.get(name)
            text = "" if measure is None else measure.describe()
            if text:
                found[name] = text
    return list(found.items())


# -- tables ----------------------------------------------------------------------------------------
def _table(comparison: Comparison) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns, and a line per layer and approximation with the number and text of every cell."""
    columns = list(dict.fromkeys((row.error, row.damping) for row in comparison.rows))
    rows = {(row.layer, row.approximation, row.error, row.damping): row for row in comparison.rows}
    costs = {(cost.layer, cost.approximation): cost for cost in comparison.costs}
    lines = []
    for layer, label in dict.fromkeys((row.layer, row.approximation) for row in comparison.rows):
        cells = [_error_cell(rows.get((layer, label, *column))) for column in columns]
        cells += _cost_cells(costs.get((layer, label)))
        shown = _layer(comparison, layer)
        lines.append({"layer": layer, "shown": shown, "approximation": label, "cells": cells})
    head = []
    for error, damping in columns:
        head.append(error if damping is None else f"{error} {damping:g}")
    return [*head, "time", "size"], lines


def _error_cell(row: Row | None) -> dict[str, str]:
    """What is sorted by, and what is shown."""
    if row is None:
        return {"value": "", "text": as_text(None)}
    value = "" if math.isnan(row.value) else repr(row.value)
    return {"value": value, "text": as_text(row.value)}


def _cost_cells(cost: Cost | None) -> list[dict[str, str]]:
    if cost is None:
        return [{"value": "", "text": "-"}] * 2
    time = {"value": repr(cost.seconds), "text": f"{cost.seconds * 1e3:.1f} ms"}
    size = {"value": str(cost.bytes), "text": readable(cost.bytes)}
    return [time, size]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The settings as one list: keys of tables in tables are joined."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key} / ")
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        found.append((f"{prefix}{key or '(model)'}", text))
    return found
