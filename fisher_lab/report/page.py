"""The page itself: what goes into the template."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fisher_lab import errors, plots
from fisher_lab._ground.memory import readable
from fisher_lab.report.answers import answers
from fisher_lab.results.comparison import ALL, Comparison, Cost, check_output, load_comparison, write_atomically
from fisher_lab.results.tables import number

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
FIRST = ("errors-frobenius", "heatmap-frobenius", "traces", "cost", "damped-cosine", "training-frobenius")
Given = Comparison | str | Path


def write_report(comparisons: Given | Sequence[Given] | Mapping[str, Given], path: str | Path) -> Path:
    """Write one HTML file that opens anywhere: no network, nothing beside it.

    Args:
        comparisons: a Comparison or a file that `Comparison.save` wrote, several of them, or `{title: one of these}`.
            Several of one problem at different training steps also give figures along the training.
        path: the `.html` file; it is written whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: for a file that cannot be read or written, or nothing to report.

    See Also:
        fisher_lab.plots, for the figures alone.
    """
    path = check_output(path, (".html",))
    titled = _titled(comparisons)
    sections = [_section(title, comparison, index) for index, (title, comparison) in enumerate(titled.items())]
    page = _template().render(
        title=", ".join(titled), sections=sections, along=_along_training(list(titled.values())), notes=_notes(titled),
        css=_text("page.css"), script=_text("page.js"),
    )  # fmt: skip
    write_atomically(path, page)
    return path


def _text(name: str) -> Any:
    from markupsafe import Markup

    return Markup(files("fisher_lab.report").joinpath(name).read_text(encoding="utf-8"))  # our own file, safe as it is


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["svg"] = _markup
    return environment.from_string(files("fisher_lab.report").joinpath("page.html.j2").read_text(encoding="utf-8"))


def _markup(figure: tuple[Any, str]) -> Any:
    from markupsafe import Markup

    return Markup(plots.svg(*figure))  # matplotlib escapes the texts in it


def _titled(given: Any) -> dict[str, Comparison]:
    """Comparisons by title, read from files where they are paths."""
    if isinstance(given, Comparison | str | Path):
        given = [given]
    if not isinstance(given, Mapping):
        loaded = [_load(item) for item in given]
        given = {}
        for comparison in loaded:
            given[_free(_name(comparison), given)] = comparison
    found = {str(title): _load(item) for title, item in given.items()}
    empty = [title for title, comparison in found.items() if not comparison.rows]
    if not found or empty:
        what = f"{empty[0]!r} without rows" if empty else "no comparison"
        raise ValueError(f"Got {what}, expected comparisons with at least one row; run compare first.")
    return found


def _load(item: Any) -> Comparison:
    if isinstance(item, Comparison):
        return item
    if not isinstance(item, str | Path):
        raise TypeError(f"Got {type(item).__name__}, expected a Comparison or the path of a saved one.")
    return load_comparison(item)


def _name(comparison: Comparison) -> str:
    settings = comparison.settings
    problem = settings.get("problem") or {}
    name = str(problem.get("name") or settings.get("model") or "comparison")
    return f"{name}, step {problem['steps']}" if "steps" in problem else name


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return next(title for k in itertools.count(1) if (title := name if k == 1 else f"{name} ({k})") not in taken)


def _section(title: str, comparison: Comparison, index: int) -> dict[str, Any]:
    found = plots.figures(comparison)
    names = sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    figures = [
        {"name": n, "caption": _caption(n), "drawing": (found[n], f"s{index}{n}-"), "first": n in FIRST} for n in names
    ]
    head, body = _table(comparison)
    layers = [
        {"value": name, "text": _layer(comparison, name)} for name in dict.fromkeys(r.layer for r in comparison.rows)
    ]
    return {
        "title": title, "id": f"section{index}", "facts": _facts(comparison), "figures": figures, "head": head,
        "body": body, "layers": layers, "approximations": comparison.approximations,
        "answers": [{"layer": _layer(comparison, a.layer), "text": a.sentence} for a in answers(comparison)],
        "settings": list(_flat(comparison.settings)),
    }  # fmt: skip


def _caption(name: str) -> str:
    kind, _, error = name.partition("-")
    return CAPTIONS[kind].format(error=(name if kind == "damped" else error).replace("-", "_").capitalize())


def _layer(comparison: Comparison, name: str) -> str:
    if name == ALL:
        return "all layers"
    shape = comparison.settings.get("layers", {}).get(name, {}).get("shape")
    return (name or "(model)") + (f" ({shape[0]}x{shape[1]})" if shape else "")


def _facts(comparison: Comparison) -> list[str]:
    """What was measured, in sentences."""
    settings = comparison.settings
    what = FISHERS.get(str(settings.get("fisher")), "the Fisher")
    size = f" with {settings['parameters']} parameters" if "parameters" in settings else ""
    problem = (settings.get("problem") or {}).get("name")
    of = f" of the problem {problem}" if problem else ""
    facts = [
        f"For every layer of a {settings.get('model', 'model')}{size}, the block of {what} was computed exactly on "
        f"{settings.get('N', 'some')} examples{of} and compared with {len(comparison.approximations)} approximations. "
        f"The likelihood is {settings.get('likelihood', 'not recorded')}; the bias is the last column of the weight.",
    ]
    checked = [row.checked for row in comparison.rows if row.checked is not None]
    if checked:
        facts.append(
            f"The exact blocks agree with an independent computation by torch.func along one random direction per "
            f"layer to {max(checked):.1e} (relative)."
        )
    for name, reason in (settings.get("left_out") or {}).items():
        facts.append(f"Left out: {name}: {reason}")
    if not settings.get("complete", True):
        facts.append("Not complete: the run was stopped before all layers were measured.")
    return facts


def _table(comparison: Comparison) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns, and one line per layer and approximation with the number and the text of every cell."""
    columns = list(dict.fromkeys((r.error, r.damping) for r in comparison.rows))
    values = {(r.layer, r.approximation, r.error, r.damping): r.value for r in comparison.rows}
    costs = {(c.layer, c.approximation): c for c in comparison.costs}
    lines = []
    for layer, label in dict.fromkeys((r.layer, r.approximation) for r in comparison.rows):
        found = [values.get((layer, label, *column)) for column in columns]
        cells = [{"value": "" if v is None or math.isnan(v) else repr(v), "text": number(v)} for v in found]
        cost = costs.get((layer, label))
        cells += _cost_cells(cost)
        lines.append({"layer": layer, "shown": _layer(comparison, layer), "approximation": label, "cells": cells})
    head = [error if damping is None else f"{error} {damping:g}" for error, damping in columns]
    return [*head, "time", "size"], lines


def _cost_cells(cost: Cost | None) -> list[dict[str, str]]:
    if cost is None:
        return [{"value": "", "text": "-"}] * 2
    time, size = f"{cost.seconds * 1e3:.1f} ms", readable(cost.bytes)
    return [{"value": repr(cost.seconds), "text": time}, {"value": str(cost.bytes), "text": size}]


def _along_training(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Figures against the training step, where the comparisons are one problem at several steps."""
    steps: dict[Any, Comparison] = {(c.settings.get("problem") or {}).get("steps"): c for c in comparisons}
    names = {(c.settings.get("problem") or {}).get("name") for c in comparisons}
    if len(comparisons) < 2 or len(names) != 1 or None in steps or len(steps) < len(comparisons):
        return []
    shared = [
        e
        for e in comparisons[0].errors
        if all(any(r.error == e and r.damping is None for r in c.rows) for c in comparisons)
    ]
    names_of = [f"training-{error}" for error in shared if error in ("frobenius", "cosine")]
    return [
        {"name": n, "caption": _caption(n), "drawing": (plots.training(steps, n.partition("-")[2]), f"{n}-")}
        for n in names_of
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key} / ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found.append((prefix + str(key or "(model)"), text))
    return found


def _notes(titled: Mapping[str, Comparison]) -> list[tuple[str, str]]:
    """Every measure in the tables with the first line of its docstring."""
    names = dict.fromkeys(row.error for comparison in titled.values() for row in comparison.rows)
    texts = [(name, (getattr(getattr(errors, name, None), "__doc__", "") or "").strip()) for name in names]
    return [(name, text.splitlines()[0]) for name, text in texts if text]
