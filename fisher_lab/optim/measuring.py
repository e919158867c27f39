"""What an optimizer is really using: its matrices against the exact Fisher, and a description for people."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from fisher_lab.diagnose import compare
from fisher_lab.results.comparison import Comparison

if TYPE_CHECKING:
    from fisher_lab.optim.natural_gradient import NaturalGradient


def compare_in_use(optimizer: NaturalGradient, data: Any, **options: Any) -> Comparison:
    """Errors of the matrices that an optimizer uses against the exact Fisher at the present weights.

    A copy of the model in evaluation mode is measured, which the settings of the result record.

    Args:
        optimizer: after at least one step.
        data: as in `fl.compare`.
        **options: further arguments of `fl.compare`.
    """
    matrices = optimizer.matrices()
    twin = copy.deepcopy(optimizer.model).eval()
    label = " | ".join(dict.fromkeys(c.approximation.label for c in optimizer.curvature.values()))
    about = {
        "optimizer": type(optimizer).__name__, "step": optimizer.steps, "mode": "copy in evaluation mode",
        "statistics": optimizer.statistics, "labels": optimizer.fisher,
    }  # fmt: skip
    problem = {**options.pop("problem", {}), **about}
    chosen = {"layers": list(matrices), "fisher": "true", "progress": False, **options}
    return compare(twin, optimizer.likelihood, data, {label: matrices}, problem=problem, **chosen)


def describe(optimizer: Any) -> str:
    """Which layer uses what, which parameters are left to AdamW, and what went wrong so far."""
    lines = [f"{type(optimizer).__name__}, step {optimizer.steps}"]
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    for group in optimizer.method_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "layers", "initial_lr")}
        lines.append("group: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
        for name in group["layers"]:
            layer = optimizer.layers[name]
            kind = f"{type(layer.module).__name__} {layer.shape[0]} x {layer.shape[1]}"
            lines.append(f"  {name}: {kind}, {optimizer.method_of(name)}")
    if optimizer.fallback is not None:
        group = optimizer.fallback.param_groups[0]
        fused = ", fused" if group.get("fused") else ""
        lines.append(f"fallback: AdamW, lr={group['lr']}{fused}")
        lines += [f"  {names[id(p)]}" + ("" if p.requires_grad else " (frozen)") for p in group["params"]]
    for what, count in optimizer.troubles().items():
        if count:
            lines.append(f"{what}: {count}")
    return "\n".join(lines)
