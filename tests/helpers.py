"""Random statistics, the exact block and comparisons, shared by the tests.

Everything here is transcribed from the definitions with loops and plain dense algebra, and never
calls a method of the library: a test that compares the library with this file compares two
independent computations. Small sizes only.

Conventions (those of the library): inputs `a [N, T, Q, d_in]`, output gradients
`g [R, N, T, Q, d_out]`, per-example gradient `P = sum over t of g aᵀ`,
`F = 1/N sum over r, n of vec(P) vec(P)ᵀ`, vec row-major over `W [Q d_out, d_in]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab import approximations
from fisher_lab._passes.capture import capture
from fisher_lab._passes.labels import labels_of, output_factors
from fisher_lab._passes.model import Forward
from fisher_lab.statistics import LayerStats

KINDS = ("independent", "norm-dependent", "relu")
REL = 1e-9  # equalities
SLACK = 1e-10  # inequalities, times the norm of F


def random_stats(
    seed: int,
    kind: str = "independent",
    *,
    N: int = 6,
    T: int = 1,
    Q: int = 1,
    R: int = 2,
    d_out: int = 3,
    d_in: int = 2,
    kernel: tuple[int, ...] | None = None,
    bias: bool = False,
) -> LayerStats:
    """Random statistics of one layer.

    Args:
        kind: `"independent"` (Gaussian a and g), `"norm-dependent"` (|a_n| and |g_n| rise and fall
            together), `"relu"` (non-negative, sparse inputs and gated gradients).
        kernel: sizes of the input modes; overrides `d_in`. A bias adds one column of ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kernel is not None:
        d_in = math.prod(kernel) + int(bias)
    a, g = normal(N, T, Q, d_in), normal(R, N, T, Q, d_out)
    if kind == "norm-dependent":
        size = normal(N).exp()
        a, g = a * size[:, None, None, None], g * size[None, :, None, None, None]
    elif kind == "relu":
        a = a.clamp(min=0.0) + 0.1 * normal(N, T, Q, 1).abs()  # never all zero
        g = g * (normal(1, N, T, Q, d_out) > -0.7)
        g[..., 0] += 0.1
    elif kind != "independent":
        raise ValueError(f"kind is {kind!r}; expected one of {KINDS}.")
    if bias:
        a[..., -1] = 1.0
    return LayerStats(a, g, kernel=kernel, bias=bias)


def random_case(seed: int, *, T: int = 1, Q: int = 1) -> LayerStats:
    """Statistics whose sizes and kind vary with the seed: d_out, d_in in 1..5, N in 2..12, R in
    1..4.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    sizes = {"d_out": between(1, 5), "d_in": between(1, 5), "N": between(2, 12), "R": between(1, 4)}
    return random_stats(seed, KINDS[seed % 3], T=T, Q=Q, **sizes)


def linear_stats(X: Any, D: Any) -> LayerStats:
    """Statistics of a Linear layer, T = 1: inputs `X [N, d_in]`, gradients `D [N, d_out]` or
    `[R, N, d_out]`.
    """
    X, D = torch.as_tensor(X, dtype=torch.float64), torch.as_tensor(D, dtype=torch.float64)
    D = D if D.ndim == 3 else D[None]
    return LayerStats(X[:, None, None, :], D[:, :, None, None, :])


def explicit_stats(P: Any, kernel: tuple[int, ...] | None = None) -> LayerStats:
    """Statistics whose per-example gradients are given: `P [N, d_out, d_in]` or
    `[R, N, d_out, d_in]`; a, g unknown.
    """
    P = torch.as_tensor(P, dtype=torch.float64)
    return LayerStats.of_gradients((P if P.ndim == 4 else P[None])[:, :, None], kernel)


def stats_with_block(
    F: Tensor, d_out: int, d_in: int, kernel: tuple[int, ...] | None = None
) -> LayerStats:
    """Statistics whose exact block is the given PSD matrix `F [d, d]`."""
    values, vectors = torch.linalg.eigh(F)
    d = len(values)
    P = (vectors * (d * values.clamp(min=0.0)).sqrt()).T.reshape(d, d_out, d_in)
    return explicit_stats(P, kernel)


def columns(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """`(X [R*N, d_in], D [R*N, d_out])` of a T = 1, Q = 1 layer, with the 1/sqrt(N) inside D."""
    assert stats.a.shape[1:3] == (1, 1)
    R, N = stats.g.shape[:2]
    X = stats.a[:, 0, 0].repeat(R, 1)
    return X, stats.g[:, :, 0, 0].reshape(R * N, -1) / math.sqrt(N)


def random_orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix `[n, n]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ `[n, m]` of two vectors."""
    return x[:, None] * y[None, :]


def gradients(stats: LayerStats) -> Tensor:
    """Per-example gradients `[R, N, Q, d_out, d_in]`, position by position."""
    a, g = stats.a, stats.g
    if a is None:
        return g
    (N, T, Q, d_in), (R, d_out) = a.shape, (g.shape[0], g.shape[-1])
    P = torch.zeros(R, N, Q, d_out, d_in, dtype=a.dtype)
    for r in range(R):
        for n in range(N):
            for q in range(Q):
                for t in range(T):
                    P[r, n, q] += outer(g[r, n, t, q], a[n, t, q])
    return P


def fisher_of(P: Tensor) -> Tensor:
    """`1/N sum of vec(P) vec(P)ᵀ` `[d, d]` of per-example gradients `P [R, N, ...]`."""
    R, N = P.shape[:2]
    d = P[0, 0].numel()
    F = torch.zeros(d, d, dtype=P.dtype)
    for r in range(R):
        for n in range(N):
            F += outer(P[r, n].reshape(-1), P[r, n].reshape(-1)) / N
    return F


def dense_fisher(stats: LayerStats) -> Tensor:
    """The exact block `[d, d]`, d = Q d_out d_in, cross-group entries included."""
    return fisher_of(gradients(stats))


def build(name: str, stats: LayerStats, **options: Any) -> Any:
    """The FisherMatrix of the approximation called `name`."""
    return approximations.build(getattr(approximations, name)(**options), stats)


def dense(name: str, stats: LayerStats, **options: Any) -> Tensor:
    """The same, dense `[d, d]`."""
    return build(name, stats, **options).dense()


def frobenius(M: Tensor) -> float:
    """Frobenius norm."""
    return float(M.norm())


def spectral(M: Tensor) -> float:
    """Largest absolute eigenvalue of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(symmetric(M)).abs().max())


def lambda_max(M: Tensor) -> float:
    """Largest eigenvalue of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(symmetric(M))[-1])


def symmetric(M: Tensor) -> Tensor:
    """(M + Mᵀ) / 2."""
    return (M + M.T) / 2


def assert_same(got: Tensor, expected: Tensor, rel: float = REL) -> None:
    """Both matrices agree to `rel` times the norm of the expected one."""
    assert got.shape == expected.shape, (
        f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    error = frobenius(got - expected)
    assert error <= rel * max(frobenius(expected), 1e-300), (
        f"differs by {error:.3e} at norm {frobenius(expected):.3e}"
    )


def assert_differs(got: Tensor, expected: Tensor, rel: float = 1e-3) -> None:
    """The matrices differ by more than `rel` times the norm of the expected one."""
    assert frobenius(got - expected) > rel * frobenius(expected)


def assert_psd(M: Tensor, slack: float = SLACK, scale: float | None = None) -> None:
    """Symmetric, with no eigenvalue below rounding at the given scale (default: the norm of M)."""
    scale = max(frobenius(M), 1e-300) if scale is None else scale
    assert frobenius(M - M.T) <= slack * scale
    lowest = float(torch.linalg.eigvalsh(symmetric(M))[0])
    assert lowest >= -slack * scale, f"smallest eigenvalue {lowest:.3e} at scale {scale:.3e}"


def captured(
    model: nn.Module, layers: Any, likelihood: Any, x: Tensor, fisher: Any = "true"
) -> dict[str, LayerStats]:
    """What the library captures for one batch, with no more than the output factors of the
    likelihood.
    """
    kind = labels_of(fisher)
    return capture(Forward(model), layers, x, lambda z: output_factors(likelihood, z, kind))


def columns_at(likelihood: Any, z: Tensor, fisher: Any, y: Tensor | None = None) -> Tensor:
    """Output factors at given labels, for "mc" too."""
    return labels_of(fisher).factors(likelihood, z, y, None if fisher == "mc" else y)
