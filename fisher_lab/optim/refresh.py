"""From moments to the damped inverses that the steps apply.

Matrices are assembled, factorised in batches, and rescued where that fails.

A refresh waits for the device once, when it reads all flags at once (and where eigendecompositions
wait by themselves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab.approximations import Approximation
from fisher_lab.matrices import FisherMatrix
from fisher_lab.optim.finite import all_finite
from fisher_lab.optim.layer_state import LayerCurvature
from fisher_lab.optim.reductions import Reductions
from fisher_lab.optim.saving import decode, encode
from fisher_lab.optim.vectors import Bucket

# first jitter after a failed factorisation, relative to the mean eigenvalue; then ten times as much
JITTER = 1e-8

Settings = Mapping[str, Any]  # a parameter group


def prepare(
    approximation: Approximation, matrix: FisherMatrix, settings: Settings, jitter: float
) -> FisherMatrix:
    """(matrix + damping)^exponent as the trainer applies it."""
    damping: float | Tensor = settings["damping"]
    if jitter:
        mean = matrix.trace() / matrix.dim
        damping = damping + jitter * mean
    style = settings["damping_style"]
    if matrix.damps_exactly:
        style = "exact"
    return matrix.powered(approximation.exponent, damping, style)


@dataclass
class Candidate:
    """What a refresh makes for one layer.

    Attributes:
        curvature: the layer's.
        settings: its parameter group.
        matrix: assembled from the moments.
        inverse: prepared from the matrix.
    """

    curvature: LayerCurvature
    settings: Settings
    matrix: FisherMatrix
    inverse: FisherMatrix


class Verdict(NamedTuple):
    """What was read of one candidate: 0 or 1 each.

    Attributes:
        seen: whether anything finite was observed so far.
        matrix: whether the matrix is finite.
        inverse: whether the inverse is.
    """

    seen: float
    matrix: float
    inverse: float


def refresh(
    curvatures: Sequence[LayerCurvature], settings: Sequence[Settings], extra: Tensor
) -> tuple[list[str], list[float]]:
    """New matrices and inverses; the last good ones stay where that fails.

    There is one host read, besides eigh's own waits. Layers of equal structure and settings are
    factorised in one batched call.

    Args:
        curvatures: layers that have been observed.
        settings: the parameter group of each.
        extra: a 1-d tensor of counters to read along.

    Returns:
        One sentence for each layer where something failed, and the counters.
    """
    outcomes, counters = _outcomes(curvatures, settings, extra)
    return _taken(curvatures, outcomes), counters


def refresh_dealt(
    curvatures: Sequence[LayerCurvature],
    settings: Sequence[Settings],
    extra: Tensor,
    owners: Mapping[str, int],
    reductions: Reductions,
) -> tuple[list[str], list[float]]:
    """The same in several processes, of which each makes the matrices and inverses of its layers,
    rescues included, and sends them to the others.

    Args:
        curvatures: layers that have been observed.
        settings: the parameter group of each.
        extra: a 1-d tensor of counters to read along.
        owners: the rank of every layer.
        reductions: what sends them.
    """
    own = []
    own_settings = []
    for c, group in zip(curvatures, settings, strict=True):
        if owners[c.layer.name] == reductions.ranks.own:
            own.append(c)
            own_settings.append(group)
    made: list[Outcome] = []
    counters: list[float] = []

    def work() -> None:
        outcomes, read = _outcomes(own, own_settings, extra)
        made.extend(outcomes)
        counters.extend(read)

    reductions.ranks.agreed(work)
    sent = {}
    for c, outcome in zip(own, made, strict=True):
        sent[c.layer.name] = outcome.encoded()
    received = reductions.exchanged(sent)
    outcomes = []
    for c in curvatures:
        outcome = Outcome.decoded(received[c.layer.name], extra.device)
        outcomes.append(outcome)
    return _taken(curvatures, outcomes), counters


class Outcome(NamedTuple):
    """What a refresh gives to one layer.

    Attributes:
        note: what went wrong; None for nothing.
        jitter: of the layer from now on.
        matrix: the new one; None where the last good one stays.
        inverse: of the matrix.
    """

    note: str | None
    jitter: float
    matrix: FisherMatrix | None = None
    inverse: FisherMatrix | None = None

    def encoded(self) -> dict[str, Any]:
        """As plain containers of tensors."""
        return {
            "note": self.note,
            "jitter": self.jitter,
            "matrix": encode(self.matrix),
            "inverse": encode(self.inverse),
        }

    @classmethod
    def decoded(cls, found: dict[str, Any], device: torch.device) -> Outcome:
        """The inverse of `encoded`."""
        matrices = {}
        for name in ("matrix", "inverse"):
            matrices[name] = decode(found[name], device, None)
        return cls(found["note"], found["jitter"], **matrices)


def _outcomes(
    curvatures: Sequence[LayerCurvature], settings: Sequence[Settings], extra: Tensor
) -> tuple[list[Outcome], list[float]]:
    """New matrices and inverses of some layers, and the counters."""
    matrices = []
    for c in curvatures:
        matrix = c.assembled()
        matrices.append(matrix)
    inverses = _prepare_all(curvatures, matrices, settings)
    candidates = []
    for c, group, matrix, inverse in zip(curvatures, settings, matrices, inverses, strict=True):
        candidate = Candidate(c, group, matrix, inverse)
        candidates.append(candidate)
    verdicts, counters = _read(candidates, extra)
    outcomes = []
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        outcome = _judged(candidate, verdict)
        outcomes.append(outcome)
    return outcomes, counters


def _taken(curvatures: Sequence[LayerCurvature], outcomes: Sequence[Outcome]) -> list[str]:
    """Let the steps use what was made; one sentence for each layer where something failed."""
    notes = []
    for c, outcome in zip(curvatures, outcomes, strict=True):
        c.jitter = outcome.jitter
        if outcome.matrix is not None and outcome.inverse is not None:
            c.accept(outcome.matrix, outcome.inverse)
        if outcome.note is not None:
            notes.append(f"layer {c.layer.name!r}: {outcome.note}")
    return notes


def _prepare_all(
    curvatures: Sequence[LayerCurvature],
    matrices: Sequence[FisherMatrix],
    settings: Sequence[Settings],
) -> list[FisherMatrix]:
    """The inverse of every matrix."""
    inverses = list(matrices)  # each of them is replaced
    for members in buckets(curvatures, matrices, settings):
        alike = [matrices[i] for i in members]
        together = _stacked(alike)
        # all members share approximation, settings and jitter
        first = members[0]
        c = curvatures[first]
        inverse = prepare(c.approximation, together, settings[first], c.jitter)
        for position, i in enumerate(members):
            inverses[i] = inverse.part(position, len(members))
    return inverses


def _read(candidates: Sequence[Candidate], extra: Tensor) -> tuple[list[Verdict], list[float]]:
    """The verdicts on all candidates, and the counters: the one host read of a refresh."""
    flags = []
    for candidate in candidates:
        seen = candidate.curvature.seen()
        matrix = is_finite(candidate.matrix)
        inverse = is_finite(candidate.inverse)
        flags += [seen, matrix, inverse]
    together = extra
    if flags:  # a rank may have no layer
        numbers = torch.stack(flags)
        together = torch.cat([numbers.to(extra.dtype), extra])
    if together.is_meta:  # nothing to read: all is well
        good = [Verdict(1, 1, 1)] * len(candidates)
        zeros = [0.0] * len(extra)
        return good, zeros
    values = together.tolist()
    verdicts = []
    for _ in candidates:
        seen, matrix, inverse, *values = values
        verdict = Verdict(seen, matrix, inverse)
        verdicts.append(verdict)
    return verdicts, values


def _judged(candidate: Candidate, verdict: Verdict) -> Outcome:
    """A candidate that the steps may use; where it is no good, what is done instead."""
    c = candidate.curvature
    if not verdict.seen:
        # nothing to apply yet
        return Outcome(None, c.jitter)
    if not verdict.matrix:
        return Outcome("the matrix overflowed, the last good one stays", c.jitter)
    inverse = candidate.inverse
    note = None
    if not verdict.inverse:
        rescued = _rescue(candidate)
        if rescued is None:
            return Outcome("the factorisation failed, the last good inverse stays", c.jitter)
        inverse = rescued
        note = f"the factorisation failed, jitter is now {c.jitter:g}"
    # what the matrix remembers of its factorisation is in the inverse
    matrix = candidate.matrix.forgetful()
    return Outcome(note, c.jitter, matrix, inverse)


def buckets(
    curvatures: Sequence[LayerCurvature],
    matrices: Sequence[FisherMatrix],
    settings: Sequence[Settings],
) -> list[list[int]]:
    """Indices of layers whose matrices can be worked on as one.

    They are of equal structure, group and approximation, and without jitter.

    Args:
        curvatures: the layers.
        matrices: one of each: its matrix or its inverse.
        settings: the parameter group of each.
    """
    found: dict[Any, list[int]] = {}
    for i, (c, matrix, group) in enumerate(zip(curvatures, matrices, settings, strict=True)):
        kind = matrix.signature
        key: Any = (kind, id(group), c.approximation.label, matrix.dtype, matrix.device)
        if kind is None or c.jitter > 0:
            # alone
            key = i
        alike = found.setdefault(key, [])
        alike.append(i)
    return list(found.values())


def joined(curvatures: Sequence[LayerCurvature], group: Settings) -> list[Bucket]:
    """The inverses of a group's layers, those of equal structure as one matrix, which they share.

    Args:
        curvatures: of the group's layers, in order; those without an inverse are left out.
        group: the group.
    """
    positions = []
    prepared = []
    inverses = []
    for position, c in enumerate(curvatures):
        if c.inverse is not None:
            positions.append(position)
            prepared.append(c)
            inverses.append(c.inverse)
    found = []
    settings = [group] * len(prepared)
    for alike in buckets(prepared, inverses, settings):
        members = [positions[i] for i in alike]
        own = [inverses[i] for i in alike]
        together = _stacked(own)
        # the layers look into the joined matrix, so that no inverse is held twice
        for place, i in enumerate(alike):
            prepared[i].inverse = together.part(place, len(alike))
        found.append(Bucket(members, together))
    return found


def _stacked(matrices: Sequence[FisherMatrix]) -> FisherMatrix:
    """Matrices of one signature as one."""
    return matrices[0].stack(matrices[1:])


def _rescue(candidate: Candidate) -> FisherMatrix | None:
    """A failed inverse again; None if nothing helps."""
    c = candidate.curvature
    settings = candidate.settings
    matrix = candidate.matrix
    c.jitter = max(10 * c.jitter, JITTER)
    double = matrix.to(matrix.device, torch.float64)
    exponent = c.approximation.exponent
    # the cheapest first: more jitter, the same in float64, an eigendecomposition
    attempts = [
        lambda: prepare(c.approximation, matrix, settings, c.jitter),
        lambda: prepare(c.approximation, double, settings, c.jitter),
        lambda: double.rescued(exponent, settings["damping"]),
    ]
    for attempt in attempts:
        try:
            inverse = attempt()
        except (torch.linalg.LinAlgError, ValueError):
            # eigh did not converge, or a structure has only the dense default and that does not fit
            # into the memory
            continue
        inverse = inverse.to(matrix.device, matrix.dtype)
        # a failed factorisation has cost more than this read does
        if bool(is_finite(inverse)):
            return inverse
    return None


def is_finite(matrix: FisherMatrix) -> Tensor:
    """Whether all numbers of a matrix are finite, a 0-d tensor."""
    tensors = matrix.tensors()
    return all_finite(tensors.values())
