"""One style for every figure: a method has the same colour, marker and hatch everywhere.

Colours are told apart by colour-blind people (Okabe & Ito's palette, three of Tol's added); in grey
the marker and the hatch do the work.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.7,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
    "text.usetex": False,  # names come from files of others: TeX would run what they say
    "svg.image_inline": True,  # an image beside the file would be lost
    "svg.fonttype": "path",  # the same on every machine, whatever fonts it has
    "svg.hashsalt": "fisher_lab",  # and the same file for the same data
}


class Style(NamedTuple):
    """How a method is drawn."""

    color: str
    marker: str
    hatch: str
    line: str = "-"


OUTLINE: dict[str, Any] = {"markeredgecolor": "0.15", "markeredgewidth": 0.5}  # of every marker
EXACT = Style("#000000", "", "", "-")
STYLES = {
    "Exact": EXACT,
    "KFAC": Style("#0072B2", "o", ""),
    "EKFAC": Style("#56B4E9", "s", "///"),
    "TKFAC": Style("#D55E00", "^", ".."),
    "TEKFAC": Style("#E69F00", "v", "\\\\\\"),
    "TN": Style("#CC79A7", "D", "xxx"),
    "MiniBlock": Style("#009E73", "P", "x-"),
    "TENGraD": Style("#F0E442", "X", "oo"),
    "Shampoo": Style("#BB6688", "*", "---"),
    "KPSVD": Style("#332288", "h", "|||"),
    "Diagonal": Style("#BBBBBB", "p", "+++"),
    "LNGD": Style("#44AA99", "<", "|-"),
}
SPARE = (
    Style("#661100", ">", "//o"),
    Style("#6699CC", "8", "\\\\."),
    Style("#999933", "H", "x/"),
    Style("#AA4466", "d", "|o"),
)
LINES = ("--", "-.", ":")  # of methods with options, such as MiniBlock(linear=col)


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """The style of every label: by its method's name, whichever others are in the figure.

    A name that is not known takes one of the spare styles by its own letters; options in brackets
    change the line and make the colour lighter.
    Only where two labels would look alike does the later one move on to the next style.
    """
    found: dict[str, Style] = {}
    for label in labels:
        choices = _choices(label)
        unlike = [style for style in choices if style not in found.values()]
        found[label] = unlike[0] if unlike else choices[0]
    return found


def _choices(label: str) -> list[Style]:
    """The styles that a label may have, the one of its own first."""
    name, _, options = label.partition("(")
    # a number that is the same for this label in every run
    start = zlib.crc32(label.encode("utf-8", "surrogatepass"))
    if name in STYLES:
        bases = [STYLES[name]]
    else:
        bases = _turned(SPARE, start)
    if options:
        lines = _turned(LINES, start)
    else:
        lines = ["-", *LINES]
    choices = []
    for line in lines:
        for base in bases:
            choices.append(_variant(base, line))
    return choices


def _turned(choices: Sequence[T], start: int) -> list[T]:
    """The choices in their order, beginning elsewhere."""
    first = start % len(choices)
    return [*choices[first:], *choices[:first]]


def _variant(base: Style, line: str) -> Style:
    """The style with another line, and a lighter colour for the bars that have no line."""
    white = 0.0
    if line != "-":
        white = 0.3 + 0.2 * LINES.index(line)
    red, green, blue = to_rgb(base.color)
    lighter = (
        (1 - white) * red + white,
        (1 - white) * green + white,
        (1 - white) * blue + white,
    )
    return base._replace(line=line, color=to_hex(lighter).upper())


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this style, with matplotlib's settings put back afterwards."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and to no global state."""
    return Figure(figsize=(width, height), layout="constrained")
