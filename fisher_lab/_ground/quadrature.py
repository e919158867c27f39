"""b^T (A + s I)^-1 b for several shifts s by one run of the Lanczos method, from below and above.

Golub & Meurant (2010), *Matrices, Moments and Quadrature with Applications*, chapters 6 and 7. The
tridiagonal matrix T_k of k steps from b gives Gauss's rule |b|^2 e_1^T (T_k + s I)^-1 e_1, a lower
bound. One more row, chosen so that the matrix has an eigenvalue at the lower end of the spectrum
of A, gives the rule of Gauss and Radau, an upper bound. Nothing is re-orthogonalised: three vectors
are held, and rounding delays the bounds without spoiling them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHECK_EVERY = 25  # steps between two looks at the bounds, which read numbers from the device
# The lower end of the spectrum of a positive semi-definite A is 0 up to rounding, which moves it by
# about eps |A|; the end that is assumed lies this much of the norm below 0.
BELOW_ZERO = 64


class Bounds(NamedTuple):
    """What b^T (A + s I)^-1 b lies between.

    Attributes:
        low: the rule of Gauss.
        high: the rule of Gauss and Radau.
    """

    low: float
    high: float


def inverse_form(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    shifts: Sequence[float],
    tolerance: float = 1e-6,
    max_steps: int = 10_000,
) -> list[Bounds]:
    """b^T (A + s I)^-1 b for every shift s > 0.

    Args:
        apply: the product with A, symmetric positive semi-definite, on vectors `[d]`.
        b: `[d]`, not zero.
        shifts: s.
        tolerance: distance of the bounds, relative to the lower one, at which to stop.
        max_steps: most products.

    Returns:
        The bounds for every shift, as close as `max_steps` allow.
    """
    square = float(b @ b)
    rule = _Rule(shifts, torch.finfo(b.dtype).eps)
    v = b / b.norm()
    before = torch.zeros_like(v)
    beta = v.new_zeros(())
    waiting: list[Tensor] = []  # alpha and beta of the steps since the last look
    for step in range(1, max_steps + 1):
        w = apply(v)
        alpha = w @ v
        w = w - alpha * v - beta * before
        beta = w.norm()
        waiting.append(torch.stack((alpha, beta)))
        if step % CHECK_EVERY == 0 or step == max_steps:
            for numbers in torch.stack(waiting).tolist():
                rule.feed(*numbers)
            waiting = []
            if rule.exhausted or rule.distance <= tolerance:
                break
        before = v
        v = w / beta
    return [Bounds(square * low, square * high) for low, high in rule.bounds()]


class _Rule:
    """Both rules for every shift, brought up to date with each step.

    With the pivots d_j of the factorisation L D L^T of T_k + s I,

        d_1 = alpha_1 + s,    d_(j+1) = alpha_(j+1) + s - beta_j^2 / d_j,

    e_1^T (T_k + s I)^-1 e_1 = sum_j c_j with c_1 = 1 / d_1, c_(j+1) = c_j beta_j^2 / (d_j d_(j+1)):
    all terms are positive, nothing cancels. The row of Radau has the pivot
    s - z + beta_k^2 (1 / d_k(-z) - 1 / d_k(s)), where z is the end of the spectrum that is assumed
    and d_k(-z) the pivot of T_k - z I.
    """

    def __init__(self, shifts: Sequence[float], eps: float) -> None:
        self.shifts = np.asarray(shifts, dtype=float)
        self.eps = eps
        self.exhausted = False
        self.steps = 0
        self.low = np.zeros_like(self.shifts)
        self.rest = np.full_like(self.shifts, np.inf)  # of the upper bound beyond the lower one
        self._norm = 0.0  # of T_k, from above
        self._beta = 0.0
        self._pivot = np.ones_like(self.shifts)
        self._term = np.ones_like(self.shifts)
        self._end_pivot = 1.0
        self._below = 0.0

    def feed(self, alpha: float, beta: float) -> None:
        """Take the next diagonal entry of T, and what stands beside it in the row that follows."""
        if self.exhausted:
            return
        self._norm = max(self._norm, alpha + beta + self._beta)
        square = self._beta**2
        if self.steps == 0:
            # the first entry says how large A is, about; later steps cannot move the end any more
            self._below = BELOW_ZERO * self.eps * max(self._norm, 0.0)
            pivot = alpha + self.shifts
            term = 1 / pivot
            self._end_pivot = alpha + self._below
        else:
            pivot = alpha + self.shifts - square / self._pivot
            term = self._term * square / (self._pivot * pivot)
            self._end_pivot = alpha + self._below - square / self._end_pivot
        self._pivot = pivot
        self._term = term
        self._beta = beta
        self.steps += 1
        self.low = self.low + term
        # a product that is rounding alone: the vectors span all that b reaches
        self.exhausted = beta <= 16 * self.eps * self._norm
        if self.exhausted:
            self.rest = np.zeros_like(self.shifts)
            return
        self.rest = self._radau()

    def _radau(self) -> np.ndarray:
        """What the additional row adds to the sum."""
        square = self._beta**2
        pivot = self.shifts + self._below
        if self._end_pivot > 0:
            pivot = pivot + square * np.maximum(1 / self._end_pivot - 1 / self._pivot, 0.0)
        found: np.ndarray = self._term * square / (self._pivot * pivot)
        return found

    @property
    def distance(self) -> float:
        """Largest distance of the bounds relative to the lower one."""
        return float(np.max(self.rest / self.low))

    def bounds(self) -> list[tuple[float, float]]:
        """Both for |b| = 1."""
        high = self.low + self.rest
        return list(zip(self.low.tolist(), high.tolist(), strict=True))
