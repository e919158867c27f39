"""From vectors over parameters to steps: packing by layer, prepared inverses, and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_lab.layers import Layer
from fisher_lab.matrices import FisherMatrix

Bucket = tuple[list[Layer], FisherMatrix]  # layers of equal structure, and their inverses as one matrix

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with torch's fused AdamW, which can skip a step without a host read


def packed(layer: Layer, vectors: dict[Tensor, Tensor]) -> Tensor:
    """The vectors of a layer's parameters as one W; parameters without one (no gradient) count as zero."""
    given = next(vectors[p] for p in layer.parameters.values() if p in vectors)
    parts = {
        key: vectors[p] if p in vectors else torch.zeros_like(p, dtype=given.dtype)
        for key, p in layer.parameters.items()
    }
    return layer.pack(parts)


def precondition(buckets: Sequence[Bucket], vectors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The prepared inverses times the vectors of the layers' parameters; equal layers in one product.

    Args:
        buckets: layers with their joined inverse.
        vectors: one for every parameter that has a gradient.
    """
    found: dict[Tensor, Tensor] = {}
    for layers, inverse in buckets:
        used = [any(p in vectors for p in layer.parameters.values()) for layer in layers]
        Ws = [packed(layer, vectors) for layer, has in zip(layers, used, strict=True) if has]
        if not Ws:
            continue
        if len(Ws) < len(layers):
            given, zero = iter(Ws), torch.zeros_like(Ws[0])
            Ws = [next(given) if has else zero for has in used]
        D = inverse @ (Ws[0] if len(Ws) == 1 else torch.cat(Ws))
        for layer, W in zip(layers, D.chunk(len(layers)) if len(layers) > 1 else [D], strict=True):
            for key, tensor in layer.unpack(W).items():
                found[layer.parameters[key]] = tensor
    return found


def make_fallback(params: list[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW for the parameters that no adapter covers, fused where the device has it."""
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in params)
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=fused)


def step_fallback(fallback: torch.optim.AdamW, ok: Tensor, scale: Tensor | None) -> None:
    """One step of AdamW, which changes nothing where not ok.

    Args:
        fallback: the optimizer.
        ok: a 0-d tensor, not read.
        scale: by which a GradScaler multiplied the gradients; None if they are unscaled.
    """
    group = fallback.param_groups[0]
    params = [p for p in group["params"] if p.grad is not None]
    if group.get("fused"):
        fallback.grad_scale = scale  # type: ignore[attr-defined]
        fallback.found_inf = (~ok).to(torch.float32)  # type: ignore[attr-defined]
        fallback.step()
        return
    if scale is not None:
        torch._foreach_div_([p.grad for p in params if p.grad is not None], scale)
    kept = {id(x): x.clone() for p in params for x in (p, *fallback.state[p].values())}
    fallback.step()
    for p in params:
        for x in (p, *fallback.state[p].values()):
            if x.device == ok.device:
                x.copy_(torch.where(ok, x, kept.get(id(x), 0.0)))
