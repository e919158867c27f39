"""What was asked of compare: candidates, dampings, and the settings that let a result be trusted later."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fisher_lab._ground.arguments import number
from fisher_lab._passes.batches import checksum
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, check_approximation, default_approximations
from fisher_lab.errors import Measure
from fisher_lab.matrices import FisherMatrix

Matrices = Mapping[str, FisherMatrix]
READY = ", or {name: {layer: FisherMatrix}} for ready matrices"


def named(approximations: Any) -> dict[str, Approximation | Matrices]:
    """Candidates by label."""
    if approximations is None:
        approximations = default_approximations()
    if isinstance(approximations, Mapping):
        named = dict(approximations)
        for name, candidate in named.items():
            if not isinstance(name, str):
                raise TypeError(f"Got {name!r} as the name of an approximation, expected text.")
            if not isinstance(candidate, Mapping):
                check_approximation(candidate, READY)
    else:
        named = {}
        several = isinstance(approximations, Iterable) and not isinstance(approximations, str | type)
        for candidate in approximations if several else [approximations]:
            check_approximation(candidate, READY)
            if candidate.label in named:
                raise ValueError(f"Got {candidate.label} twice, expected every approximation once.")
            named[candidate.label] = candidate
    if not named:
        raise ValueError("Got no approximations, expected at least one, or None for all.")
    return named


def check_ready(candidates: dict[str, Approximation | Matrices], source: Source) -> None:
    """Ready matrices must cover the layers with the right shapes."""
    for label, candidate in candidates.items():
        if isinstance(candidate, Approximation):
            continue
        for name, layer in source.layers.items():
            matrix = candidate.get(name) if isinstance(candidate, Mapping) else None
            if not isinstance(matrix, FisherMatrix) or tuple(matrix.shape) != tuple(layer.shape):
                found = f"a matrix over {tuple(matrix.shape)}" if isinstance(matrix, FisherMatrix) else "none"
                raise ValueError(
                    f"{label} has {found} for layer {name!r}, expected a FisherMatrix over {tuple(layer.shape)}; "
                    "name its layers with layers=[...]."
                )


def check_dampings(dampings: Any) -> tuple[float, ...]:
    """Dampings as positive finite numbers, each once."""
    alone = not math.isnan(number(dampings)) or not isinstance(dampings, Iterable)
    values = [dampings] if alone else list(dampings)
    if not values or not all(0 < number(d) < math.inf for d in values):
        raise ValueError(f"Got dampings={dampings!r}, expected positive finite numbers relative to tr F / d.")
    return tuple(dict.fromkeys(float(d) for d in values))


def all_settings(
    source: Source,
    candidates: dict[str, Any],
    wanted: list[Measure],
    dampings: Sequence[float],
    exact: str,
    problem: Mapping[str, Any] | None,
    fingerprint: str,
) -> dict[str, Any]:
    """Everything needed to trust the result later."""
    layers = {
        name: {"type": type(layer.module).__name__, "shape": list(layer.shape), "bias": layer.bias} | layer.notes()
        for name, layer in source.layers.items()
    }
    return {
        "problem": dict(problem or {}),
        "model": type(source.model).__name__,
        "parameters": sum(p.numel() for p in source.model.parameters()),
        "fisher": source.fisher, "likelihood": repr(source.likelihood), "N": source.N, "R": source.R,
        "output": list(source.outputs), "seed": source.seed, "dtype": str(source.dtype).removeprefix("torch."),
        "device": str(next(source.model.parameters()).device), "exact": exact, "layers": layers,
        "left_out": dict(source.selection.left_out), "approximations": list(candidates),
        "candidates": {label: _described(candidate) for label, candidate in candidates.items()},
        "errors": [m.name for m in wanted], "dampings": [float(d) for d in dampings], "fingerprint": fingerprint,
        "versions": {name: _version(name) for name in ("fisher-lab", "torch", "numpy", "scipy")}
        | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _described(candidate: Any) -> str:
    """What tells one candidate from another: its options, or a checksum of ready matrices."""
    if isinstance(candidate, Approximation):
        return repr(candidate) if type(candidate).__repr__ is not object.__repr__ else candidate.label
    crc = 0
    for name in sorted(candidate):
        for tensor in candidate[name].tensors().values():
            crc = checksum(tensor, crc)
    return f"ready matrices {crc:08x}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
