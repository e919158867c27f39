"""What a training was asked to do, so that going on with something else is noticed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Asked = dict[str, str]


def asked_of(optimizer: torch.optim.Optimizer, schedule: Any, **more: Any) -> Asked:
    """Names and values of all that decides the steps, as texts.

    Args:
        optimizer: before its first step, since a schedule changes its learning rate.
        schedule: a learning rate scheduler, or None.
        **more: what else was asked, by name.
    """
    found: Asked = {"optimizer": type(optimizer).__name__}
    found["schedule"] = "none"
    if schedule is not None:
        found["schedule"] = type(schedule).__name__
    place = ""  # the first group's settings have plain names, as they are mostly the only ones
    for number, group in enumerate(optimizer.param_groups):
        if number > 0:
            place = f" of group {number}"
        for name, value in group.items():
            # a scheduler adds initial_lr
            if name not in ("params", "initial_lr"):
                found[f"{name}{place}"] = _text(value)
    options = getattr(optimizer, "options", None)
    if dataclasses.is_dataclass(options):
        for field in dataclasses.fields(options):
            name = field.name
            if name == "seed":  # a training has one too
                name = "seed of the optimizer"
            value = getattr(options, field.name)
            found[name] = _text(value)
    for name, value in more.items():
        found[name] = _text(value)
    return found


def differences(before: Asked, now: Asked) -> list[str]:
    """Every name whose value differs, as "name=before, expected now", in the order of `now`."""
    found = []
    names = dict.fromkeys((*now, *before))
    for name in names:
        old = before.get(name, "nothing")
        new = now.get(name, "nothing")
        if old != new:
            found.append(f"{name}={old}, expected {new}")
    return found


def _text(value: Any) -> str:
    """The value as a text that is the same in every process."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 asks for the same as 1
    text = repr(value)
    if " at 0x" in text:  # the place of an object in memory
        return type(value).__name__
    return text
