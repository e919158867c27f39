"""(A + s I)^-1 b by conjugate gradients, from products with A alone (Hestenes & Stiefel, 1952)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """What was reached.

    Attributes:
        x: the solution `[d]`.
        residual: |b - (A + s I) x| / |b|.
    """

    x: Tensor
    residual: float


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, shift: float, tolerance: float, most: int
) -> Solution:
    """(A + shift I)^-1 b.

    Args:
        apply: the product with A, symmetric positive semi-definite, on vectors `[d]`.
        b: `[d]`.
        shift: s > 0.
        tolerance: relative residual at which to stop.
        most: products.
    """
    x = torch.zeros_like(b)
    r = b.clone()
    p = r.clone()
    square = r @ r
    first = max(float(square), torch.finfo(b.dtype).tiny)
    for _ in range(most):
        if float(square) <= tolerance**2 * first:
            break
        Ap = apply(p) + shift * p
        length = square / (p @ Ap)
        x += length * p
        r -= length * Ap
        before = square
        square = r @ r
        p = r + (square / before) * p
    reached = (float(square) / first) ** 0.5
    return Solution(x, reached)
