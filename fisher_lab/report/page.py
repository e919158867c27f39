"""The page itself: its parts, its policy, and the file it becomes.

Comparisons may come from files that strangers wrote. Every string of theirs goes through the
template, which escapes it; identifiers and links are made of numbers alone; and should something
slip through all the same, the page's policy lets no script run but its own and nothing be loaded
from outside (Content Security Policy, W3C).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fisher_lab import plots
from fisher_lab._ground.arguments import check_kind
from fisher_lab._ground.files import check_output, write_atomically
from fisher_lab._ground.text import printable
from fisher_lab.report.sections import along_training, notes, section
from fisher_lab.results import Comparison, load_comparison

POLICY = (
    "default-src 'none'",
    "script-src 'sha256-{hash}'",
    # The drawings set their colours by style attributes, which have no hash. Styles load nothing:
    # see img-src.
    "style-src 'unsafe-inline'",
    "img-src data:",
    # These two do not follow default-src.
    "base-uri 'none'",
    "form-action 'none'",
)
Given = Comparison | str | Path


def write_report(
    comparisons: Given | Sequence[Given] | Mapping[str, Given], path: str | Path
) -> Path:
    """Write one HTML file that opens anywhere: no network, nothing beside it.

    Args:
        comparisons: a Comparison or a file that `Comparison.save` wrote, several of them, or
            `{title: one of these}`. Several of one problem at different training steps also give
            figures along the training.
        path: the `.html` file; it is written whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: for a file that cannot be read or written, or nothing to report.

    See Also:
        fisher_lab.plots, for the figures alone.

    Example:
        >>> from fisher_lab.report import write_report
        >>> write_report(comparison, "report.html").name
        'report.html'
    """
    path = check_output(path, (".html",))
    titled = _titled(comparisons)
    sections = []
    for index, (title, comparison) in enumerate(titled.items()):
        sections.append(section(title, comparison, f"section{index}"))
    script = _own_text("page.js")
    page = _template().render(
        title=", ".join(titled),
        policy=_policy(script),
        css=_own_text("page.css"),
        script=script,
        sections=sections,
        along=along_training(titled.values()),
        notes=notes(titled.values()),
    )
    write_atomically(path, page)
    return path


# -- the template ----------------------------------------------------------------------------------
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["svg"] = _drawing
    return environment.from_string(
        files("fisher_lab.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )


def _finalized(value: Any) -> Any:
    """What is put into the page, free of control characters; what is markup already is our own."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _own_text(name: str) -> Any:
    """A file of this package as markup: safe as it is."""
    from markupsafe import Markup

    return Markup(files("fisher_lab.report").joinpath(name).read_text(encoding="utf-8"))


def _drawing(figure: Any, identifier: str) -> Any:
    """A figure as markup: matplotlib escapes its texts, `plots.svg` refuses hostile identifiers."""
    from markupsafe import Markup

    return Markup(plots.svg(figure, f"{identifier}-"))


def _policy(script: str) -> str:
    """The Content Security Policy of the page, with the hash of its only script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return "; ".join(POLICY).format(hash=base64.b64encode(digest).decode("ascii"))


# -- what is reported ------------------------------------------------------------------------------
def _titled(given: Any) -> dict[str, Comparison]:
    """Comparisons by title, read from files where they are paths."""
    if isinstance(given, Comparison | str | Path):
        given = [given]
    found: dict[str, Comparison] = {}
    if isinstance(given, Mapping):
        for title, item in given.items():
            found[str(title)] = _load(item)
    else:
        expected = "comparisons, their files, or {title: comparison}"
        check_kind("comparisons", given, (list, tuple), expected)
        for item in given:
            comparison = _load(item)
            found[_free(_title(comparison), found)] = comparison
    if not found:
        raise ValueError(
            "Got no comparison, expected comparisons with at least one row; run compare first."
        )
    for title, comparison in found.items():
        if not comparison.rows:
            raise ValueError(
                f"Got {title!r} without rows, expected comparisons with at least one row; run "
                "compare first."
            )
    return found


def _load(item: Any) -> Comparison:
    if isinstance(item, Comparison):
        return item
    if not isinstance(item, str | Path):
        raise TypeError(
            f"Got {type(item).__name__}, expected a Comparison or the path of a saved one."
        )
    return load_comparison(item)


def _title(comparison: Comparison) -> str:
    settings = comparison.settings
    problem = settings.problem or {}
    title = str(settings.problem_name or settings.model or "comparison")
    if "steps" in problem:
        title = f"{title}, step {problem['steps']}"
    return title


def _free(title: str, taken: Mapping[str, Any]) -> str:
    """The title, with a number behind it where there is one like it already."""
    if title not in taken:
        return title
    for number in itertools.count(2):
        numbered = f"{title} ({number})"
        if numbered not in taken:
            break
    return numbered
