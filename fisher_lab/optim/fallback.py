"""AdamW for the parameters that no layer covers, guarded like the other steps."""

from __future__ import annotations

import torch
from torch import Tensor

# devices with torch's fused AdamW, which can skip a step without a host read
FUSED = ("cpu", "cuda", "mps", "xpu")


def make_fallback(params: list[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW, fused where the device has it."""
    fused = all(map(_can_be_fused, params))
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=fused)


def _can_be_fused(p: Tensor) -> bool:
    """Whether torch's fused AdamW takes a parameter; it takes no complex ones."""
    return p.device.type in FUSED and p.is_floating_point()


def gradients_of(fallback: torch.optim.AdamW | None) -> list[Tensor]:
    """The gradients of its parameters, where there are some."""
    found: list[Tensor] = []
    if fallback is None:
        return found
    for p in fallback.param_groups[0]["params"]:
        if p.grad is not None:
            found.append(p.grad)
    return found


def step_fallback(fallback: torch.optim.AdamW, ok: Tensor, scale: Tensor | None) -> None:
    """One step of AdamW, which changes nothing where not ok.

    Args:
        fallback: the optimizer.
        ok: a 0-d tensor, not read.
        scale: by which a GradScaler multiplied the gradients; None if they are unscaled.
    """
    if fallback.param_groups[0].get("fused"):
        fallback.grad_scale = scale  # type: ignore[attr-defined]
        fallback.found_inf = (~ok).to(torch.float32)  # type: ignore[attr-defined]
        fallback.step()
    else:
        _step_and_take_back(fallback, ok, scale)


def _step_and_take_back(fallback: torch.optim.AdamW, ok: Tensor, scale: Tensor | None) -> None:
    """A step of an AdamW that cannot skip one: where not ok, everything is put back as it was."""
    params = []
    for p in fallback.param_groups[0]["params"]:
        if p.grad is not None:
            params.append(p)
    if scale is not None:
        gradients = gradients_of(fallback)
        torch._foreach_div_(gradients, scale)
    before = {}
    for x in _changed(fallback, params):
        before[id(x)] = x.clone()
    fallback.step()
    for x in _changed(fallback, params):
        # a counter of steps on the host stays as it is: reading ok for it would wait for the device
        if x.device == ok.device:
            # state that the step has just made starts from zero again
            earlier = before.get(id(x), 0.0)
            x.copy_(torch.where(ok, x, earlier))


def _changed(fallback: torch.optim.AdamW, params: list[Tensor]) -> list[Tensor]:
    """What a step changes: parameters and their state."""
    found = []
    for p in params:
        found.append(p)
        state = fallback.state[p]
        found.extend(state.values())
    return found
