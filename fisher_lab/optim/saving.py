"""Curvature as plain containers of tensors and back, so that checkpoints load with
`weights_only=True`.

A structure is told by the words it is stored under, {"matrix": its class, ...}, {"moments": ...},
{"stats": {...}}. No name of a tensor is mistaken for one: under these words stand strings and
dictionaries, never tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisher_lab.approximations import Moments
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats, Sums


def encode(value: Any) -> Any:
    """Tensors, numbers, tuples, statistics, moments and FisherMatrices as dictionaries of plain
    things.
    """
    if isinstance(value, FisherMatrix):
        return {"matrix": type(value).__name__, "fields": _encoded_fields(value)}
    if isinstance(value, Moments):
        return {"moments": type(value).__name__, "fields": _encoded_fields(value)}
    if isinstance(value, Sums):
        return encode(value.stats)
    if isinstance(value, LayerStats):
        return {"stats": {"a": value.a, "g": value.g, "kernel": value.kernel, "bias": value.bias}}
    if isinstance(value, tuple):
        return tuple(encode(item) for item in value)
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


def _encoded_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name."""
    return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}


def decode(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """What `encode` made.

    Args:
        value: plain containers.
        device: where its tensors go.
        dtype: of those that are floating-point numbers.

    Raises:
        ValueError: a structure that is not known (its class was not imported).
    """

    def inner(item: Any) -> Any:
        return decode(item, device, dtype)

    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, tuple | list):
        return tuple(inner(item) for item in value)
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("matrix"), str):
        return _built(FisherMatrix, value["matrix"], _present_fields(value), inner)
    if isinstance(value.get("moments"), str):
        return _built(Moments, value["moments"], value["fields"], inner)
    if isinstance(value.get("stats"), dict):
        return LayerStats(**inner(value["stats"]))
    return {key: inner(item) for key, item in value.items()}


def _built(family: type, name: str, fields: dict[str, Any], inner: Callable[[Any], Any]) -> Any:
    """A dataclass from its encoded fields.

    Args:
        family: which its class belongs to.
        name: of the class.
        fields: encoded.
        inner: what decodes them.
    """
    known = {cls.__name__: cls for cls in _subclasses(family)}
    if name not in known:
        raise ValueError(
            f"The checkpoint holds a {name}, expected one of {', '.join(sorted(known))}; import "
            "the module that defines it first."
        )
    return known[name](**{key: inner(item) for key, item in fields.items()})


def _present_fields(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a matrix by their present names."""
    fields = dict(value["fields"])
    if value["matrix"] in ("LowRank", "ShiftedLowRank") and "stats" in fields:
        fields["sums"] = fields.pop("stats")  # as in version 1
    return fields


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    found = []
    for sub in direct:
        found.append(sub)
        found += _subclasses(sub)
    return found


def copied(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of a checkpoint on a device, and never the checkpoint's own."""
    return None if tensor is None else tensor.to(device, copy=True)
