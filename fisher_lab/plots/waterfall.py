"""What each compromise of a trainer's step costs, as a waterfall."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab._ground.text import printable
from fisher_lab.plots.style import STYLES, new_figure, styled
from fisher_lab.results.budget import StepBudget

LEFT = STYLES["KFAC"].color  # what is left of the best decrease
LOST = "#D0D0D0"  # what a stage takes away
BESIDE = STYLES["Diagonal"].color  # the gradient, which is no stage


@styled
def waterfall(budget: StepBudget) -> Figure:
    """The share of the best decrease that is left after each compromise, and what each takes away.

    Args:
        budget: a StepBudget, as `fl.budget` returns it.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: for anything else.

    Example:
        >>> found = fl.budget(model, loss, (x, y), fl.KFAC(), batch=20)
        >>> figure = fl.plots.waterfall(found)
    """
    if not isinstance(budget, StepBudget):
        raise TypeError(
            f"Got {type(budget).__name__}, expected a StepBudget; call fl.budget(...) first."
        )
    bars = len(budget.stages) + 1
    figure = new_figure(6.4, 1.2 + 0.42 * bars)
    axes = figure.subplots()
    above = 1.0
    for place, stage in enumerate(budget.stages):
        lost = max(above - stage.efficiency, 0.0)
        axes.barh(place, stage.efficiency, color=LEFT)
        axes.barh(place, lost, left=stage.efficiency, color=LOST, edgecolor="0.6", hatch="///")
        _say(axes, place, max(above, stage.efficiency), f"{stage.efficiency:.3f}")
        above = stage.efficiency
    gradient = budget.gradient
    axes.barh(bars - 1, gradient.efficiency, color=BESIDE)
    _say(axes, bars - 1, gradient.efficiency, f"{gradient.efficiency:.3f}")
    names = [stage.name for stage in (*budget.stages, gradient)]
    axes.set_yticks(range(bars), [printable(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the network's best decrease (hatched: lost at this stage)")
    title = f"{budget.approximation}, damping {budget.damping:g} tr F / d, N = {budget.N}"
    axes.set_title(printable(title), loc="left")
    return figure


def _say(axes: Axes, place: int, end: float, text: str) -> None:
    """Write a value behind its bar."""
    axes.annotate(
        text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
    )
