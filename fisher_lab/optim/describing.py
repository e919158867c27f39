"""What `print(optimizer)` says, from plain facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fisher_lab.layers import Layer

UNTOLD = ("params", "layers", "initial_lr")  # entries of a group that are no setting of the user's


def describe_groups(
    groups: Iterable[Mapping[str, Any]], layers: Mapping[str, Layer], methods: Mapping[str, str]
) -> list[str]:
    """Which layer is treated how: a line for every group and one for every layer of it.

    Args:
        groups: torch parameter groups with their layers.
        layers: adapters by name.
        methods: what is done to each layer, in words.
    """
    lines = []
    for group in groups:
        settings = _settings(group)
        lines.append(f"group: {settings}")
        for name in group["layers"]:
            layer = layers[name]
            rows, columns = layer.shape
            kind = type(layer.module).__name__
            method = methods[name]
            lines.append(f"  {name}: {kind} {rows} x {columns}, {method}")
    return lines


def _settings(group: Mapping[str, Any]) -> str:
    """What a user may set of a group, in one line."""
    settings = []
    for key, value in group.items():
        if key not in UNTOLD:
            settings.append(f"{key}={value}")
    return ", ".join(settings)


def describe_fallback(group: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Which parameters are left to AdamW.

    Args:
        group: AdamW's parameter group.
        model: whose parameters these are.
    """
    names = {}
    for name, p in model.named_parameters():
        names[p] = name
    lr = group["lr"]
    title = f"fallback: AdamW, lr={lr}"
    if group.get("fused"):
        title += ", fused"
    lines = [title]
    for p in group["params"]:
        line = "  " + names[p]
        if not p.requires_grad:
            line += " (frozen)"
        lines.append(line)
    return lines


def describe_troubles(troubles: Mapping[str, int]) -> list[str]:
    """What went wrong so far, if anything."""
    lines = []
    for what, count in troubles.items():
        if count:
            lines.append(f"{what}: {count}")
    return lines


def told(skipped: float, lost: float, notes: Sequence[str]) -> list[str]:
    """The sentences of a warning.

    Args:
        skipped: updates skipped since the last warning.
        lost: layer statistics dropped since the last warning.
        notes: what else happened.
    """
    sentences = list(notes)
    if skipped > 0:
        sentences.append(
            f"{skipped:.0f} updates were skipped for non-finite losses, gradients or updates"
        )
    if lost > 0:
        sentences.append(f"{lost:.0f} layer statistics were dropped as non-finite")
    return sentences
