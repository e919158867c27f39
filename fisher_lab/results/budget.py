"""StepBudget: how much of the best step of the whole network is left after each compromise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fisher_lab._ground.text import printable
from fisher_lab.results import html


@dataclass(frozen=True)
class Stage:
    """One compromise on the way from the whole Fisher to what a trainer uses.

    Attributes:
        name: of the compromise.
        efficiency: share of the best decrease of the damped quadratic model that is left.
        noise: how far it may be off.
        about: what was done, in words.
    """

    name: str
    efficiency: float
    noise: float
    about: str


@dataclass(frozen=True)
class StepBudget:
    """The stages in their order, each with all compromises before it; what `fl.budget` returns.

    Attributes:
        approximation: label of the approximation.
        damping: lambda relative to tr F / d of the whole network.
        stages: from the whole Fisher, whose efficiency is 1, to the last compromise.
        gradient: the stage of the gradient itself, beside them.
        N: examples.
        likelihood: the loss, as text.

    Example:
        >>> found = fl.budget(model, loss, (x, y), fl.KFAC(), batch=20)
        >>> [stage.name for stage in found.stages][:3]
        ['whole Fisher', 'exact blocks', 'approximation']
    """

    approximation: str
    damping: float
    stages: tuple[Stage, ...]
    gradient: Stage
    N: int
    likelihood: str

    def losses(self) -> Iterator[tuple[Stage, float]]:
        """Every stage but the first, with the share that it loses of what was there before it."""
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            yield stage, 1 - stage.efficiency / before.efficiency

    @property
    def largest_loss(self) -> Stage:
        """The stage that loses the largest share of what was there before it: what to
        mend first.
        """
        stage, _ = max(self.losses(), key=lambda pair: pair[1])
        return stage

    def __str__(self) -> str:
        width = max(len(stage.name) for stage in (*self.stages, self.gradient))
        lines = [
            f"{self.approximation}, damping {self.damping:g} tr F / d, {self.likelihood}, N = "
            f"{self.N}: share of the best decrease",
            "",
        ]
        lost = dict(self.losses())
        for stage in self.stages:
            share = f"{-100 * lost[stage]:+7.1f} %" if stage in lost else " " * 9
            lines.append(f"{stage.name:<{width}}  {stage.efficiency:.4f}  {share}  {stage.about}")
        last = self.gradient
        lines.append("")
        lines.append(f"{last.name:<{width}}  {last.efficiency:.4f}  {' ' * 9}  {last.about}")
        lines.append(f"Mend first: {self.largest_loss.name}.")
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        """The stages as a table of a notebook."""
        return html.budget_table(self)
