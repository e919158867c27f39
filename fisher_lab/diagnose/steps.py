"""The damped steps of all candidates, judged by the Fisher of the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_lab._ground.memory import readable
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Exact
from fisher_lab.diagnose.candidates import Candidate
from fisher_lab.diagnose.inside import network_floor_inside, precision_inside
from fisher_lab.errors import Measure
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results import ALL, Row
from fisher_lab.statistics import contractions
from fisher_lab.whole_network import network_of

EXACT = "Exact"  # the step of the layers' exact blocks
GRADIENT = "(gradient)"  # the gradient itself, as a step


def is_of_steps(measure: Measure) -> bool:
    """Whether a measure judges the steps of the whole network."""
    return measure.network and measure.damped


class Step(NamedTuple):
    """What names a step that is judged."""

    label: str
    damping: float
    yardstick: bool  # the gradient or the exact blocks, whatever the candidates are called


def check_names(candidates: Mapping[str, Candidate], measures: Sequence[Measure]) -> None:
    """Refuse candidates that could not be told from a yardstick in the rows.

    Args:
        candidates: by label.
        measures: that are asked for.

    Raises:
        ValueError: for a candidate that has the name of another row of the whole network.
    """
    taken = {}
    for m in measures:
        if m.network:
            taken[EXACT] = m.name
        if is_of_steps(m):
            taken[GRADIENT] = m.name
    for label, candidate in candidates.items():
        if label not in taken:
            continue
        if label == EXACT and type(candidate.approximation) is Exact:
            continue  # the exact blocks under their own name
        raise ValueError(
            f"Got an approximation named {label!r}, which is what {taken[label]} calls a row of "
            "its own, expected another name; rename the approximation."
        )


class StepSums:
    """What is kept of a step y: numbers that add up over layers.

    Attributes:
        layers: how many were added.
        yg: y . g.
        yy: y . y.
        projections: <P_rn, y> of every piece of the data, `[R, n]` each.
    """

    def __init__(self) -> None:
        self.layers = 0
        self.yg = 0.0
        self.yy = 0.0
        self.projections: list[Tensor] = []

    def add(self, other: StepSums) -> None:
        """Add those of another layer."""
        self.layers += other.layers
        self.yg += other.yg
        self.yy += other.yy
        if not self.projections:
            self.projections = [s.clone() for s in other.projections]
            return
        for own, s in zip(self.projections, other.projections, strict=True):
            own += s

    def square(self) -> float:
        """sum_rn <P_rn, y>^2."""
        return sum(float(s.square().sum()) for s in self.projections)


class NetworkSteps:
    """The steps (F^_l + lambda I)^-1 g_l, layer after layer, with one lambda for all layers.

    Of every step only its projections on the columns are kept, N R numbers, never the step.

    Args:
        source: model and data.
        measures: of a step of the whole network; without any, nothing is done.
        dampings: relative to tr F / d of the whole network.

    Raises:
        ValueError: if the columns of all layers do not fit the memory together.
    """

    def __init__(
        self, source: Source, measures: Sequence[Measure], dampings: Sequence[float]
    ) -> None:
        self.source = source
        self.measures = measures
        self.sums: dict[Step, StepSums] = {}
        if not measures:
            return
        self.fisher = network_of(source)
        if not self.fisher.kept:
            need = source.N * source.example_bytes(source.layers)
            raise ValueError(
                f"{measures[0].name} needs the columns of all layers at once, {readable(need)}, "
                f"expected at most {readable(source.budget.for_columns)}; use fewer examples, "
                'fisher="mc", or raise memory=.'
            )
        self.shifts = {damping: self.fisher.absolute_damping(damping) for damping in dampings}

    def layer(
        self, name: str, exact: FisherMatrix, matrices: Mapping[str, FisherMatrix], apart: bool
    ) -> dict[Step, StepSums]:
        """The steps of one layer.

        Args:
            name: of the layer.
            exact: its exact block.
            matrices: of the candidates, by label.
            apart: whether the exact block is too large to be inverted.
        """
        found: dict[Step, StepSums] = {}
        if not self.measures:
            return found
        g = self.fisher.gradient[name]
        steps: dict[Step, Tensor] = {}
        for damping, shift in self.shifts.items():
            steps[Step(GRADIENT, damping, yardstick=True)] = g
            if not apart:
                of_exact = Step(EXACT, damping, yardstick=True)
                steps[of_exact] = exact.power(g, -1.0, shift)
            for label, matrix in matrices.items():
                steps[Step(label, damping, yardstick=False)] = matrix.power(g, -1.0, shift)
        Y = torch.stack(list(steps.values()))
        for step, y in steps.items():
            sums = StepSums()
            sums.layers = 1
            sums.yg = float((y * g).sum())
            sums.yy = float(y.square().sum())
            found[step] = sums
        for columns in self.fisher.pieces():
            projections = contractions.project(columns[name], Y)
            for sums, own in zip(found.values(), projections, strict=True):
                sums.projections.append(own.clone())
        return found

    def add(self, found: Mapping[Step, StepSums]) -> None:
        """Add the steps of one layer to those of the others."""
        for step, of_layer in found.items():
            self.sums.setdefault(step, StepSums()).add(of_layer)

    def _is_candidate(self, yardstick: Step) -> bool:
        """Whether a candidate of a yardstick's name has its step on every layer."""
        own = self.sums.get(yardstick._replace(yardstick=False))
        return own is not None and own.layers == len(self.source.layers)

    def rows(self, checked: float | None) -> list[Row]:
        """One row of layer "(all)" for every measure and step.

        Args:
            checked: the largest deviation of a layer's block from torch.func.
        """
        if not self.measures:
            return []
        self.fisher.best_decreases(list(self.shifts))  # of all dampings at once
        precision = precision_inside(self.source)
        rows = []
        for step, sums in self.sums.items():
            if sums.layers < len(self.source.layers):
                continue  # a layer that had no matrix of this kind
            if step.yardstick and self._is_candidate(step):
                continue  # fl.Exact(), whose rows are the same numbers
            square = sums.square() / self.source.N
            quantities = self.fisher.quantities_of(sums.yg, sums.yy, square, step.damping)
            floor = network_floor_inside(self.source, self.fisher, step.damping)
            for m in self.measures:
                value, noise = m.formula(quantities)
                noise = max(noise, floor)
                row = Row(
                    layer=ALL,
                    approximation=step.label,
                    error=m.name,
                    value=value,
                    noise=noise,
                    damping=step.damping,
                    checked=checked,
                    fisher=self.source.fisher,
                    precision=precision,
                )
                rows.append(row)
        return rows
