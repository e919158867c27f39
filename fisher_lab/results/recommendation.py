"""What to use: for every layer and the network, the approximation whose damped step keeps most.

Judged by the share of the best decrease that a step keeps: `network_efficiency` for the whole
network where it was measured, else `damped_efficiency` of the block-diagonal matrix of all layers.
Of those that keep nearly as much as the best, the one with fewest bytes is taken; beside it stand
those that chance alone could have put behind the best. Everything is read from the rows, costs and
covariances of a comparison, so that a saved one gives the same answer.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fisher_lab._ground.arguments import number, shown
from fisher_lab._ground.memory import readable
from fisher_lab._ground.text import printable
from fisher_lab.results.measurements import Measurements
from fisher_lab.results.rows import ALL, Cost, Row

NETWORK = "network_efficiency"
LAYERED = "damped_efficiency"
DAMPING = 1e-2  # at which steps are judged, if it was measured
NEARLY = 0.98  # of what the best keeps: no difference in practice
SURE = 2.0  # standard errors beyond which two efficiencies are told apart
# beside the damping: as the optimizers of fl.optim have them
DEFAULTS = "lr=0.01, kl_clip=0.01, observe_every=2, refresh_every=20"


@dataclass(frozen=True)
class Choice:
    """What to take for one layer, or for the network.

    Attributes:
        layer: its name, "(all)" for the network.
        approximation: label.
        measure: by which it was judged.
        efficiency: share of the best decrease that its step keeps.
        damping: at which it was judged, relative to tr F / d of the layer, or of the network.
        absolute_damping: the same on the scale of F; None where tr F is not known.
        refresh: seconds to build it from all examples and to invert it.
        step: seconds to apply the inverse to a gradient.
        bytes: to hold it.
        alike: others that cannot be told from the best of them.

    Example:
        >>> found = fl.compare(model, loss, (x, y), [fl.KFAC(), fl.Diagonal()], progress=False)
        >>> choice = found.recommend().choices[0]
        >>> choice.layer, choice.approximation, 0 < choice.efficiency <= 1
        ('(all)', 'KFAC', True)
    """

    layer: str
    approximation: str
    measure: str
    efficiency: float
    damping: float
    absolute_damping: float | None
    refresh: float | None
    step: float | None
    bytes: int | None
    alike: tuple[str, ...]


@dataclass(frozen=True)
class Recommendation:
    """What `Comparison.recommend` found.

    Attributes:
        choices: the network first, where it was measured, then layer by layer.
        optimizer: the line of Python that trains with the first of them; None where no optimizer
            takes it.
        own: approximations that were left aside: the exact block of these very examples.
        titles: of the layers, with shapes.

    Example:
        >>> found = fl.compare(model, loss, (x, y), [fl.KFAC()], progress=False)
        >>> "fl.KFAC()" in found.recommend().optimizer
        True
    """

    choices: tuple[Choice, ...]
    optimizer: str | None
    own: tuple[str, ...]
    titles: Mapping[str, str]

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 110) -> str:
        """As a table with the optimizer's line below it.

        Args:
            width: characters per line.
        """
        head = ("", "take", "keeps", "damping", "refresh", "step", "size", "as good by chance")
        lines: list[tuple[str, ...]] = [head]
        for choice in self.choices:
            lines.append(self._line(choice))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        first = self.choices[0]
        found = [f"What to use: steps judged at a damping of {first.damping:g} tr F / d"]
        for line in lines:
            found += _wrapped(line, widths, width)
        if first.measure == LAYERED and first.layer == ALL:
            found.append("What couples layers is left out: measure network_efficiency for it.")
        if self.own:
            labels = ", ".join(self.own)
            found.append(f"Left aside, as the exact block of these very examples: {labels}.")
        if self.optimizer is not None:
            found.append(f"opt = {self.optimizer}")
        return "\n".join(printable(line) for line in found)

    def _line(self, choice: Choice) -> tuple[str, ...]:
        return (
            self.titles[choice.layer],
            choice.approximation,
            f"{choice.efficiency:.4f}",
            "-" if choice.absolute_damping is None else f"{choice.absolute_damping:.1e}",
            _milliseconds(choice.refresh),
            _milliseconds(choice.step),
            "-" if choice.bytes is None else readable(choice.bytes),
            ", ".join(choice.alike),
        )


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms"


def _wrapped(line: tuple[str, ...], widths: list[int], width: int) -> list[str]:
    """The cells of a line; the last one goes on below itself."""
    cells = []
    for index, (cell, own) in enumerate(zip(line, widths, strict=False)):
        cells.append(cell.ljust(own) if index < 2 else cell.rjust(own))
    start = "  ".join(cells) + "  "
    room = max(20, width - len(start))
    parts = textwrap.wrap(line[-1], room) or [""]
    indent = " " * len(start)
    return [start + parts[0], *(indent + part for part in parts[1:])]


def recommend(comparison: Measurements, damping: float | None = None) -> Recommendation:
    """What to use for the network and for every layer.

    Args:
        comparison: with an efficiency.
        damping: at which steps are judged, relative to tr F / d; None for 0.01 where it was
            measured, else the middle one.

    Raises:
        ValueError: if no efficiency was measured, or none at that damping.
    """
    judged = [row for row in comparison.rows if row.error in (LAYERED, NETWORK)]
    damping = _damping(judged, damping)
    rows = [row for row in judged if row.damping == damping]
    own = tuple(comparison.settings.own or ())
    choices = []
    titles = {}
    for layer in [ALL, *comparison.layers]:
        found = _of_layer(comparison, rows, layer, own)
        if not found:
            continue
        choices.append(_choice(comparison, found))
        titles[layer] = _title(comparison, layer, found[0].error)
    if not choices:
        raise ValueError(
            "Got no efficiency of an approximation, expected one at least; compare approximations "
            "with a finite step."
        )
    return Recommendation(tuple(choices), _optimizer(comparison, choices[0]), own, titles)


def _damping(rows: Iterable[Row], asked: float | None) -> float:
    """The damping at which steps are judged."""
    measured = sorted({row.damping for row in rows if row.damping is not None})
    if not measured:
        raise ValueError(
            f"Got no {LAYERED} and no {NETWORK}, expected one of them, which say how good a step "
            f'is; measure it, as compare(..., errors=["default", "{NETWORK}"]) does.'
        )
    if asked is None:
        return DAMPING if DAMPING in measured else measured[len(measured) // 2]
    if number(asked) not in measured:
        known = ", ".join(f"{value:g}" for value in measured)
        raise ValueError(f"Got damping={shown(asked)}, expected one of those measured: {known}.")
    return number(asked)


def _of_layer(
    comparison: Measurements, rows: Iterable[Row], layer: str, own: tuple[str, ...]
) -> list[Row]:
    """The rows that judge the candidates of a layer, by one measure."""
    candidates = comparison.settings.approximations
    if not isinstance(candidates, list):  # files of before do not tell
        candidates = comparison.approximations
    of_layer = []
    for row in rows:
        if row.layer == layer and row.approximation in candidates and math.isfinite(row.value):
            of_layer.append(row)
    by_network = [row for row in of_layer if row.error == NETWORK]
    found = by_network or of_layer
    others = [row for row in found if row.approximation not in own]
    return others or found


def _choice(comparison: Measurements, rows: list[Row]) -> Choice:
    """The cheapest of those that are as good as the best."""
    best = max(rows, key=lambda row: row.value)
    nearly = [row for row in rows if row.value >= NEARLY * best.value]
    costs = {row.approximation: _cost(comparison, row.layer, row.approximation) for row in nearly}
    taken = min(nearly, key=lambda row: (_bytes(costs[row.approximation]), -row.value))
    cost = costs[taken.approximation]
    near = [row for row in rows if _is_near(comparison, best, row)]
    assert taken.damping is not None
    return Choice(
        layer=taken.layer,
        approximation=taken.approximation,
        measure=taken.error,
        efficiency=taken.value,
        damping=taken.damping,
        absolute_damping=_absolute(comparison, taken.layer, taken.damping),
        refresh=None if cost is None or cost.inverse is None else cost.seconds + cost.inverse,
        step=None if cost is None else cost.step,
        bytes=None if cost is None else cost.bytes,
        alike=tuple(row.approximation for row in near if row is not taken),
    )


def _is_near(comparison: Measurements, best: Row, row: Row) -> bool:
    """Whether chance or rounding could have made one of them the better."""
    gap = best.value - row.value
    if gap <= best.noise + row.noise:
        return True
    stderr = _paired_error(comparison, best, row)
    return stderr is not None and gap <= SURE * stderr


def _paired_error(comparison: Measurements, one: Row, other: Row) -> float | None:
    """The standard error of the difference of two rows, where it was measured."""
    for table in comparison.covariances:
        key = (table["layer"], table["error"], table.get("damping"))
        names = table["approximations"]
        if key != (one.layer, one.error, one.damping):
            continue
        if one.approximation in names and other.approximation in names:
            i = names.index(one.approximation)
            j = names.index(other.approximation)
            C = table["matrix"]
            variance = C[i][i] + C[j][j] - 2 * C[i][j]
            return math.sqrt(max(0.0, variance))
    return None


def _bytes(cost: Cost | None) -> float:
    return math.inf if cost is None else cost.bytes


def _cost(comparison: Measurements, layer: str, label: str) -> Cost | None:
    """What an approximation takes on a layer, or on all of them; None where that is not known."""
    layers = comparison.layers if layer == ALL else [layer]
    parts = []
    for cost in comparison.costs:
        if cost.approximation == label and cost.layer in layers:
            parts.append(cost)
    if not parts or (layers and len(parts) < len(layers)):
        return None
    return Cost(
        layer,
        label,
        sum(part.seconds for part in parts),
        sum(part.bytes for part in parts),
        _sum(part.inverse for part in parts),
        _sum(part.step for part in parts),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _absolute(comparison: Measurements, layer: str, damping: float) -> float | None:
    """Lambda = damping tr F / d of a layer, or of the network."""
    layers = comparison.layers if layer == ALL else [layer]
    trace = 0.0
    dim = 0
    for name in layers:
        shape = comparison.settings.about(name).shape
        traces = []
        for numbers in comparison.quantities:
            if numbers.get("layer") == name and numbers.get("trace_exact") is not None:
                traces.append(float(numbers["trace_exact"]))
        if shape is None or not traces:
            return None
        trace += traces[0]
        dim += shape[0] * shape[1]
    if dim == 0:
        return None
    return damping * trace / dim


def _title(comparison: Measurements, layer: str, measure: str) -> str:
    """A layer's name with its shape."""
    if layer == ALL:
        return "network" if measure == NETWORK else "all layers"
    shape = comparison.settings.about(layer).shape
    name = layer or "(model)"
    if shape is None:
        return name
    return f"{name}  {shape[0]}x{shape[1]}"


def _optimizer(comparison: Measurements, choice: Choice) -> str | None:
    """The line that trains with a choice."""
    code = (comparison.settings.code or {}).get(choice.approximation)
    if code is None or choice.absolute_damping is None:
        return None
    damping = f"damping={choice.absolute_damping:.2g}"
    return f"fl.NaturalGradient(model, likelihood, {code}, {damping}, {DEFAULTS})"
