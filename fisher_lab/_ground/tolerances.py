"""Tolerances by precision."""

from __future__ import annotations

import torch

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSEST = 1e-2  # of anything less precise than float32
MIXED = 1000  # roundings of the lower precision that a result may be off by


def agreement(dtype: torch.dtype) -> float:
    """Relative deviation up to which two ways to compute the same thing agree: far above rounding,
    far below an error.

    The square root of the rounding error of float64, because differences of squares lose half of
    the digits; larger in float32, where sums over many examples are compared.
    """
    return AGREEMENT.get(dtype, COARSEST)


def agreement_inside(dtype: torch.dtype, inside: torch.dtype) -> float:
    """The same for a model in `dtype` whose forward pass computes some of its operations in
    `inside`.

    Two orders of magnitude above the 1e-8 to 8e-7 seen on norms that compute in float32 in an else
    float64 model, and still far below what a weight that is used behind the hooks' back changes.
    """
    if torch.finfo(inside).eps <= torch.finfo(dtype).eps:
        return agreement(dtype)
    return max(agreement(dtype), min(agreement(inside), MIXED * torch.finfo(inside).eps))
