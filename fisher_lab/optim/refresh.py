"""From moments to the damped inverses that the steps apply: assembled, factorised in batches, rescued where that fails.

A refresh waits for the device once, when it reads all flags at once (and where eigendecompositions wait by themselves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, shifted_power, spd_inverse, symmetrize
from fisher_lab.approximations import Approximation, MiniBlock
from fisher_lab.matrices import BlockDiagonal, DirectSum, FisherMatrix, Kronecker
from fisher_lab.optim.finite import all_finite
from fisher_lab.optim.layer_state import LayerCurvature
from fisher_lab.optim.stacking import part, signature, stacked

JITTER = 1e-8  # first jitter after a failed factorisation, relative to the mean eigenvalue; then ten times as much

Settings = Mapping[str, Any]  # a parameter group


def prepare(approximation: Approximation, matrix: FisherMatrix, settings: Settings, jitter: float) -> FisherMatrix:
    """(matrix + damping)^exponent as the trainer applies it."""
    damping: float | Tensor = settings["damping"]
    if jitter:
        damping = damping + jitter * matrix.trace() / matrix.dim
    shared = isinstance(approximation, MiniBlock) and approximation.linear in ("row_avg", "col_avg")
    if shared and isinstance(matrix, Kronecker) and (isinstance(damping, Tensor) or damping > 0):
        # one factor is the identity, so that exact damping is a shift of the other: no eigendecomposition
        return Kronecker(tuple(f if f.ndim == 2 else _shifted_inverse(f, damping) for f in matrix.factors))
    return matrix.powered(approximation.exponent, damping, settings["damping_style"])


def _shifted_inverse(M: Tensor, damping: float | Tensor) -> Tensor:
    return spd_inverse(symmetrize(M) + damping * torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))


def refresh(curvatures: Sequence[LayerCurvature], settings: Sequence[Settings], extra: Tensor) -> tuple[list[str], Any]:
    """New matrices and inverses; the last good ones stay where that fails. One host read, and eigh's own waits.

    Layers of equal structure and settings are factorised in one batched call.

    Args:
        curvatures: layers that have been observed.
        settings: the parameter group of each.
        extra: a 1-d tensor of counters to read along.

    Returns:
        One sentence for each layer where something failed, and the counters.
    """
    candidates = [c.approximation.assemble(c.moments, c.matrix) for c in curvatures if c.moments is not None]
    inverses = _prepare_all(curvatures, candidates, settings)
    flags = [all_finite(matrix.tensors().values()) for matrix in candidates]
    flags += [all_finite(inverse.tensors().values()) for inverse in inverses]
    seen = [c.seen() for c in curvatures]
    read = torch.cat([torch.stack([*flags, *seen]).to(extra.dtype), extra])
    values = [1.0] * len(read) if read.is_meta else read.tolist()  # the one host read of a refresh
    n = len(curvatures)
    notes = []
    for i, c in enumerate(curvatures):
        if not values[2 * n + i]:  # no finite observation yet: nothing to apply
            continue
        inverse: FisherMatrix | None = inverses[i]
        if not values[i]:
            notes.append(f"layer {c.layer.name!r}: the matrix overflowed, the last good one stays")
            continue
        if not values[n + i]:
            inverse = _rescue(c, candidates[i], settings[i])
            notes.append(
                f"layer {c.layer.name!r}: the factorisation failed, "
                + (f"jitter is now {c.jitter:g}" if inverse is not None else "the last good inverse stays")
            )
        if inverse is not None:
            assert c.moments is not None
            c.matrix, c.inverse = candidates[i].with_tensors(candidates[i].tensors()), inverse  # without its eigenpairs
            c.moments = c.approximation.carry(c.moments, c.matrix)
    return notes, [0.0] * len(extra) if read.is_meta else values[3 * n :]


def _prepare_all(
    curvatures: Sequence[LayerCurvature], matrices: Sequence[FisherMatrix], settings: Sequence[Settings]
) -> list[FisherMatrix]:
    inverses: list[FisherMatrix | None] = [None] * len(matrices)
    for members in buckets(curvatures, matrices, settings):
        first = members[0]
        joined = stacked([matrices[i] for i in members])
        inverse = prepare(curvatures[first].approximation, joined, settings[first], curvatures[first].jitter)
        for position, i in enumerate(members):
            inverses[i] = part(inverse, position, len(members))
    return [inverse for inverse in inverses if inverse is not None]


def buckets(
    curvatures: Sequence[LayerCurvature], matrices: Sequence[FisherMatrix], settings: Sequence[Settings]
) -> list[list[int]]:
    """Indices of layers whose matrices can be worked on as one: equal structure, group and approximation, no jitter."""
    found: dict[Any, list[int]] = {}
    for i, (c, matrix) in enumerate(zip(curvatures, matrices, strict=True)):
        kind = signature(matrix)
        alone = kind is None or c.jitter > 0
        key = i if alone else (kind, id(settings[i]), c.approximation.label, matrix.dtype, matrix.device)
        found.setdefault(key, []).append(i)
    return list(found.values())


def _rescue(c: LayerCurvature, matrix: FisherMatrix, settings: Settings) -> FisherMatrix | None:
    """A failed inverse again: with more jitter, then in float64, then by eigendecomposition; None if nothing helps."""
    c.jitter = max(10 * c.jitter, JITTER)
    double = matrix.to(matrix.device, torch.float64)
    attempts = [
        lambda: prepare(c.approximation, matrix, settings, c.jitter),
        lambda: prepare(c.approximation, double, settings, c.jitter),
        lambda: _by_eigh(double, c.approximation.exponent, settings["damping"]),
    ]
    for attempt in attempts:
        try:
            inverse = attempt()
        except torch.linalg.LinAlgError:  # eigh did not converge
            continue
        inverse = inverse.to(matrix.device, matrix.dtype)
        if bool(all_finite(inverse.tensors().values())):
            return inverse
    return None


def _by_eigh(matrix: FisherMatrix, p: float, damping: float) -> FisherMatrix:
    """(matrix + damping)^p by eigendecompositions with eigenvalues clamped at zero."""
    if isinstance(matrix, DirectSum):
        return DirectSum(tuple(_by_eigh(piece, p, damping) for piece in matrix.parts))
    if isinstance(matrix, BlockDiagonal):
        values, vectors = eigh(matrix.blocks)
        powers = (vectors * shifted_power(values, p, damping).unsqueeze(-2)) @ vectors.transpose(-1, -2)
        return BlockDiagonal(powers, matrix.weight_shape, matrix.groups)
    return matrix.powered(p, damping)
