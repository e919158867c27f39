"""Which layers an optimizer treats, and their settings in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fisher_lab._ground.arguments import names_of, number
from fisher_lab.layers import Layer, select

LARGEST_FACTOR = 4096**2  # numbers in a factor (of a large embedding) above which a layer is left to the fallback


def choose_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, Layer]:
    """Layers with inputs and output gradients of their own; the rest is left to the fallback."""
    kept = {
        name: layer
        for name, layer in select(model, names, "skip").layers.items()
        if not layer.gradient_form and (names is not None or layer.factor_size() <= LARGEST_FACTOR)
    }
    if not kept:
        raise ValueError("No layer has an adapter with inputs of its own, expected at least one; use torch's AdamW.")
    return kept


def make_groups(
    layers: dict[str, Layer], settings: dict[str, Any], groups: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Parameter groups: those given, and one with the default settings for all other layers.

    Args:
        layers: adapters by name.
        settings: defaults.
        groups: `[{"layers": names, setting: value, ...}]`; "approximation" is a setting too.

    Raises:
        ValueError: unknown settings or layers, a layer in two groups, settings out of range.
    """
    rest = list(layers)
    made = []
    for group in groups or ():
        if not isinstance(group, dict):
            raise TypeError(f"Got groups={groups!r}, expected a list of dicts: [{{'layers': [...], 'lr': ...}}, ...].")
        if set(group) - set(settings) - {"layers", "approximation"} or "layers" not in group:
            raise ValueError(
                f"Got a group with {', '.join(sorted(group))}, expected 'layers' and any of {', '.join(settings)}, "
                "approximation."
            )
        names = names_of("layers", group["layers"])
        if not names:
            raise ValueError("Got a group with layers=[], expected at least one name; leave the group out.")
        for name in names:
            if name not in rest:
                raise ValueError(
                    f"Got layer {name!r} in a group, expected one of {', '.join(map(repr, layers))}, each in one "
                    "group: weight and bias of a layer share their settings."
                )
            rest.remove(name)
        made.append({**settings, **group, "layers": names})
    if rest:
        made.append({**settings, "layers": rest})
    for group in made:
        check_settings(group)
        group["params"] = [p for name in group["layers"] for p in layers[name].parameters.values()]
    return made


def check_settings(group: dict[str, Any]) -> None:
    """Refuse settings of a group that are out of range."""
    for key in ("lr", "damping", "weight_decay"):
        if key in group and not 0 <= number(group[key]) < math.inf:
            raise ValueError(f"Got {key}={group[key]!r}, expected a finite number >= 0.")
    if not 0 <= number(group["momentum"]) < 1:
        raise ValueError(f"Got momentum={group['momentum']!r}, expected a number from 0 to below 1.")
    choices = {"momentum_order": ("before", "after"), "damping_style": ("exact", "factored")}
    for key, allowed in choices.items():
        if key in group and group[key] not in allowed:
            raise ValueError(f"Got {key}={group[key]!r}, expected one of {', '.join(map(repr, allowed))}.")
