"""Curvature as plain containers of tensors and back, so that checkpoints load with `weights_only=True`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats


def encode(value: Any) -> Any:
    """Tensors, numbers, tuples, LayerStats and FisherMatrices as dictionaries of plain things."""
    if isinstance(value, FisherMatrix):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"matrix": type(value).__name__, "fields": fields}
    if isinstance(value, LayerStats):
        return {"stats": {"a": value.a, "g": value.g, "kernel": value.kernel, "bias": value.bias}}
    if isinstance(value, tuple):
        return tuple(encode(item) for item in value)
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """What `encode` made.

    Args:
        value: plain containers.
        device: where its tensors go.
        dtype: of those that are floating-point numbers.

    Raises:
        ValueError: a structure that is not known (its class was not imported).
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, tuple | list):
        return tuple(decode(item, device, dtype) for item in value)
    if isinstance(value, dict) and set(value) == {"matrix", "fields"}:
        known = {cls.__name__: cls for cls in _subclasses(FisherMatrix)}
        if value["matrix"] not in known:
            raise ValueError(
                f"The checkpoint holds a {value['matrix']}, expected one of {', '.join(sorted(known))}; import the "
                "module that defines it first."
            )
        return known[value["matrix"]](**{name: decode(item, device, dtype) for name, item in value["fields"].items()})
    if isinstance(value, dict) and set(value) == {"stats"}:
        return LayerStats(**decode(value["stats"], device, dtype))
    if isinstance(value, dict):
        return {key: decode(item, device, dtype) for key, item in value.items()}
    return value


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return direct + [found for sub in direct for found in _subclasses(sub)]


def copied(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of a checkpoint on a device, and never the checkpoint's own."""
    return None if tensor is None else tensor.to(device, copy=True)
