"""The Lanczos method with full re-orthogonalisation, and the extreme eigenvalues it finds.

Golub & Van Loan (2013), *Matrix Computations*, section 10.1 to 10.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-14  # what is left of a product, relative to its size, that is nothing but rounding
EXHAUSTED = 1e-13  # the same relative to the norm found: the basis spans an invariant space


class Extremes(NamedTuple):
    """Outermost eigenvalues of a symmetric operator, each within `residual` of a true one."""

    low: float
    high: float
    residual: float

    @property
    def norm(self) -> float:
        """Spectral norm."""
        return max(abs(self.low), abs(self.high))


class Lanczos:
    """One run of the Lanczos method with full re-orthogonalisation, fed with products from outside.

    Several runs can so share one pass over the data. Read `vector`, multiply it, `feed` the
    product, until `found`. A run stops when the end of the spectrum that dominates in absolute
    value has a residual below `tolerance` times that value. Ritz values lie inside the spectrum, so
    the result is a lower bound that some eigenvalue lies within `residual` of.

    Args:
        start: start vector `[d]`.
        tolerance: relative residual at which to stop.
        max_steps: most products with the operator.
        check_every: steps between two looks at the Ritz values.

    Attributes:
        vector: the vector `[d]` to multiply next.
        found: the result, None until the run has stopped.
        ritz_vector: eigenvector `[d]` of the dominating end.
        ritz_weights: weight of every `vector` so far in `ritz_vector`.
        ritz_values: all of them, rising; those inside the spectrum are not converged.
    """

    BLOCK = 8  # rows by which the basis grows

    def __init__(
        self, start: Tensor, tolerance: float = 1e-3, max_steps: int = 200, check_every: int = 4
    ) -> None:
        self.tolerance = tolerance
        self.check_every = check_every
        self.steps = min(max_steps, start.numel())
        self.vector = start / start.norm()
        self.found: Extremes | None = None
        self.ritz_vector: Tensor | None = None
        self.ritz_weights: list[float] = []
        self.ritz_values: list[float] = []
        self._basis: list[Tensor] = []  # [BLOCK, d] each, the last one filled in part
        self._alpha: list[Tensor] = []  # diagonal of the tridiagonal matrix
        self._beta: list[Tensor] = []  # and what is beside it

    def feed(self, w: Tensor) -> None:
        """Take the operator's product `[d]` with `vector`."""
        k = len(self._alpha)
        if k % self.BLOCK == 0:
            self._basis.append(w.new_empty(self.BLOCK, w.numel()))
        self._basis[-1][k % self.BLOCK] = self.vector
        alpha = w @ self.vector
        w = w - alpha * self.vector
        if k > 0:
            w -= self._beta[-1] * self._row(k - 1)
        # what is left of the basis in w is rounding: taking it off once is enough
        for block in self._filled(k + 1):
            w -= (block @ w) @ block
        beta = w.norm()
        self._alpha.append(alpha)
        self._beta.append(beta)
        last = k + 1 == self.steps
        due = (k + 1) % self.check_every == 0
        if last or due or float(beta) <= ROUNDING * float(alpha.abs()):
            self._look(last)
        self.vector = w / beta

    def _row(self, k: int) -> Tensor:
        """The k-th vector of the basis."""
        return self._basis[k // self.BLOCK][k % self.BLOCK]

    def _filled(self, count: int) -> list[Tensor]:
        """The first `count` vectors of the basis, block by block."""
        blocks = self._basis[: count // self.BLOCK]
        rest = count % self.BLOCK
        if rest:
            blocks = [*blocks, self._basis[-1][:rest]]
        return blocks

    def _look(self, last: bool) -> None:
        """Stop if this was the last step, the space is exhausted, or the dominating end is known
        well enough.
        """
        alpha = torch.stack(self._alpha)
        beta = torch.stack(self._beta)
        found, weights, values = _ritz(alpha, beta)
        exhausted = float(beta[-1]) <= EXHAUSTED * found.norm
        if not (last or exhausted or found.residual <= self.tolerance * found.norm):
            return
        parts = []
        for weight, block in zip(weights.split(self.BLOCK), self._filled(len(alpha)), strict=True):
            parts.append(weight.to(block) @ block)
        self.ritz_vector = torch.stack(parts).sum(0)
        self.ritz_weights = weights.tolist()
        self.ritz_values = values.tolist()
        self.found = found
        self._basis = []


def lanczos(
    apply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_steps: int = 200
) -> Extremes:
    """Extreme eigenvalues of a symmetric operator on vectors `[d]`; see Lanczos."""
    run = Lanczos(start, tolerance, max_steps)
    while run.found is None:
        run.feed(apply(run.vector))
    return run.found


def start_vector(like: Any, n: int | None = None) -> Tensor:
    """A random vector, the same for every run: `[like.dim]` or `[n]`, of the type and on the device
    of `like`.
    """
    size = like.dim if n is None else n
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=like.dtype).to(like.device)


def _ritz(alpha: Tensor, beta: Tensor) -> tuple[Extremes, Tensor, Tensor]:
    """End Ritz values of the tridiagonal matrix, the vector of the one larger in absolute value,
    and all Ritz values.

    Args:
        alpha: its diagonal `[k]`.
        beta: what is beside it `[k]`; the last one belongs to the next step and gives the
            residuals.
    """
    tridiagonal = torch.diag(alpha)
    if len(alpha) > 1:
        beside = beta[:-1]
        tridiagonal = tridiagonal + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    low = float(values[0])
    high = float(values[-1])
    ahead = 0 if abs(low) > abs(high) else -1
    behind = -1 - ahead
    residual = float(beta[-1] * vectors[-1, ahead].abs())
    other_residual = float(beta[-1] * vectors[-1, behind].abs())
    # the end that is behind so far may still overtake
    overtaking = min(abs(low), abs(high)) + other_residual - max(abs(low), abs(high))
    found = Extremes(low, high, max(residual, overtaking))
    return found, vectors[:, ahead], values
