"""Naive dense approximations, transcribed from their definitions; see tests/helpers.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_lab.statistics import LayerStats
from tests.helpers import dense_fisher, fisher_of, gradients, outer


def groups(stats: LayerStats) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`(a [N, T, d_in], g [R, N, T, d_out], P [R, N, d_out, d_in])` of one group after
    the other.
    """
    P = gradients(stats)
    for q in range(P.shape[2]):
        if stats.a is None:
            yield P.new_empty(0), P.new_empty(0), P[:, :, q]
        else:
            yield stats.a[:, :, q], stats.g[:, :, :, q], P[:, :, q]


def left_of(P: Tensor) -> Tensor:
    """U1 = 1/N sum of P Pᵀ `[d_out, d_out]` of `P [R, N, d_out, d_in]`."""
    return sum(p @ p.T for row in P for p in row) / P.shape[1]  # type: ignore[return-value]


def right_of(P: Tensor) -> Tensor:
    """U2 = 1/N sum of Pᵀ P `[d_in, d_in]` of `P [R, N, d_out, d_in]`."""
    return sum(p.T @ p for row in P for p in row) / P.shape[1]  # type: ignore[return-value]


def unfold(P: Tensor, mode: int) -> Tensor:
    """Mode-i unfolding `[n_i, n / n_i]` of a tensor."""
    return P.movedim(mode, 0).reshape(P.shape[mode], -1)


def kron(*factors: Tensor) -> Tensor:
    """Kronecker product of square matrices, the first one outermost."""
    result = torch.ones(1, 1, dtype=factors[0].dtype)
    for factor in factors:
        result = torch.kron(result.contiguous(), factor.contiguous())
    return result


def root(M: Tensor, k: int) -> Tensor:
    """M^(1/k) `[n, n]` of a PSD matrix; eigenvalues that are rounding noise count as zero."""
    values, vectors = torch.linalg.eigh(M)
    values = torch.where(values > 1e-14 * values[-1], values, torch.zeros_like(values))
    return (vectors * values ** (1 / k)) @ vectors.T


def kfac_factors(a: Tensor, g: Tensor, spatial: str = "expand") -> tuple[Tensor, Tensor]:
    """`(G [d_out, d_out], A [d_in, d_in])` of `a [N, T, d_in]` and `g [R, N, T, d_out]`."""
    N, T, d_in = a.shape
    d_out = g.shape[-1]
    A, G = torch.zeros(d_in, d_in, dtype=a.dtype), torch.zeros(d_out, d_out, dtype=a.dtype)
    for n in range(N):
        if spatial == "reduce":
            A += outer(a[n].mean(0), a[n].mean(0)) / N
            G += sum(outer(g[r, n].sum(0), g[r, n].sum(0)) for r in range(len(g))) / N
            continue
        for t in range(T):
            A += outer(a[n, t], a[n, t]) / N
            G += sum(outer(g[r, n, t], g[r, n, t]) for r in range(len(g))) / (N * T)
    return G, A


def tkfac_factors(
    a: Tensor, g: Tensor, P: Tensor, spatial: str = "expand"
) -> tuple[Tensor, Tensor]:
    """Un-normalised `(U1, U2)`: of the summed gradients ("full"), or position by position
    ("expand").
    """
    if spatial == "full":
        return left_of(P), right_of(P)
    (N, T, _), R = a.shape, len(g)
    U1 = torch.zeros(g.shape[-1], g.shape[-1], dtype=a.dtype)
    U2 = torch.zeros(a.shape[-1], a.shape[-1], dtype=a.dtype)
    for r in range(R):
        for n in range(N):
            for t in range(T):
                x, d = a[n, t], g[r, n, t]
                U1 += x.dot(x) * outer(d, d) / N
                U2 += d.dot(d) * outer(x, x) / N
    return U1, U2


def corrected(P: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`Q diag(QᵀFQ) Qᵀ`: F is the block of `P [R, N, d_out, d_in]`, Q the eigenvectors of
    kron(left, right).
    """
    basis = kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    return basis @ torch.diag(torch.diagonal(basis.T @ fisher_of(P) @ basis)) @ basis.T


def rearranged(F: Tensor, d_out: int, d_in: int) -> Tensor:
    """Van Loan's rearrangement Z(F) `[d_out^2, d_in^2]`: row (i, j) holds the block F[(i, :), (j,
    :)].
    """
    return F.reshape(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3).reshape(d_out**2, d_in**2)


def nearest_kronecker(F: Tensor, d_out: int, d_in: int) -> Tensor:
    """The Kronecker product nearest to F in Frobenius norm, by a dense SVD of Z(F)."""
    U, S, Vh = torch.linalg.svd(rearranged(F, d_out, d_in))
    return S[0] * kron(U[:, 0].reshape(d_out, d_out), Vh[0].reshape(d_in, d_in))


def direct_sum(weight: Tensor, bias: Tensor, d_out: int, d_in: int) -> Tensor:
    """Matrix over W `[d_out, d_in]`: a weight part, a bias part (the last column) and no cross
    terms.
    """
    is_bias = torch.arange(d_out * d_in) % d_in == d_in - 1
    result = torch.zeros(d_out * d_in, d_out * d_in, dtype=weight.dtype)
    result[torch.outer(~is_bias, ~is_bias)] = weight.reshape(-1)
    result[torch.outer(is_bias, is_bias)] = bias.reshape(-1)
    return result


def is_convolution(stats: LayerStats) -> bool:
    """Whether the input has more than one mode."""
    return len(stats.kernel) > 1


def mode_sizes(stats: LayerStats, d_out: int, modes: int | None) -> tuple[int, ...]:
    """Modes of the weight proper: (out, in), or (C_out, C_in, kh*kw); 2 merges all inputs, 4 splits
    the kernel.
    """
    most = 3 if modes is None else modes
    inputs = [int(n) for n in stats.kernel]
    while len(inputs) > most - 1:
        inputs[-2:] = [inputs[-2] * inputs[-1]]
    return (d_out, *inputs)


def mode_covariances(P: Tensor, modes: tuple[int, ...]) -> list[Tensor]:
    """U_i = 1/N sum mat_i(P) mat_i(P)^T of gradients `P [R, N, ...]` seen as tensors of the sizes
    `modes`.
    """
    R, N = P.shape[:2]
    tensors = P.reshape(R, N, *modes)
    return [
        sum(unfold(p, i) @ unfold(p, i).T for row in tensors for p in row) / N
        for i in range(len(modes))
    ]


def over_modes(
    stats: LayerStats, modes: int | None, product: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """A product of mode covariances per group; with more than one input mode the bias is an exact
    block of its own.
    """
    rows, d_in = stats.Q * stats.d_out, stats.d_in
    blocks = []
    for _, _, P in groups(stats):
        d_out = P.shape[-2]
        sizes = mode_sizes(stats, d_out, modes)
        if len(sizes) == 2:  # the bias is one more input
            blocks.append(product(mode_covariances(P, (d_out, d_in))))
        else:
            blocks.append(product(mode_covariances(P[..., : d_in - 1] if stats.bias else P, sizes)))
    weight = torch.block_diag(*blocks)
    if len(mode_sizes(stats, 1, modes)) == 2 or not stats.bias:
        return weight
    # [R, N, Q d_out]: one block for the bias of all groups
    bias = gradients(stats)[..., -1].flatten(2)
    return direct_sum(weight, fisher_of(bias), rows, d_in)


def over_groups(stats: LayerStats, block: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Block diagonal over groups of `block(a, g, P)`."""
    return torch.block_diag(*[block(a, g, P) for a, g, P in groups(stats)])


def naive_kfac(stats: LayerStats, spatial: str = "expand") -> Tensor:
    """G (x) A."""
    return over_groups(stats, lambda a, g, P: kron(*kfac_factors(a, g, spatial)))


def naive_ekfac(stats: LayerStats, spatial: str = "expand") -> Tensor:
    """Optimal diagonal in the eigenbasis of KFAC."""
    return over_groups(stats, lambda a, g, P: corrected(P, *kfac_factors(a, g, spatial)))


def naive_tkfac(stats: LayerStats, spatial: str = "expand") -> Tensor:
    """U1 (x) U2 / t."""

    def block(a: Tensor, g: Tensor, P: Tensor) -> Tensor:
        U1, U2 = tkfac_factors(a, g, P, spatial)
        return kron(U1, U2) / torch.trace(U1)

    return over_groups(stats, block)


def naive_tekfac(stats: LayerStats, spatial: str = "expand") -> Tensor:
    """Optimal diagonal in the eigenbasis of TKFAC."""
    return over_groups(stats, lambda a, g, P: corrected(P, *tkfac_factors(a, g, P, spatial)))


def naive_tn(stats: LayerStats, modes: int | None = None) -> Tensor:
    """kron(U_1..U_k) / t^(k-1)."""
    return over_modes(stats, modes, lambda U: kron(*U) / torch.trace(U[0]) ** (len(U) - 1))


def masked(F: Tensor, label: Callable[[int, int], Any], d_out: int, d_in: int) -> Tensor:
    """F `[d, d]` with the entries between parameters of unlike `label(i, j)` set to zero."""
    names = [label(i, j) for i in range(d_out) for j in range(d_in)]
    keep = torch.tensor([[one == other for other in names] for one in names])
    return torch.where(keep, F, torch.zeros_like(F))


def naive_mini_block(stats: LayerStats, linear: str = "row", conv: str = "kernel") -> Tensor:
    """Diagonal blocks of F, or their average."""
    area = math.prod(stats.kernel[1:]) if is_convolution(stats) else 1

    def block(a: Tensor, g: Tensor, P: Tensor) -> Tensor:
        F, (d_out, d_in) = fisher_of(P), P.shape[-2:]
        one = {"dtype": F.dtype}
        if is_convolution(stats):
            if conv == "filter":
                return masked(F, lambda i, j: i, d_out, d_in)
            weights = d_in - int(stats.bias)
            return masked(F, lambda i, j: (i, j // area if j < weights else "bias"), d_out, d_in)
        if linear == "row":
            return masked(F, lambda i, j: i, d_out, d_in)
        if linear == "col":
            return masked(F, lambda i, j: j, d_out, d_in)
        if linear == "row_avg":
            return kron(torch.eye(d_out, **one), right_of(P) / d_out)
        return kron(left_of(P) / d_in, torch.eye(d_in, **one))

    return over_groups(stats, block)


def naive_tengrad(stats: LayerStats, batch: int = 128, spatial: str = "exact") -> Tensor:
    """The block of the first `batch` examples, all groups together."""
    a, g = stats.a[:batch], stats.g[:, :batch]
    if spatial != "exact":
        a = a.sum(1, keepdim=True) if spatial == "reduce_sum" else a.mean(1, keepdim=True)
        g = g.sum(2, keepdim=True)
    return dense_fisher(LayerStats(a, g))


def naive_shampoo(stats: LayerStats, match_trace: bool = True) -> Tensor:
    """c kron(U_1^(1/k)..U_k^(1/k)), with c = 1 or such that the trace is that of F (per group)."""

    def product(U: list[Tensor]) -> Tensor:
        raw = kron(*[root(M, len(U)) for M in U])
        return raw * torch.trace(U[0]) / torch.trace(raw) if match_trace else raw

    return over_modes(stats, None, product)


def naive_kpsvd(stats: LayerStats) -> Tensor:
    """The nearest Kronecker product."""
    return over_groups(stats, lambda a, g, P: nearest_kronecker(fisher_of(P), *P.shape[-2:]))


def naive_diagonal(stats: LayerStats) -> Tensor:
    """diag(F)."""
    return torch.diag(torch.diagonal(dense_fisher(stats)))


def naive_lngd(stats: LayerStats) -> Tensor:
    """diag(U1) (x) U2 / t."""

    def block(a: Tensor, g: Tensor, P: Tensor) -> Tensor:
        U1, U2 = left_of(P), right_of(P)
        return kron(torch.diag(torch.diagonal(U1)), U2) / torch.trace(U1)

    return over_groups(stats, block)
