"""Lower precision inside the forward pass: what rows say of it, and the noise that it leaves."""

from __future__ import annotations

from typing import Any

import torch

from fisher_lab._passes.source import Source
from fisher_lab.whole_network import NetworkFisher


def precision_inside(source: Source) -> str:
    """The lowest precision of the forward pass, as rows tell it."""
    return str(source.precision).removeprefix("torch.")


def floor_inside(source: Source, numbers: Any, damped: bool) -> float:
    """The noise that lower precision inside the model leaves in the columns, and so in every error;
    0 without.

    A relative rounding error of the columns moves relative errors by about as much, damped ones by
    the condition number of the damped block times as much.

    Args:
        source: model and data.
        numbers: what the errors are made of.
        damped: whether these are damped errors.
    """
    if source.precision == source.dtype:
        return 0.0
    inside = 16 * torch.finfo(source.precision).eps
    if not damped:
        return inside
    own = 16 * torch.finfo(source.dtype).eps
    condition = numbers.rounding / own
    return inside * condition


def network_floor_inside(source: Source, fisher: NetworkFisher, damping: float) -> float:
    """The same of the efficiency of steps of the whole network.

    Args:
        source: model and data.
        fisher: of the whole network.
        damping: relative to tr F / d of the whole network.
    """
    if source.precision == source.dtype:
        return 0.0
    inside = 16 * torch.finfo(source.precision).eps
    # what the numbers of a step know of rounding may be that of an iteration, so not from these
    return inside * fisher.condition(fisher.absolute_damping(damping))
