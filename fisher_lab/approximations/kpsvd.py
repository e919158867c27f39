"""KPSVD: Koroko et al. (2022): the nearest Kronecker product S (x) T in Frobenius norm (Van Loan &
Pitsianis 1993).

|F - S (x) T| = |Z - vec(S) vec(T)^T| for the rearrangement Z of F, whose products are

    Z T = 1/N sum P T P^T          Z^T S = 1/N sum P^T S P,

so the leading singular pair of Z follows by power iteration from T = I, whose first half-step is
TKFAC's U1. With rank-one columns S = sum_n alpha_n G_n with G_n = sum_r g g^T, and alpha is the
leading eigenvector of K_X K_G, where (K_X)_nm = (a_n . a_m)^2 and (K_G)_nm = sum_{r,s} (g_rn .
g_sm)^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Lanczos
from fisher_lab.approximations.base import Iterated
from fisher_lab.approximations.moments import Columns, Moments
from fisher_lab.approximations.tkfac import traces
from fisher_lab.matrices import FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats, Sums, contractions, pieces

# change of the unit-norm factors; stopping on sigma would leave its square root in the factors
TOLERANCE = 1e-10
MAX_ITERATIONS = 1000
# of the steps in single precision, which need not end
ROUGH_TOLERANCE = 1e-5
ROUGH_ITERATIONS = 8
MOST_EXAMPLES = 5000  # above this many the N x N matrices cost more than iterating on the factors


@dataclass(frozen=True, eq=False)
class FirstColumns(Columns):
    """The columns that the first matrix is made of; they give way to the factors of a half-step
    from it.
    """

    @property
    def unsteady(self) -> tuple[str, ...]:
        """The trace: what it misses of tr F are products tr S_j tr T_j of the other singular pairs,
        two numbers near zero whose sampling errors multiply.
        """
        return ("trace_approx",)

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """All examples; or the factors alone."""
        if isinstance(new, Columns):
            return super().mix(new, weight)
        return new


@dataclass(frozen=True)
class KPSVD(Iterated):
    """Best Kronecker product of two factors in Frobenius norm; it does not keep the trace.

    Keeps the columns of the batch until a first matrix is assembled; from then on (in a trainer)
    every observation is one power-iteration half-step for each factor from the previous ones.

    State: d_out^2 + d_in^2. See also: TKFAC (one step of the iteration), KFAC.

    Example:
        >>> K = fl.estimate(fl.KPSVD(), model, loss, (x, y))["0"]
        >>> fl.errors.frobenius(exact, K) <= fl.errors.frobenius(exact, kfac)
        True
    """

    def moments(self, sums: Sums) -> Columns:
        """The columns."""
        return FirstColumns(sums.stats)

    def moments_at(self, sums: Sums, matrix: FisherMatrix) -> dict[str, Tensor]:
        """`S` and `T` one half-step from `matrix`."""
        assert isinstance(matrix, Kronecker)
        G, A = matrix.factors
        S = sums.left(_unit(A))
        T = sums.right(_unit(G))
        return {"S": S, "T": T}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """sigma S (x) T, sqrt(sigma) in each factor."""
        if not isinstance(moments, Columns):
            return _of_half_steps(moments["S"], moments["T"])
        stats = moments.weighted()
        if stats.rank_one and stats.N <= MOST_EXAMPLES:
            S, T = _solve_in_examples(stats)
        else:
            S, T = _solve_in_factors(stats)
        return Kronecker((S, T))


def _of_half_steps(S: Tensor, T: Tensor) -> Kronecker:
    """sigma S' (x) T' of norm-one S' and T', where S and T have norm sigma each."""
    product = _norm(S) * _norm(T)
    scale = product**0.25
    left = _divide(S, scale)
    right = _divide(T, scale)
    return Kronecker((left, right))


def _solve_in_factors(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """S `[Q, d_out, d_out]` and T `[Q, d_in, d_in]` by power iteration, for one group by Lanczos.

    The first steps run in single precision where that saves time: the iteration forgets where it
    came from.
    """
    g = stats.g
    eye = torch.eye(stats.d_in, dtype=g.dtype, device=g.device)
    identity = eye.repeat(stats.Q, 1, 1)
    T = _roughly(stats, identity)
    # where derivatives are wanted, by steps that have one
    if stats.Q == 1 and not g.requires_grad:
        start = contractions.left(stats, T)
        if float(_norm(start)) > 0:
            return _solve_by_lanczos(stats, start)
    S, T, sigma = _iterate(stats, T, TOLERANCE, MAX_ITERATIONS)
    root = sigma.sqrt()
    return S * root, T * root


def _solve_by_lanczos(stats: LayerStats, start: Tensor) -> tuple[Tensor, Tensor]:
    """S and T, sqrt(sigma) in each, from a start that is not zero."""
    S, T = _leading(stats, start)
    sigma = _norm(S) / _norm(T)
    root = sigma.sqrt()
    return _unit(S) * root, _unit(T) * root


def _roughly(stats: LayerStats, T: Tensor) -> Tensor:
    """T after some steps in single precision, where these save time."""
    if stats.rank_one or stats.a is None or stats.g.dtype != torch.float64:
        return T
    a = _single(stats.a)
    g = _single(stats.g)
    rough = stats.like(a, g)
    start = T.float()
    _, found, _ = _iterate(rough, start, ROUGH_TOLERANCE, ROUGH_ITERATIONS)
    # zero where squares vanish in single precision
    usable = _norm(found) > 0
    return torch.where(usable, found.double(), T)


def _leading(stats: LayerStats, S: Tensor) -> tuple[Tensor, Tensor]:
    """Z T and T = Z^T S' for the leading left singular vector S' of Z: Lanczos on Z Z^T from S."""
    stats = contractions.with_gradients(stats, pieces.kept())
    rounding = 64 * torch.finfo(S.dtype).eps
    tolerance = max(TOLERANCE, rounding)
    start = S.flatten()
    run = Lanczos(start, tolerance, MAX_ITERATIONS, check_every=1)
    # Z^T v and Z Z^T v of every Lanczos vector v, as long as they are small enough to keep: what is
    # sought is a combination of them
    images: list[tuple[Tensor, Tensor]] = []
    numbers = S.numel() + stats.d_in**2
    size = numbers * S.element_size()
    while run.found is None:
        v = run.vector.view(S.shape)
        T = contractions.right(stats, v)
        image = contractions.left(stats, T)
        images.append((T, image))
        run.feed(image.flatten())
        held = len(images) * size
        if held > pieces.kept():
            images.clear()
    assert run.ritz_vector is not None
    if len(images) == len(run.ritz_weights):
        S, T = _combined(run.ritz_weights, images)
    else:
        v = run.ritz_vector.view(S.shape)
        T = contractions.right(stats, v)
        S = contractions.left(stats, T)
    trace = traces(T).sum()
    sign = torch.sign(trace)  # that of PSD matrices
    return S * sign, T * sign


def _combined(
    weights: Sequence[float],
    images: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Z Z^T v and Z^T v for the combination v of the Lanczos vectors whose images are known."""
    first_T, first_S = images[0]
    S = torch.zeros_like(first_S)
    T = torch.zeros_like(first_T)
    for weight, (right, left) in zip(weights, images, strict=True):
        T.add_(right, alpha=weight)
        S.add_(left, alpha=weight)
    return S, T


def _iterate(
    stats: LayerStats,
    T: Tensor,
    tolerance: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """S, T of norm 1 and sigma, by half-steps from T until both change less than the tolerance."""
    stats = contractions.with_gradients(stats, pieces.kept())
    T = _unit(T)
    image = contractions.left(stats, T)
    S = _unit(image)
    sigma = torch.ones_like(_norm(S))
    for _ in range(most):
        image = contractions.right(stats, S)
        new_T = _unit(image)
        image = contractions.left(stats, new_T)
        new_S = _unit(image)
        sigma = _norm(image)
        of_S = _norm(new_S - S).max()
        of_T = _norm(new_T - T).max()
        change = torch.maximum(of_S, of_T)  # the largest of all groups
        S = new_S
        T = new_T
        if change < tolerance:
            break
    return S, T, sigma


def _single(x: Tensor) -> Tensor:
    """In single precision, scaled to entries of order 1 so that nothing vanishes."""
    top = x.abs().max()
    return _divide(x, top).float()


def _solve_in_examples(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """Power iteration on the weights of the examples, group by group (rank-one columns)."""
    outputs = []
    inputs = []
    for q in range(stats.Q):
        a, g = stats.vectors(q)
        KX, KG = contractions.example_grams(stats, q)
        S, T = _examples_of_group(a, g, KX, KG)
        outputs.append(S)
        inputs.append(T)
    return torch.stack(outputs), torch.stack(inputs)


def _examples_of_group(a: Tensor, g: Tensor, KX: Tensor, KG: Tensor) -> tuple[Tensor, Tensor]:
    """S and T of one group from a `[N, d_in]`, g `[R, N, d_out]`, and K_X and K_G.

    S = sum_n alpha_n G_n and T = sum_n beta_n a a^T; a half-step is a product with K_G or K_X, and
    x^T K x is the squared norm of the factor.
    """
    tiny = torch.finfo(a.dtype).tiny  # nothing is divided by zero
    alpha = a.square().sum(1)  # the weights of T = I
    alpha = alpha / _size_in(KG, alpha, tiny)
    for _ in range(MAX_ITERATIONS):
        beta = KG @ alpha
        size = _size_in(KX, beta, tiny)
        beta = beta / size
        new = KX @ beta
        sigma = _size_in(KG, new)
        new = new / sigma.clamp(min=tiny)
        step = new - alpha
        alpha = new
        change = _size_in(KG, step)
        if change < TOLERANCE:
            break
    N = len(a)
    root = (sigma / N).sqrt()
    of_outputs = alpha * root
    # not negative but by rounding
    of_outputs = of_outputs.clamp(min=0)
    roots = of_outputs.sqrt()
    weighted = g * roots[None, :, None]
    weighted = weighted.flatten(0, 1)  # [R N, d_out]
    S = weighted.T @ weighted
    of_inputs = beta * root
    weighted = a * of_inputs[:, None]
    T = a.T @ weighted
    return S, T


def _size_in(K: Tensor, x: Tensor, least: float = 0.0) -> Tensor:
    """Root of x^T K x: the Frobenius norm of the factor whose weights are x."""
    square = x @ K @ x
    return square.clamp(min=least).sqrt()


def _norm(M: Tensor) -> Tensor:
    """Frobenius norms `[Q, 1, 1]`."""
    return torch.linalg.matrix_norm(M, keepdim=True)


def _divide(M: Tensor, scale: Tensor) -> Tensor:
    """M / scale, M itself where the scale is zero."""
    one = torch.ones_like(scale)
    safe = torch.where(scale > 0, scale, one)
    return M / safe


def _unit(M: Tensor) -> Tensor:
    """M with norm 1."""
    return _divide(M, _norm(M))
