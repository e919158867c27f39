"""One layer measured: its exact block, the matrix of every candidate, and what the measures say of
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_lab import errors as measures
from fisher_lab._ground.progress import Progress
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Exact
from fisher_lab.approximations.exact import is_dense
from fisher_lab.approximations.vocabulary import has_diagonal_rows
from fisher_lab.diagnose.candidates import Candidate
from fisher_lab.diagnose.chance import LAYERED, Gradients, Judged, judged_steps, table
from fisher_lab.diagnose.check import Check
from fisher_lab.diagnose.inside import floor_inside, precision_inside
from fisher_lab.diagnose.plan import SLICED, STREAMED, Group, LayerPlan
from fisher_lab.diagnose.standard_errors import Found, StandardErrors
from fisher_lab.diagnose.steps import NetworkSteps, Step, StepSums
from fisher_lab.errors import (
    BY_PRODUCTS,
    DENSE_DIM,
    MEASURES,
    DampedPair,
    Measure,
    Pair,
    absolute_damping,
    best_decrease,
)
from fisher_lab.estimation.exact import exact_blocks
from fisher_lab.estimation.running import Key, Running, sweep_all
from fisher_lab.layers import VocabularyLayer
from fisher_lab.matrices import FisherMatrix, LowRank, Streamed, VocabularyBlock
from fisher_lab.results import Cost, LayerAbout, Row
from fisher_lab.statistics import LayerStats, Sums, VocabularySums, contractions, sums_over

NO_DIAGONAL = "needs more than a diagonal over the rows of a vocabulary"
NO_INVERSE = "of a vocabulary, whose damped inverse is not formed"
TOO_MANY_COLUMNS = "needs more columns than fit into the memory"
PRODUCTS = 3  # of which the shortest tells the seconds of a step
NO_COLUMNS = "the columns do not fit into the memory"


@dataclass(frozen=True)
class Asked:
    """What is measured of every layer.

    Attributes:
        source: model and data.
        candidates: by label.
        wanted: the measures.
        dampings: relative to tr F / d.
        exact: "captured" or "func".
        check: what every captured block is held against.
        standard_errors: their collector, None where they were not asked for.
        steps: the collector of the whole network's steps.
        work: of every layer, in operations.
    """

    source: Source
    candidates: Mapping[str, Candidate]
    wanted: Sequence[Measure]
    dampings: Sequence[float]
    exact: str
    check: Check
    standard_errors: StandardErrors | None
    steps: NetworkSteps
    work: Mapping[str, float]

    @property
    def damped(self) -> list[Measure]:
        """Measures with one value for each damping."""
        return [m for m in self.wanted if m.damped]

    @property
    def undamped(self) -> list[Measure]:
        """The others."""
        return [m for m in self.wanted if not m.damped]


@dataclass
class LayerResult:
    """Everything that was measured of one layer.

    Attributes:
        layer: its name.
        about: how it was measured.
        rows: the errors.
        costs: seconds and bytes of every candidate.
        quantities: the plain numbers that the errors are made of, so that the matrices can go.
        covariances: with standard errors.
        left_out: what was not measured of it, with the reason.
        steps: its part of the whole network's steps, until it is added to those of other layers.
        judged: by damping and label, what every example says of its steps.
    """

    layer: str
    about: LayerAbout
    rows: list[Row] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    quantities: list[dict[str, Any]] = field(default_factory=list)
    covariances: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    steps: dict[Step, StepSums] = field(default_factory=dict)
    judged: dict[float, dict[str, Judged]] = field(default_factory=dict)


class Blocks:
    """What several layers share and is computed when the first asks for it.

    Args:
        source: model and data.
        names: of the layers that share it.
    """

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.source = source
        self.names = names
        self._exact: dict[str, FisherMatrix] = {}
        self._gradients: dict[str, Tensor] = {}
        self.examples = Gradients(source)

    def exact(self, layer: str) -> FisherMatrix:
        """The block by torch.func."""
        if not self._exact:
            self._exact = exact_blocks(self.source.prepared, self.source.layers, self.names)
        return self._exact[layer]

    def gradient(self, layer: str) -> Tensor:
        """Gradient of the mean loss over W."""
        if not self._gradients:
            self._gradients = self.source.gradients()
        return self._gradients[layer]


def measure_group(
    asked: Asked, group: Group, shared: Blocks, bar: Progress
) -> Iterator[LayerResult]:
    """Build the exact block and every candidate of some layers, and measure them one after the
    other.
    """
    source = asked.source
    kept: dict[str, Sums] = {}
    if group.captured_once:
        (whole,) = source.sweep(group.names)
        kept = {name: sums_over(whole[name]) for name in group.names}
    for sums in kept.values():
        sums.form_gradients(source.budget.for_gradients)
    measurable = {plan.name: _measurable(asked, plan) for plan in group.layers}
    running = _built(asked, group, kept, measurable, bar)
    for plan in group.layers:
        # one step when it is built, one for every candidate
        bar.weigh(asked.work[plan.name] / (len(asked.candidates) + 1))
        known = kept.get(plan.name)
        captured = _captured(source, plan, known, running)
        checked = asked.check.deviation(plan.name, captured)
        block = captured
        if asked.exact == "func":
            block = shared.exact(plan.name)
        _check_scale(plan.name, block)
        bar.advance()
        candidates = measurable[plan.name]
        yield measure_layer(asked, plan, block, checked, running, candidates, known, shared, bar)
        if known is not None:
            known.free()


def _built(
    asked: Asked,
    group: Group,
    kept: Mapping[str, Sums],
    measurable: Mapping[str, Mapping[str, Candidate]],
    bar: Progress,
) -> dict[Key, Running]:
    """The approximations, and the exact blocks that are held densely, through all their passes over
    the data.
    """
    running: dict[Key, Running] = {}
    for plan in group.layers:
        name = plan.name
        bar.say(f"building {name}")
        if _exact_is_built(plan, kept.get(name)):
            running[Key(name, None)] = Running(Exact())
        for label, candidate in measurable[name].items():
            state = candidate.begin()
            if state is not None:
                running[Key(name, label)] = state
    sweep_all(running, asked.source, kept)
    return running


def _exact_is_built(plan: LayerPlan, known: Sums | None) -> bool:
    """Whether the exact block is built like an approximation, piece by piece or densely."""
    if plan.streamed or isinstance(known, VocabularySums):
        return False
    return known is None or is_dense(known.stats)


def _measurable(asked: Asked, plan: LayerPlan) -> dict[str, Candidate]:
    """The candidates, but for those that would hold the columns of a layer that do not fit into the
    memory.
    """
    if isinstance(asked.source.layers[plan.name], VocabularyLayer):
        return {
            label: candidate
            for label, candidate in asked.candidates.items()
            if candidate.approximation is None or has_diagonal_rows(candidate.approximation)
        }
    if not plan.streamed:
        return dict(asked.candidates)
    budget = asked.source.budget
    first = next(_pieces(asked.source, plan.name))
    example = first.examples(slice(0, 1))
    found = {}
    for label, candidate in asked.candidates.items():
        need = budget.for_block(candidate.column_bytes(example, asked.source.N))
        if need <= budget.total:
            found[label] = candidate
    return found


def _captured(
    source: Source, plan: LayerPlan, known: Sums | None, running: Mapping[Key, Running]
) -> FisherMatrix:
    """The exact block from captured columns: read anew, kept, or as a dense matrix."""
    if plan.streamed:
        device = next(source.model.parameters()).device
        one = torch.ones((), dtype=source.dtype, device=device)
        pieces = partial(_pieces, source, plan.name)
        return Streamed(pieces, source.N, source.layers[plan.name].shape, one)
    if isinstance(known, VocabularySums):
        return VocabularyBlock(known)
    state = running.get(Key(plan.name, None))
    if state is None:
        assert known is not None
        return LowRank(known)  # with all that was computed on the way
    assert state.matrix is not None
    return state.matrix


def _pieces(source: Source, name: str) -> Iterator[LayerStats]:
    """One pass over the columns of a layer."""
    for stats in source.sweep([name]):
        yield stats[name]


def _check_scale(name: str, block: FisherMatrix) -> None:
    """Refuse blocks whose squares would overflow or vanish."""
    size = float(block.trace())
    info = torch.finfo(block.dtype)
    least = math.sqrt(info.tiny)
    most = math.sqrt(info.max)
    if size != 0 and not least < size < most:
        raise ValueError(
            f"The exact block of layer {name!r} has trace {size:.1e}, expected between "
            f"{least:.0e} and {most:.0e} in {block.dtype}; rescale the inputs or the loss, or use "
            "float64."
        )


def measure_layer(
    asked: Asked,
    plan: LayerPlan,
    exact: FisherMatrix,
    checked: float,
    running: dict[Key, Running],
    candidates: Mapping[str, Candidate],
    known: Sums | None,
    shared: Blocks,
    bar: Progress,
) -> LayerResult:
    """All errors of all candidates on one layer.

    Args:
        asked: the question.
        plan: of the layer.
        exact: its exact block.
        checked: deviation of the captured block from torch.func.
        running: the approximations built; those of this layer are taken out.
        candidates: that can be measured on it.
        known: its columns and what is known of them, where they are kept.
        shared: what several layers share.
        bar: progress.
    """
    name = plan.name
    if isinstance(exact, LowRank):
        exact.sums.form_gradients(asked.source.budget.for_gradients)
    result = LayerResult(name, _about(asked, plan, exact, checked, running, candidates))
    reason = NO_DIAGONAL if isinstance(exact, VocabularyBlock) else TOO_MANY_COLUMNS
    for label in result.about.left_out or ():
        result.left_out[f"{label} of layer {name!r}"] = reason
    matrices: dict[str, FisherMatrix] = {}
    for label, candidate in candidates.items():
        matrix, cost = candidate.matrix(name, running.pop(Key(name, label), None), exact)
        matrices[label] = matrix
        result.costs.append(cost)
    first: dict[str, DampedPair] = {}
    if _has_damped(asked, plan, result, exact):
        first = _damped_pairs(asked, exact, matrices, shared.gradient(name), asked.dampings[0])
        # before anything else asks for their factorisations
        _timed_steps(result, first, keep=not _by_products(asked))
    bar.say(f"{name}: steps of the whole network")
    result.steps = asked.steps.layer(name, exact, matrices, shared.examples, plan.streamed)
    _measure_undamped(asked, result, exact, matrices, known, bar)
    _measure_damped(asked, result, exact, matrices, first, known, shared, bar)
    return result


def _timed_steps(result: LayerResult, pairs: Mapping[str, DampedPair], keep: bool) -> None:
    """Take the steps of a layer, and put the seconds of inverses and steps beside the costs.

    Args:
        result: of the layer, with the costs of all candidates.
        pairs: by label, of which nothing was asked yet.
        keep: whether the inverses are needed afterwards.
    """
    costs = []
    for cost in result.costs:
        pair = pairs[cost.approximation]
        begin = time.perf_counter()
        inverse = pair.approx_inverse
        inverted = time.perf_counter()
        products = []
        for _ in range(PRODUCTS):  # the first one may have something to prepare
            start = time.perf_counter()
            inverse @ pair.gradient
            products.append(time.perf_counter() - start)
        pair.asked(["yg"])  # which takes the step
        if not keep:
            pair.forget_inverse()
        costs.append(replace(cost, inverse=inverted - begin, step=min(products)))
    result.costs = costs


def _about(
    asked: Asked,
    plan: LayerPlan,
    exact: FisherMatrix,
    checked: float,
    running: Mapping[Key, Running],
    candidates: Mapping[str, Candidate],
) -> LayerAbout:
    """How a layer is measured."""
    layer = asked.source.layers[plan.name]
    route = type(exact).__name__.lower()
    if isinstance(exact, LowRank):
        route = contractions.route(exact.stats)
    left_out = None
    if isinstance(exact, VocabularyBlock):
        route = SLICED
    if plan.streamed:
        route = STREAMED
    if len(candidates) < len(asked.candidates):
        left_out = [label for label in asked.candidates if label not in candidates]
    built = running.get(Key(plan.name, None))
    about = layer_about(layer)
    about["route"] = route
    about["bytes"] = exact.nbytes
    about["seconds"] = None if built is None else built.seconds
    about["checked"] = checked
    if left_out is not None:
        about["left_out"] = left_out
    return about


def layer_about(layer: Any) -> LayerAbout:
    """What is known of a layer before it is measured."""
    known = {
        "type": type(layer.module).__name__,
        "shape": list(layer.shape),
        "bias": layer.bias,
    }
    return LayerAbout({**known, **layer.notes()})


def _measure_undamped(
    asked: Asked,
    result: LayerResult,
    exact: FisherMatrix,
    matrices: Mapping[str, FisherMatrix],
    known: Sums | None,
    bar: Progress,
) -> None:
    """Errors of the matrices themselves, with their standard errors where these were asked for."""
    name = result.layer
    source = asked.source
    pairs = measures.pairs(exact, matrices)
    if any(m.reads("top_difference") for m in asked.undamped):
        bar.say(f"{name}: spectral norms")
        measures.advance(pairs.values(), source.budget.for_lanczos)
    stderr: Found = {}
    if asked.standard_errors is not None and known is not None:
        bar.say(f"{name}: standard errors")
        approximations = {label: asked.candidates[label].approximation for label in pairs}
        stderr = asked.standard_errors.layer(name, known, exact, pairs, approximations)
        result.covariances += asked.standard_errors.taken()
    for label, pair in pairs.items():
        bar.say(f"{name}: {label}")
        _record(asked, result, label, None, pair, stderr)
        bar.advance()


def _has_damped(asked: Asked, plan: LayerPlan, result: LayerResult, exact: FisherMatrix) -> bool:
    """Whether a layer has damped errors; if it has none though they were asked for, it says why."""
    if not asked.damped:
        return False
    if float(exact.trace()) <= 0:
        result.about["damped"] = "left out: F = 0, no damping is relative to it"
        return False
    reason = None
    if plan.streamed:
        reason = NO_COLUMNS
    if isinstance(exact, VocabularyBlock):
        reason = NO_INVERSE
    if reason is None:
        return True
    result.about["damped"] = f"left out: {reason}"
    result.left_out[f"damped errors of layer {plan.name!r}"] = reason
    return False


def _measure_damped(
    asked: Asked,
    result: LayerResult,
    exact: FisherMatrix,
    matrices: Mapping[str, FisherMatrix],
    first: Mapping[str, DampedPair],
    known: Sums | None,
    shared: Blocks,
    bar: Progress,
) -> None:
    """Errors of the damped inverses and steps, for every damping.

    Args:
        asked: the question.
        result: of the layer.
        exact: its exact block.
        matrices: of the candidates, by label.
        first: the pairs of the first damping; empty where the layer has no damped errors.
        known: its columns, where they are kept.
        shared: what several layers share.
        bar: progress.
    """
    name = result.layer
    if not first:
        return
    efficient = any(m.name == LAYERED for m in asked.damped)
    for index, damping in enumerate(asked.dampings):
        bar.say(f"{name}: damping {damping:g}")
        pairs = first
        if index > 0:
            pairs = _damped_pairs(asked, exact, matrices, shared.gradient(name), damping)
        for label, pair in pairs.items():
            _record(asked, result, label, damping, pair, {})
            pair.forget_inverse()
        if efficient and known is not None and shared.examples.kept:
            steps = judged_steps(shared.examples, name, known.stats, pairs)
            values = {label: MEASURES[LAYERED].formula(pair).value for label, pair in pairs.items()}
            result.judged[damping] = steps
            result.covariances += table(name, LAYERED, damping, steps, values)


def _by_products(asked: Asked) -> bool:
    """Whether the damped errors need no inverse of the exact block."""
    return all(m.needs is not None and BY_PRODUCTS.issuperset(m.needs) for m in asked.damped)


def _damped_pairs(
    asked: Asked,
    exact: FisherMatrix,
    matrices: Mapping[str, FisherMatrix],
    gradient: Tensor,
    damping: float,
) -> dict[str, DampedPair]:
    """The pairs of one damping, which share what they need of the exact block."""
    shift = absolute_damping(exact, damping)
    inverse = best = None
    if _by_products(asked) and exact.dim > DENSE_DIM and bool(gradient.any()):
        best = best_decrease(exact, gradient, shift)
    else:
        inverse = exact.powered(-1.0, shift)
    pairs = {}
    for label, matrix in matrices.items():
        pairs[label] = DampedPair(exact, matrix, gradient, damping, inverse, best)
    return pairs


def _record(
    asked: Asked,
    result: LayerResult,
    label: str,
    damping: float | None,
    pair: Pair | DampedPair,
    stderr: Found,
) -> None:
    """Rows of one pair, and the plain numbers behind them."""
    floor = floor_inside(asked.source, pair, damping is not None)
    for m in asked.undamped if damping is None else asked.damped:
        value, noise = m.formula(pair)
        if math.isnan(value):
            raise ValueError(
                f"{m.name} of {label} on layer {result.layer!r} is NaN, expected a number; check "
                "the approximation, or raise the damping."
            )
        noise = max(noise, floor)
        row = Row(
            result.layer,
            label,
            m.name,
            value,
            noise,
            damping,
            result.about.checked,
            asked.source.fisher,
            stderr.get((label, m.name)),
            precision_inside(asked.source),
        )
        result.rows.append(row)
    # the dampings are relative to the traces, whatever is measured
    known = pair.asked(["trace_exact"] if damping is None else []).known()
    result.quantities.append(
        {"layer": result.layer, "approximation": label, "damping": damping, **known}
    )
