"""The damped steps of all candidates, judged by the Fisher of the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab._ground.conjugate import conjugate_gradients
from fisher_lab._ground.memory import readable
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Exact
from fisher_lab.diagnose.candidates import Candidate
from fisher_lab.diagnose.chance import Gradients, Judged, judged, table
from fisher_lab.diagnose.inside import network_floor_inside, precision_inside
from fisher_lab.errors import DENSE_DIM, DampedQuantities, Measure
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results import ALL, Row
from fisher_lab.statistics import contractions
from fisher_lab.whole_network import network_of

EXACT = "Exact"  # the step of the layers' exact blocks
GRADIENT = "(gradient)"  # the gradient itself, as a step
EFFICIENCY = "network_efficiency"
RESIDUAL = 1e-6  # relative, of the step of a large exact block
MOST_PRODUCTS = 5000


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
        slopes: y . g_n `[N]`, where the examples' gradients fit the memory.
    """

    def __init__(self) -> None:
        self.layers = 0
        self.yg = 0.0
        self.yy = 0.0
        self.projections: list[Tensor] = []
        self.slopes: Tensor | None = None

    def add(self, other: StepSums) -> None:
        """Add those of another layer."""
        self.layers += other.layers
        self.yg += other.yg
        self.yy += other.yy
        if not self.projections:
            self.projections = [s.clone() for s in other.projections]
            self.slopes = other.slopes
            return
        for own, s in zip(self.projections, other.projections, strict=True):
            own += s
        if self.slopes is not None and other.slopes is not None:
            self.slopes = self.slopes + other.slopes

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
        self.covariances: list[dict[str, Any]] = []
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
        self,
        name: str,
        exact: FisherMatrix,
        matrices: Mapping[str, FisherMatrix],
        gradients: Gradients,
        apart: bool,
    ) -> dict[Step, StepSums]:
        """The steps of one layer.

        Args:
            name: of the layer.
            exact: its exact block.
            matrices: of the candidates, by label.
            gradients: of the examples.
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
                steps[of_exact] = _exact_step(exact, g, shift)
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
        if gradients.kept:
            for sums, own in zip(found.values(), gradients.slopes(name, Y), strict=True):
                sums.slopes = own
        return found

    def add(self, found: Mapping[Step, StepSums]) -> None:
        """Add the steps of one layer to those of the others."""
        for step, of_layer in found.items():
            self.sums.setdefault(step, StepSums()).add(of_layer)

    def _judged(self, step: Step, numbers: DampedQuantities) -> Judged | None:
        """A step with what every example says of it."""
        sums = self.sums[step]
        if sums.slopes is None:
            return None
        q = torch.cat([s.square().sum(0) for s in sums.projections])
        return judged(numbers, sums.slopes, q, self.shifts[step.damping])

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
        steps: dict[float, dict[str, Judged]] = {}
        for step, sums in self.sums.items():
            if sums.layers < len(self.source.layers):
                continue  # a layer that had no matrix of this kind
            if step.yardstick and self._is_candidate(step):
                continue  # fl.Exact(), whose rows are the same numbers
            square = sums.square() / self.source.N
            quantities = self.fisher.quantities_of(sums.yg, sums.yy, square, step.damping)
            floor = network_floor_inside(self.source, self.fisher, step.damping)
            known = self._judged(step, quantities)
            if known is not None:
                steps.setdefault(step.damping, {})[step.label] = known
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
        for damping, found in steps.items():
            self.covariances += self._table(damping, found, rows)
        return rows

    def _table(
        self, damping: float, steps: Mapping[str, Judged], rows: Sequence[Row]
    ) -> list[dict[str, Any]]:
        """The covariances of the efficiencies of one damping."""
        efficiencies = {}
        for row in rows:
            if row.error == EFFICIENCY and row.damping == damping:
                efficiencies[row.approximation] = row.value
        if not efficiencies:
            return []  # a measure of one's own alone
        return table(ALL, EFFICIENCY, damping, steps, efficiencies)


def _exact_step(exact: FisherMatrix, g: Tensor, shift: float) -> Tensor:
    """(F + lambda I)^-1 g of an exact block; large ones by products, without an inverse."""
    if exact.dim <= DENSE_DIM:
        return exact.power(g, -1.0, shift)

    def flat(v: Tensor) -> Tensor:
        return (exact @ v.view(exact.shape)).flatten()

    # the efficiency is off by the square of this, times the condition number
    found = conjugate_gradients(flat, g.flatten(), shift, RESIDUAL, MOST_PRODUCTS)
    return found.x.view(exact.shape)
