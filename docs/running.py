"""The Python blocks of tutorial and how-tos run while the pages are read, and what they print and
draw stands below them.

A page shows a figure by the name of its variable: `![what it shows](drawn:figure)`.
"""

import ast
import contextlib
import io
import re
import warnings
from pathlib import Path

import torch

from fisher_lab import plots

PAGES = ("tutorial/", "howto/")
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"(!\[[^\]]*\]\()drawn:(\w+)\)")
OUTPUT = "\n```{code-block} text\n:class: output\n\n%s\n```\n"


def insert_results(app, docname: str, source: list[str]) -> None:
    """Run a page that asks for it; called by Sphinx with the text of every page."""
    if docname.startswith(PAGES):
        folder = Path(app.srcdir) / "generated" / "drawn"
        folder.mkdir(parents=True, exist_ok=True)
        source[0] = with_results(source[0], docname, folder)


def with_results(text: str, docname: str, folder: Path) -> str:
    """The text of a page with what its blocks print and draw.

    Args:
        text: the page, in Markdown.
        docname: its name, such as "howto/train".
        folder: where figures are saved.
    """
    names: dict[str, object] = {"__name__": docname}
    drawn = Drawn(folder, docname.replace("/", "-"))
    pieces = []
    end = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for found in BLOCK.finditer(text):
            pieces.append(drawn.saved(text[end : found.start()], names))
            pieces.append(found[0])
            printed = run(found[1], docname, names)
            if printed:
                pieces.append(OUTPUT % printed)
            end = found.end()
    pieces.append(drawn.saved(text[end:], names))
    return "".join(pieces)


def run(code: str, docname: str, names: dict[str, object]) -> str:
    """Run a block in the namespace of its page.

    Returns:
        What it printed, without spaces at the ends of lines.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(ast.parse(code), docname, "exec"), names)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


class Drawn:
    """The figures of a page, in files with numbers: a variable may hold another one further down.

    Args:
        folder: where figures are saved.
        prefix: how their names begin.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.count = 0

    def saved(self, text: str, names: dict[str, object]) -> str:
        """Text with links to the figures that it names, saved as they are at that place."""

        def link(found: re.Match) -> str:
            self.count += 1
            path = self.folder / f"{self.prefix}-{self.count}.png"
            plots.save(names[found[2]], path)
            return f"{found[1]}/generated/drawn/{path.name})"

        return FIGURE.sub(link, text)
