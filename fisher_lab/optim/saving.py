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
    """Tensors, numbers, tuples, statistics, moments and matrices as dictionaries of
    plain things.
    """
    if isinstance(value, FisherMatrix):
        return {"matrix": _name(type(value)), "fields": _encoded_fields(value)}
    if isinstance(value, Moments):
        return {"moments": _name(type(value)), "fields": _encoded_fields(value)}
    if isinstance(value, Sums):
        return encode(value.stats)
    if isinstance(value, LayerStats):
        fields = {
            "a": value.a,
            "g": value.g,
            "kernel": value.kernel,
            "bias": value.bias,
        }
        return {"stats": fields}
    if isinstance(value, tuple):
        return tuple(map(encode, value))
    if isinstance(value, Mapping):
        return _each(value, encode)
    return value


def _encoded_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name."""
    fields = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        fields[field.name] = encode(own)
    return fields


def decode(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """What `encode` made.

    Args:
        value: plain containers.
        device: where its tensors go.
        dtype: of those that are floating-point numbers; None for their own.

    Raises:
        ValueError: a structure that is not known (its class was not imported).
    """

    def inner(item: Any) -> Any:
        return decode(item, device, dtype)

    if isinstance(value, Tensor):
        # indices and counters are no numbers of the working precision
        chosen = value.dtype
        if dtype is not None and value.is_floating_point():
            chosen = dtype
        return value.to(device, chosen, copy=True)
    if isinstance(value, tuple | list):
        # torch.save may give lists where tuples were
        return tuple(map(inner, value))
    if not isinstance(value, dict):
        return value
    # the words of the structures; a dictionary of tensors under the same words is none of them
    if isinstance(value.get("matrix"), str):
        fields = _present_fields(value)
        return _built(FisherMatrix, value["matrix"], fields, inner)
    if isinstance(value.get("moments"), str):
        fields = value["fields"]
        return _built(Moments, value["moments"], fields, inner)
    if isinstance(value.get("stats"), dict):
        fields = inner(value["stats"])
        return LayerStats(**fields)
    return _each(value, inner)


def _each(items: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A function of every value of a dictionary."""
    changed = {}
    for key, item in items.items():
        changed[key] = change(item)
    return changed


def _built(family: type, name: str, fields: dict[str, Any], inner: Callable[[Any], Any]) -> Any:
    """A dataclass from its encoded fields.

    Args:
        family: which its class belongs to.
        name: of the class.
        fields: encoded.
        inner: what decodes them.
    """
    cls = _class(family, name)
    decoded = _each(fields, inner)
    return cls(**decoded)


def _name(cls: type) -> str:
    """What a class is stored under: ours by its name alone, others with their module."""
    if cls.__module__.startswith("fisher_lab."):
        return cls.__name__
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(family: type, name: str) -> type:
    """The class that is stored under a name.

    Args:
        family: which it belongs to.
        name: as of `_name`, or a class's own alone, as in older checkpoints.

    Raises:
        ValueError: where there is none, or one cannot be told from another.
    """
    known = {}
    for cls in _subclasses(family):
        known[_name(cls)] = cls  # the last where a notebook's cell has run twice
    if name in known:
        return known[name]
    # a script's class is in __main__ today and in a module tomorrow: its own name is tried, too
    own = _own_name(name)
    alike = [full for full in sorted(known) if ":" in full and _own_name(full) == own]
    if len(alike) == 1:
        return known[alike[0]]
    if alike:
        raise ValueError(
            f"The checkpoint holds a {name}, which {' and '.join(alike)} are called, expected one; "
            "import only the module of the class that was saved."
        )
    raise ValueError(
        f"The checkpoint holds a {name}, expected one of {', '.join(sorted(known))}; import the "
        "module that defines it first."
    )


def _own_name(name: str) -> str:
    """The last part of a name: that of the class alone."""
    return name.rpartition(":")[2].rpartition(".")[2]


def _present_fields(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a matrix by their present names."""
    fields = dict(value["fields"])
    if value["matrix"] in ("LowRank", "ShiftedLowRank") and "stats" in fields:
        fields["sums"] = fields.pop("stats")  # as in version 1
    return fields


def _subclasses(cls: type) -> list[type]:
    """All classes below a class, a user's own too."""
    direct: list[type] = cls.__subclasses__()
    found = []
    for sub in direct:
        found.append(sub)
        found += _subclasses(sub)
    return found


def copied(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of a checkpoint on a device, and never the checkpoint's own."""
    if tensor is None:
        return None
    return tensor.to(device, copy=True)
