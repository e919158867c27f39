"""One style for every figure: a method has the same colour, marker and hatch everywhere.

Colours are told apart by colour-blind people: Okabe & Ito's palette, moved until any two are at
least 0.09 apart in OKLab (Ottosson 2020) for each kind of dichromacy (Machado, Oliveira & Fernandes
2009). In grey the marker and the hatch do the work.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from fisher_lab._ground.arguments import is_whole, shown

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
# What differs in a figure of one or two columns of a paper, and how wide and high it is, in inches.
PAPER: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # letters stay letters: journals refuse the other kind
}
WIDTHS = {1: 3.4, 2: 7.0}
TALLEST = 8.5


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
    "KFAC": Style("#0060C3", "o", ""),
    "EKFAC": Style("#51B4ED", "s", "///"),
    "TKFAC": Style("#E06600", "^", ".."),
    "TEKFAC": Style("#EAA923", "v", "\\\\\\"),
    "TN": Style("#BF93AC", "D", "xxx"),
    "MiniBlock": Style("#29A268", "P", "x-"),
    "TENGraD": Style("#F0E442", "X", "oo"),
    "Shampoo": Style("#B167A8", "*", "---"),
    "KPSVD": Style("#332288", "h", "|||"),
    "Diagonal": Style("#C1C1BF", "p", "+++"),
    "LNGD": Style("#716E66", "<", "|-"),
}
SPARE = (
    Style("#661100", ">", "//o"),
    Style("#6699CC", "8", "\\\\."),
    Style("#999933", "H", "x/"),
    Style("#AA4466", "d", "|o"),
)
CHARACTER = 0.075  # inches of a character in a legend or at a tick
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
    """Draw in this style, with matplotlib's settings put back afterwards.

    A figure of so many `columns` of a paper has smaller letters.
    """

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        settings = dict(RC)
        columns = kwargs.get("columns")
        if columns is not None:
            if not is_whole(columns, 1) or columns not in WIDTHS:
                raise ValueError(
                    f"Got columns={shown(columns)}, expected 1 or 2 columns of a paper, or "
                    "None for a figure as wide as it needs."
                )
            settings.update(PAPER)
        with matplotlib.rc_context(settings):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float, columns: int | None = None) -> Figure:
    """An empty figure that belongs to no window and to no global state.

    Args:
        width: in inches, where it may be as wide as it likes.
        height: in inches.
        columns: of a paper, 1 or 2, which give the width then.
    """
    if columns is not None:
        width = WIDTHS[columns]
        height = min(height, TALLEST)
    return Figure(figsize=(width, height), layout="constrained")


def draw_legend(figure: Figure, axes: Axes | None = None) -> None:
    """The legend: beside the axes, or below them in a narrow figure.

    Args:
        figure: what it belongs to.
        axes: whose lines it explains; None for those of all axes.
    """
    if axes is None:
        axes = figure.axes[0]
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    if figure.get_figwidth() > WIDTHS[1]:
        figure.legend(handles, names, loc="outside right upper")
        return
    # room for the lines of the legend is added to that of the axes
    across = 2 if room_for(names, 16) > 0 else 3
    lines = math.ceil(len(names) / across)
    figure.set_figheight(figure.get_figheight() + 0.14 * lines)
    figure.legend(handles, names, loc="outside lower center", ncols=across, columnspacing=1.0)


def room_for(names: Iterable[str], free: int) -> float:
    """Inches that the longest name takes beyond the room that a figure has for `free`
    characters.
    """
    longest = max(map(len, names), default=0)
    return CHARACTER * max(0, longest - free)
