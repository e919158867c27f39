"""How far the efficiencies of two steps may be apart by chance.

The decrease that a step y reaches with its best length is (y . g)^2 / (y^T (F + lambda I) y), up to
a factor that all steps share. With the slope t_n = y . g_n and the curvature q_n = y^T F_n y of
every example, an efficiency eta moves with example n by

    u_n = eta [2 (t_n / mean t - 1) - (q_n - mean q) / (y^T (F + lambda I) y)],

and the covariances are U U^T / N^2 (infinitesimal jackknife). The steps themselves and the best
decrease are held: what is told is whether other examples would judge otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fisher_lab._passes.source import Source
from fisher_lab.errors import DampedPair, DampedQuantities
from fisher_lab.results import ALL, Row
from fisher_lab.statistics import LayerStats, contractions

LAYERED = "damped_efficiency"  # the efficiency of the layers' steps


class Judged(NamedTuple):
    """A step that was judged, and what every example says of it.

    Attributes:
        yg: y . g.
        yFy: y . F y.
        yHy: y . (F + lambda I) y.
        slopes: t `[N]`, whose mean is y . g.
        curvatures: q `[N]`, whose mean is y . F y.
    """

    yg: float
    yFy: float  # noqa: N815 (as it is written in formulas)
    yHy: float  # noqa: N815
    slopes: Tensor
    curvatures: Tensor

    def plus(self, other: Judged) -> Judged:
        """The steps of two layers together, what couples these left out."""
        return Judged(
            self.yg + other.yg,
            self.yFy + other.yFy,
            self.yHy + other.yHy,
            self.slopes + other.slopes,
            self.curvatures + other.curvatures,
        )

    def influence(self, efficiency: float) -> Tensor | None:
        """u `[N]`; None for a step that does not descend."""
        if self.yg <= 0 or self.yHy <= 0:
            return None
        u = 2 * (self.slopes / self.yg - 1) - (self.curvatures - self.yFy) / self.yHy
        return efficiency * u


class Gradients:
    """The columns of every example's gradient, captured when the first layer asks for them.

    Args:
        source: model and data.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._pieces: list[dict[str, LayerStats]] = []

    @property
    def kept(self) -> bool:
        """Whether they fit the memory, as they do where the columns of F do."""
        return self.source.fits_at_once()

    def slopes(self, layer: str, Y: Tensor) -> Tensor:
        """y . g_n `[k, N]` for steps Y `[k, d_out, d_in]` of a layer."""
        if not self._pieces:
            self._pieces = list(self.source.gradient_columns())
        parts = [contractions.project(piece[layer], Y)[:, 0] for piece in self._pieces]
        return torch.cat(parts, 1)


def judged(numbers: DampedQuantities, slopes: Tensor, curvatures: Tensor, shift: float) -> Judged:
    """A step with what every example says of it, on the scale of its own numbers.

    Args:
        numbers: of the step.
        slopes: t `[N]`, up to a factor.
        curvatures: q `[N]`, up to a factor.
        shift: lambda.
    """
    yFy = numbers.yHy - shift * numbers.yy
    return Judged(
        numbers.yg,
        yFy,
        numbers.yHy,
        _with_mean(slopes, numbers.yg),
        _with_mean(curvatures, yFy),
    )


def _with_mean(values: Tensor, mean: float) -> Tensor:
    own = values.mean()
    zero = torch.zeros_like(values)
    return torch.where(own != 0, values * (mean / own), zero)


def table(
    layer: str,
    error: str,
    damping: float,
    steps: Mapping[str, Judged],
    efficiencies: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The covariances of the efficiencies of some steps as one table, or none.

    Args:
        layer: their layer, or "(all)".
        error: name of the measure.
        damping: relative to tr F / d.
        steps: by label.
        efficiencies: by label.
    """
    rows = {}
    for label, step in steps.items():
        u = step.influence(efficiencies[label])
        if u is not None:
            rows[label] = u
    if len(rows) < 2:
        return []
    U = torch.stack(list(rows.values()))
    N = U.shape[1]
    C = U @ U.T / N**2
    found = {
        "layer": layer,
        "error": error,
        "damping": damping,
        "approximations": list(rows),
        "matrix": C.tolist(),
    }
    return [found]


def judged_steps(
    gradients: Gradients, layer: str, stats: LayerStats, pairs: Mapping[str, DampedPair]
) -> dict[str, Judged]:
    """The steps of one layer with what every example says of them, by label.

    Args:
        gradients: of the examples.
        layer: its name.
        stats: its columns, of all examples.
        pairs: by label.
    """
    Y = torch.stack([pair.step for pair in pairs.values()])
    t = gradients.slopes(layer, Y)
    q = contractions.project(stats, Y).square().sum(1)
    steps = {}
    for index, (label, pair) in enumerate(pairs.items()):
        numbers = pair.asked(["yg", "yy", "yHy"])
        steps[label] = judged(numbers, t[index], q[index], pair.shift)
    return steps


class Layer(Protocol):
    """What was measured of a layer."""

    @property
    def judged(self) -> Mapping[float, Mapping[str, Judged]]:
        """Its steps by damping and label; empty where a file of an earlier run told its errors."""


def over_all(layers: Sequence[Layer], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The covariances of the efficiencies of all layers together.

    Args:
        layers: all of them.
        rows: over all layers.
    """
    values: dict[float, dict[str, float]] = {}
    for row in rows:
        if row.error == LAYERED and row.damping is not None:
            values.setdefault(row.damping, {})[row.approximation] = row.value
    found = []
    for damping, efficiencies in values.items():
        steps = {}
        for label in efficiencies:
            parts = [layer.judged.get(damping, {}).get(label) for layer in layers]
            together = _together(parts)
            if together is not None:
                steps[label] = together
        found += table(ALL, LAYERED, damping, steps, efficiencies)
    return found


def _together(parts: Sequence[Judged | None]) -> Judged | None:
    """The steps of all layers together; None where one is not known."""
    total: Judged | None = None
    for part in parts:
        if part is None:
            return None
        total = part if total is None else total.plus(part)
    return total
