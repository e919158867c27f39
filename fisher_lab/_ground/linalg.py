"""Numerics that know nothing of Fisher matrices: mode products, eigenvectors, powers and
inverses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.lanczos import Extremes as Extremes
from fisher_lab._ground.lanczos import Lanczos as Lanczos
from fisher_lab._ground.lanczos import lanczos as lanczos
from fisher_lab._ground.lanczos import start_vector as start_vector

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
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        if factor.ndim == 2:
            X = _scale_mode(X, factor, mode, len(factors))
        else:
            M = factor.transpose(-1, -2) if transpose else factor
            X = _multiply_mode(X, M, mode, len(factors))
    return X


def _scale_mode(X: Tensor, factor: Tensor, mode: int, k: int) -> Tensor:
    """X `[..., Q, n_1, ..., n_k]` times a diagonal factor `[Q, n]` of one mode."""
    sizes = [1] * k
    sizes[mode] = factor.shape[1]
    return X * factor.reshape(factor.shape[0], *sizes)


def _multiply_mode(X: Tensor, M: Tensor, mode: int, k: int) -> Tensor:
    """X `[..., Q, n_1, ..., n_k]` times M `[Q, n, n]` in one mode, by the product that runs
    fastest.
    """
    if k == 2 and mode == 1:
        return X @ M.transpose(-1, -2)
    if k == 1:
        return (M @ X.unsqueeze(-1)).squeeze(-1)
    if len(M) == 1 and k > 2 and mode > 0:
        # one large product: small inner sizes would make many tiny ones
        last = X.movedim(mode - k, -1)
        return (last @ M[0].T).movedim(-1, mode - k)
    # view the tensor as [..., Q, before, n_mode, after] and multiply n_mode from the left
    sizes = X.shape[X.ndim - k :]
    before = math.prod(sizes[:mode])
    after = math.prod(sizes[mode + 1 :])
    Y = X.reshape(*X.shape[: X.ndim - k], before, sizes[mode], after)
    return (M.unsqueeze(1) @ Y).reshape(X.shape)


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at zero) and eigenvectors of symmetric PSD matrices `[..., n, n]`.

    The divide-and-conquer routines can fail on ill-conditioned single-precision matrices: then in
    float64. Matrices with values that are not finite have NaN for both. Entries of eigenvectors far
    below their rounding error are 0.
    """
    M = symmetrize(M)
    shift = torch.zeros((), dtype=M.dtype, device=M.device)
    if M.dtype == torch.float32:
        shift = _rounding_shift(M)
        M = M + torch.diag_embed(shift.expand(M.shape[:-1]))
    try:
        values, vectors = _Eigh.apply(M) if M.requires_grad else torch.linalg.eigh(M)
    except torch.linalg.LinAlgError:
        values, vectors = _eigh_in_double(M)
    return (values - shift).clamp(min=0), without_noise(vectors)


def eigenvalues(M: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix `[n, n]`, ascending.

    The single-precision routine can give NaN for finite numbers, for instance for a difference that
    is rounding alone: then in float64.
    """
    values = torch.linalg.eigvalsh(M)
    if M.dtype == torch.float64 or not bool(values.isnan().any()):
        return values
    return torch.linalg.eigvalsh(M.double()).to(M.dtype)


def _rounding_shift(M: Tensor) -> Tensor:
    """A shift `[..., 1]` at the size of the rounding error of M; 0 where it overflows.

    In single precision the routines fail on many a factor with dead units, and a failure costs as
    much as a success. The shift lifts the zeros that they stumble over.
    """
    size = torch.linalg.norm(M.detach(), dim=(-2, -1)).unsqueeze(-1)
    shift = torch.finfo(M.dtype).eps * size
    return torch.nan_to_num(shift, nan=0.0, posinf=0.0)


def _eigh_in_double(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors by way of float64; NaN for matrices that are not finite."""
    finite = torch.isfinite(M).all(-1, keepdim=True).all(-2, keepdim=True)
    wide = torch.where(finite, M, torch.zeros_like(M)).double()
    values, vectors = torch.linalg.eigh(wide)
    values = torch.where(finite[..., 0], values.to(M.dtype), torch.nan)
    vectors = torch.where(finite, vectors.to(M.dtype), torch.nan)
    return values, vectors


def without_noise(Q: Tensor) -> Tensor:
    """Entries of orthogonal matrices far below their rounding error become 0; the derivative is
    that of Q.

    Products of such numbers are denormal, and processors take many times longer for these.
    """
    noise = 1e-3 * torch.finfo(Q.dtype).eps
    return Q - torch.where(Q.abs() < noise, Q.detach(), 0.0)


def kept(ok: Tensor, x: Tensor) -> Tensor:
    """x where ok (a 0-d bool), zeros otherwise.

    Bit by bit: torch.where takes more than twice as long with a single condition, and a product
    would keep NaN.
    """
    integers = INTEGERS[x.element_size()]
    return (x.view(integers) & -ok.to(integers)).view(x.dtype)


class _Eigh(torch.autograd.Function):
    """eigh whose derivative leaves eigenvectors of equal eigenvalues where they are (as in a null
    space).
    """

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(M)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
        top = values.abs().amax(-1, keepdim=True).unsqueeze(-1)
        rounding = top * values.shape[-1] * torch.finfo(values.dtype).eps
        # eigenvalues that only rounding keeps apart are equal: their vectors stay
        apart = gaps.abs() > 16 * rounding
        inverse = torch.where(apart, 1 / gaps, torch.zeros_like(gaps))
        core = inverse * (vectors.transpose(-1, -2) @ grad_vectors) + torch.diag_embed(grad_values)
        return symmetrize(vectors @ core @ vectors.transpose(-1, -2))


def shifted_power(values: Tensor, p: float, damping: float | Tensor = 0.0, size: int = 0) -> Tensor:
    """(values + damping)^p of eigenvalues.

    Without damping, a negative power of what is zero up to rounding is 0 (the pseudo-inverse), and
    so is a root of it, which would be as large as a root of eps. The derivative of a root at 0 is
    taken as 0. NaN stays NaN.

    Args:
        values: `[n]` of one matrix, or `[Q, ...]` of several.
        p: the power.
        damping: >= 0; a number 0 is no damping, a tensor is never looked at.
        size: of the matrices that were decomposed; 0 for numbers that came from no decomposition,
            whose zeros are exact.
    """
    shifted = values + damping
    if p == 0 or p >= 1:
        return shifted**p
    tiny = torch.finfo(shifted.dtype).tiny
    floor: float | Tensor = tiny
    undamped = not isinstance(damping, Tensor) and damping == 0
    if undamped:
        floor = rounded_zero(values, size).clamp(min=tiny)
    powers = shifted.clamp(min=tiny) ** p
    return torch.where(shifted <= floor, torch.zeros_like(shifted), powers)


def rounded_zero(values: Tensor, size: int) -> Tensor:
    """How large a computed eigenvalue may be whose true value is 0: (n + 16) eps of the largest.

    n eps for the decomposition, 16 for the sums that made the entries, which count where n is
    small.

    It grows with the matrix that was decomposed, not with what that is a factor of.

    Args:
        values: eigenvalues `[n]` of one matrix, or `[Q, ...]` of several.
        size: n.
    """
    eps = torch.finfo(values.dtype).eps
    roundings = 0 if size == 0 else size + 16
    if not values.numel():
        return values.new_zeros(())
    if values.ndim <= 1:
        return roundings * eps * values.amax()
    others = [1] * (values.ndim - 1)
    top = values.flatten(1).amax(1).view(-1, *others)  # every matrix has its own
    return roundings * eps * top


def spd_inverse(M: Tensor) -> Tensor:
    """Inverse of symmetric positive definite matrices `[..., n, n]` by Cholesky; NaN where the
    factorisation fails.
    """
    L, info = torch.linalg.cholesky_ex(M)
    failed = (info > 0)[..., None, None]
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    # which raises on a zero on the diagonal
    inverse = torch.cholesky_inverse(torch.where(failed, eye, L))
    return torch.where(failed, torch.full_like(L, torch.nan), inverse)
