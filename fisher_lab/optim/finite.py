"""Whether numbers are finite, and what to do where they are not, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all tensors are finite, a 0-d tensor; one reduction each."""
    found = list(tensors)
    on_cpu = found[0].device.type == "cpu"
    if on_cpu:
        # norms are slow there; a sum is finite if its terms are (short of overflow)
        tops = list(map(_sum, found))
    else:
        # all tensors in one kernel
        tops = list(torch._foreach_norm(found, float("inf")))
    flags = torch.stack(tops).isfinite()
    return flags.all()


def _sum(x: Tensor) -> Tensor:
    """The sum, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.sum(dtype=dtype)


def where_ok(ok: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """One number or the other, as a 0-d tensor of the given precision.

    Arithmetic, because torch.where would round numbers to float32.
    """
    chosen = ok.to(dtype)
    gap = value - otherwise
    return chosen * gap + otherwise


def count_failure(so_far: Tensor | None, ok: Tensor) -> Tensor:
    """The number of failures, one more where not ok; None stands for none so far."""
    failed = (~ok).to(torch.int64)
    if so_far is None:
        return failed
    return so_far + failed


def as_int(count: Tensor | None) -> int:
    """A counter, read from the device."""
    if count is None:
        return 0
    return int(count)
