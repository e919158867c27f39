"""Tolerances by precision."""

from __future__ import annotations

import torch

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSEST = 1e-2  # of anything less precise than float32


def agreement(dtype: torch.dtype) -> float:
    """Relative deviation up to which two ways to compute the same thing agree: far above rounding, far below an error.

    The square root of the rounding error of float64, because differences of squares lose half of the digits; larger in
    float32, where sums over many examples are compared.
    """
    return AGREEMENT.get(dtype, COARSEST)
