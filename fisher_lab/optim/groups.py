"""Which layers an optimizer treats, and their settings in groups."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fisher_lab._ground.arguments import check_kind, names_of
from fisher_lab.approximations import Approximation
from fisher_lab.layers import Layer, select
from fisher_lab.optim.options import Settings

# numbers in a factor (of a large embedding) above which a layer is left to the fallback
LARGEST_FACTOR = 4096**2


def choose_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, Layer]:
    """Layers with inputs and output gradients of their own; the rest is left to the fallback.

    Args:
        model: the model.
        names: of layers; None for all that are not too large.

    Raises:
        ValueError: if none is left.
    """
    chosen = {}
    selected = select(model, names, "skip").layers
    for name, layer in selected.items():
        # one whose factor would fill the memory is no one's wish, unless it is named
        too_large = names is None and layer.factor_size() > LARGEST_FACTOR
        if not layer.gradient_form and not too_large:
            chosen[name] = layer
    if not chosen:
        raise ValueError(
            "No layer has an adapter with inputs of its own, expected at least one; use torch's "
            "AdamW."
        )
    return chosen


def make_groups(
    layers: dict[str, Layer],
    settings: Settings,
    groups: Sequence[dict[str, Any]] | None,
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups: those given, and one with the default settings for all other layers.

    Args:
        layers: adapters by name.
        settings: defaults.
        groups: `[{"layers": names, setting: value, ...}]`.
        more: what a group may name beside its layers and settings; it is left to the caller.

    Raises:
        ValueError, TypeError: unknown settings or layers, a layer in two groups, settings out of
            range.
    """
    if groups is not None:
        check_kind("groups", groups, (list, tuple), "a list of dicts: [{'layers': ..., 'lr': ...}]")
    rest = list(layers)
    made = []
    for group in groups or ():
        allowed = [*settings.names(), *more]
        names = _names(group, allowed)
        for name in names:
            if name not in rest:
                known = ", ".join(map(repr, layers))
                raise ValueError(
                    f"Got layer {name!r} in a group, expected one of {known}, each in one group: "
                    "weight and bias of a layer share their settings."
                )
            rest.remove(name)
        changed = {}
        for key in settings.names():
            if key in group:
                changed[key] = group[key]
        # made anew, so that the settings are checked
        own = dataclasses.replace(settings, **changed)
        made.append(_torch_group(layers, names, own))
    # without a layer left there is no group of the others: torch refuses an empty one
    if rest:
        made.append(_torch_group(layers, rest, settings))
    return made


def _names(group: Any, allowed: Sequence[str]) -> list[str]:
    """The layers of a group as a user wrote it."""
    if not isinstance(group, dict):
        raise TypeError(
            f"Got {group!r} as a group, expected a dict: {{'layers': [...], 'lr': ...}}."
        )
    unknown = set(group) - set(allowed) - {"layers"}
    if unknown or "layers" not in group:
        given = ", ".join(sorted(group))
        raise ValueError(
            f"Got a group with {given}, expected 'layers' and any of {', '.join(allowed)}."
        )
    names = names_of("layers", group["layers"])
    if not names:
        raise ValueError(
            "Got a group with layers=[], expected at least one name; leave the group out."
        )
    return names


def _torch_group(layers: dict[str, Layer], names: list[str], settings: Settings) -> dict[str, Any]:
    params: list[nn.Parameter] = []
    for name in names:
        params.extend(layers[name].parameters.values())
    return {**settings.as_group(), "layers": names, "params": params}


class ByLayer(ABC):
    """A rule that chooses the approximation of each layer, in place of one approximation
    for all.

    Example:
        >>> class RowsForTheLast(fl.optim.ByLayer):
        ...     def choose(self, layer, dtype):
        ...         return fl.MiniBlock() if layer.name == "2" else fl.KFAC()
        >>> opt = fl.NaturalGradient(model, loss, RowsForTheLast(), lr=0.1)
    """

    @abstractmethod
    def choose(self, layer: Layer, dtype: torch.dtype) -> Approximation:
        """The approximation of a layer.

        Args:
            layer: its adapter.
            dtype: of the layer's moments and inverse.
        """
