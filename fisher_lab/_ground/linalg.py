"""Numerics that know nothing of Fisher matrices: mode products, symmetric powers, the Lanczos method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size


def symmetrize(M: Tensor) -> Tensor:
    """(M + M^T) / 2 over the last two axes."""
    return (M + M.transpose(-1, -2)) / 2


def mode_product(X: Tensor, factors: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """Multiply every mode of X by its matrix.

    Args:
        X: `[..., Q, n_1, ..., n_k]`.
        factors: per mode `[Q, n_i, n_i]`, or `[Q, n_i]` for a diagonal, or None for the identity.
        transpose: multiply by the transposes.
    """
    k = len(factors)
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        if factor.ndim == 2:
            X = X * factor.reshape(factor.shape[0], *(factor.shape[1] if m == mode else 1 for m in range(k)))
            continue
        M = factor.transpose(-1, -2) if transpose else factor
        sizes = X.shape[X.ndim - k :]
        if mode == k - 1 and k <= 2:
            X = X @ M.transpose(-1, -2) if k == 2 else (M @ X.unsqueeze(-1)).squeeze(-1)
            continue
        if len(M) == 1 and k > 2 and mode > 0:  # one large product; small inner sizes would make many tiny ones
            X = (X.movedim(mode - k, -1) @ M[0].T).movedim(-1, mode - k)
            continue
        # view the tensor as [..., Q, before, n_mode, after] and multiply n_mode from the left
        before = int(torch.Size(sizes[:mode]).numel()) if mode else 1
        after = int(torch.Size(sizes[mode + 1 :]).numel())
        Y = X.reshape(*X.shape[: X.ndim - k], before, sizes[mode], after)
        X = (M.unsqueeze(1) @ Y).reshape(X.shape)
    return X


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at zero) and eigenvectors of symmetric PSD matrices `[..., n, n]`.

    The divide-and-conquer routines can fail on ill-conditioned single-precision matrices: then in float64. Matrices
    with values that are not finite have NaN for both. Entries of eigenvectors far below their rounding error are 0.
    """
    M, shift = symmetrize(M), torch.zeros((), dtype=M.dtype, device=M.device)
    if M.dtype == torch.float32:
        # in single precision they fail on many a factor with dead units, and a failure costs as much as a success: a
        # shift at the size of the rounding error lifts the zeros that they stumble over; none where it overflows
        shift = torch.finfo(M.dtype).eps * torch.linalg.norm(M.detach(), dim=(-2, -1)).unsqueeze(-1)
        shift = torch.nan_to_num(shift, nan=0.0, posinf=0.0)
        M = M + torch.diag_embed(shift.expand(M.shape[:-1]))
    try:
        values, vectors = _Eigh.apply(M) if M.requires_grad else torch.linalg.eigh(M)
    except torch.linalg.LinAlgError:
        finite = torch.isfinite(M).all(-1, keepdim=True).all(-2, keepdim=True)
        wide = torch.where(finite, M, torch.zeros_like(M)).double()
        values, vectors = (part.to(M.dtype) for part in torch.linalg.eigh(wide))
        values = torch.where(finite[..., 0], values, torch.nan)
        vectors = torch.where(finite, vectors, torch.nan)
    return (values - shift).clamp(min=0), without_noise(vectors)


def without_noise(Q: Tensor) -> Tensor:
    """Entries of orthogonal matrices far below their rounding error become 0; the derivative is that of Q.

    Products of such numbers are denormal, and processors take many times longer for these.
    """
    return Q - torch.where(Q.abs() < 1e-3 * torch.finfo(Q.dtype).eps, Q.detach(), 0.0)


def kept(ok: Tensor, x: Tensor) -> Tensor:
    """x where ok (a 0-d bool), zeros otherwise.

    Bit by bit: torch.where takes more than twice as long with a single condition, and a product would keep NaN.
    """
    integers = INTEGERS[x.element_size()]
    return (x.view(integers) & -ok.to(integers)).view(x.dtype)


class _Eigh(torch.autograd.Function):
    """eigh whose derivative leaves eigenvectors of equal eigenvalues where they are (as in a null space)."""

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(M)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
        least = values.abs().amax(-1, keepdim=True).unsqueeze(-1) * values.shape[-1] * torch.finfo(values.dtype).eps
        inverse = torch.where(gaps.abs() > 16 * least, 1 / gaps, torch.zeros_like(gaps))
        core = inverse * (vectors.transpose(-1, -2) @ grad_vectors) + torch.diag_embed(grad_values)
        return symmetrize(vectors @ core @ vectors.transpose(-1, -2))


def shifted_power(values: Tensor, p: float, damping: float | Tensor = 0.0) -> Tensor:
    """(values + damping)^p of the eigenvalues of one matrix, in any shape.

    Without damping, a negative power of what is zero up to rounding is 0 (the pseudo-inverse). The derivative of a root
    at 0 is taken as 0. NaN stays NaN.
    """
    shifted = values + damping
    if p == 0 or p >= 1:
        return shifted**p
    info = torch.finfo(shifted.dtype)
    floor: float | Tensor = info.tiny
    if p < 0 and not isinstance(damping, Tensor) and damping == 0 and values.numel():
        floor = (values.amax() * values.numel() * info.eps).clamp(min=info.tiny)
    return torch.where(shifted <= floor, torch.zeros_like(shifted), shifted.clamp(min=info.tiny) ** p)


def spd_inverse(M: Tensor) -> Tensor:
    """Inverse of symmetric positive definite matrices `[..., n, n]` by Cholesky; NaN where the factorisation fails."""
    L, info = torch.linalg.cholesky_ex(M)
    failed = (info > 0)[..., None, None]
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    inverse = torch.cholesky_inverse(torch.where(failed, eye, L))  # which raises on a zero on the diagonal
    return torch.where(failed, torch.full_like(L, torch.nan), inverse)


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

    Several runs can so share one pass over the data. Read `vector`, multiply it, `feed` the product, until `found`.
    A run stops when the end of the spectrum that dominates in absolute value has a residual below `tolerance` times
    that value. Ritz values lie inside the spectrum, so the result is a lower bound that some eigenvalue lies within
    `residual` of.

    Args:
        start: start vector `[d]`.
        tolerance: relative residual at which to stop.
        max_steps: most products with the operator.
        check_every: steps between two looks at the Ritz values.
    """

    BLOCK = 8  # rows by which the basis grows

    def __init__(self, start: Tensor, tolerance: float = 1e-3, max_steps: int = 200, check_every: int = 4) -> None:
        self.tolerance, self.check_every = tolerance, check_every
        self.steps = min(max_steps, start.numel())
        self.vector = start / start.norm()
        self.found: Extremes | None = None
        self.ritz_vector: Tensor | None = None  # of the dominating end
        self.ritz_weights: list[float] = []  # of every `vector` so far in ritz_vector
        self._basis: list[Tensor] = []  # [BLOCK, d] each, the last one filled in part
        self._alpha: list[Tensor] = []
        self._beta: list[Tensor] = []

    def feed(self, w: Tensor) -> None:
        """Take the operator's product with `vector`."""
        k = len(self._alpha)
        if k % self.BLOCK == 0:
            self._basis.append(w.new_empty(self.BLOCK, w.numel()))
        self._basis[-1][k % self.BLOCK] = self.vector
        alpha = w @ self.vector
        w = w - alpha * self.vector
        if k:
            w -= self._beta[-1] * self._rows(k - 1)
        for block in self._filled(k + 1):  # what is left of the basis is rounding: once is enough
            w -= (block @ w) @ block
        self._alpha.append(alpha)
        self._beta.append(w.norm())
        last = k + 1 == self.steps
        if last or (k + 1) % self.check_every == 0 or float(self._beta[-1]) <= 1e-14 * float(alpha.abs()):
            self._look(last)
        self.vector = w / self._beta[-1]

    def _rows(self, k: int) -> Tensor:
        return self._basis[k // self.BLOCK][k % self.BLOCK]

    def _filled(self, count: int) -> list[Tensor]:
        full = self._basis[: count // self.BLOCK]
        return [*full, self._basis[-1][: count % self.BLOCK]] if count % self.BLOCK else full

    def _look(self, last: bool) -> None:
        alpha, beta = torch.stack(self._alpha), torch.stack(self._beta)
        found, weights = _ritz(alpha, beta)
        exhausted = float(beta[-1]) <= 1e-13 * found.norm
        if last or exhausted or found.residual <= self.tolerance * found.norm:
            parts = weights.split(self.BLOCK)
            pairs = zip(parts, self._filled(len(alpha)), strict=True)
            self.ritz_vector = torch.stack([w.to(b) @ b for w, b in pairs]).sum(0)
            self.ritz_weights = weights.tolist()
            self.found = found
            self._basis = []


def start_vector(like: Any, n: int | None = None) -> Tensor:
    """A random vector, the same for every run: `[like.dim]` or `[n]`, of the type and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.dim if n is None else n, generator=generator, dtype=like.dtype).to(like.device)


def lanczos(
    apply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_steps: int = 200
) -> Extremes:
    """Extreme eigenvalues of a symmetric operator on vectors `[d]`; see Lanczos."""
    run = Lanczos(start, tolerance, max_steps)
    while run.found is None:
        run.feed(apply(run.vector))
    return run.found


def _ritz(alpha: Tensor, beta: Tensor) -> tuple[Extremes, Tensor]:
    """End Ritz values of the tridiagonal matrix, the residual of the one larger in absolute value, and its vector."""
    tridiagonal = torch.diag(alpha)
    if len(alpha) > 1:
        tridiagonal = tridiagonal + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    low, high = float(values[0]), float(values[-1])
    end = 0 if abs(low) > abs(high) else -1
    mine, others = (float(beta[-1] * vectors[-1, i].abs()) for i in (end, -1 - end))
    overtaking = min(abs(low), abs(high)) + others - max(abs(low), abs(high))  # of the end that is behind so far
    return Extremes(low, high, max(mine, overtaking)), vectors[:, end]
