"""TN, tensor-normal: Ren & Goldfarb (2021), Tensor Normal Training; the covariance behind TNT.

The gradient of W is a tensor with k modes; with U_i = 1/N sum mat_i(P) mat_i(P)^T and t = tr U_i,

    F ~ U_1 (x) ... (x) U_k / t^(k-1)            (derived from E[mat_i mat_i^T] = V_i prod_{j != i} tr V_j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab._ground.arguments import is_whole
from fisher_lab.approximations.base import Approximation, Moments
from fisher_lab.approximations.tkfac import unit_trace
from fisher_lab.matrices import Dense, DirectSum, FisherMatrix, Kronecker
from fisher_lab.statistics import LayerStats
from fisher_lab.statistics.contractions import STREAM_BYTES


@dataclass(frozen=True)
class TN(Approximation):
    """Kronecker product over the modes of the weight tensor, with the trace of F.

    Exact where F is a Kronecker product over these modes. With two modes it equals TKFAC(spatial="full"). With a
    convolution's kernel modes the bias is a block of its own, exact in itself.

    Args:
        modes: most modes to use; a weight with fewer uses its own. Default: (out, in) for Linear,
            (out, in, kernel) for convolutions; 2 flattens all inputs together with the bias, 4 splits kh and kw.

    Raises:
        ValueError: for fewer than two modes.

    State: sum of n_i^2. See also: TKFAC, Shampoo.
    """

    modes: int | None = None

    def __post_init__(self) -> None:
        if self.modes is not None and not is_whole(self.modes, 2):
            raise ValueError(f"TN got modes={self.modes!r}, expected 2 or more, or None for the weight's own modes.")

    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """`mode0`, `mode1`, ... `[Q, n_i, n_i]`, and `bias` `[d_out, d_out]` where the bias is apart."""
        return mode_covariances(stats, self.modes)

    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """Product of the mode covariances over t^(k-1)."""
        first, *rest = covariances(moments)
        return with_bias(Kronecker((first, *(unit_trace(U) for U in rest))), moments)


def mode_covariances(stats: LayerStats, modes: int | None = None) -> Moments:
    """Second moments of every mode unfolding of the per-example gradients (see TN.moments)."""
    sizes = input_modes(stats.kernel, 3 if modes is None else modes)
    if len(sizes) == 1:
        return {"mode0": stats.left(), "mode1": stats.right()}
    return dict(stats.shared(f"modes {sizes}", lambda: _of_modes(stats, sizes)))


def _of_modes(stats: LayerStats, sizes: tuple[int, ...]) -> Moments:
    weight = stats.inputs(slice(0, math.prod(sizes)))
    totals: list[Tensor] = []
    for P in weight.per_example(STREAM_BYTES):
        unfoldings = _unfold(P.unflatten(-1, sizes))
        products = [M @ M.transpose(1, 2) for M in unfoldings]
        totals = [x + y for x, y in zip(totals, products, strict=True)] if totals else products
    moments = {f"mode{i}": total / stats.N for i, total in enumerate(totals)}
    if stats.bias:
        moments["bias"] = stats.inputs(slice(-1, None)).dense()
    return moments


def input_modes(kernel: tuple[int, ...], modes: int) -> tuple[int, ...]:
    """The input sizes of a weight with at most `modes` modes, the last ones merged."""
    most = modes - 1
    return kernel if len(kernel) <= most else (*kernel[: most - 1], math.prod(kernel[most - 1 :]))


def covariances(moments: Moments) -> list[Tensor]:
    """The mode covariances in order."""
    return [moments[f"mode{i}"] for i in range(len(moments)) if f"mode{i}" in moments]


def with_bias(weight: FisherMatrix, moments: Moments) -> FisherMatrix:
    """The direct sum with the bias block, where there is one."""
    if "bias" not in moments:
        return weight
    bias = moments["bias"]
    return DirectSum((weight, Dense(bias, (bias.shape[0], 1))))


def _unfold(P: Tensor) -> list[Tensor]:
    """Mode unfoldings `[Q, n_i, rest]` of per-example gradients P `[R, n, Q, n_1, ..., n_k]`."""
    P = P.flatten(0, 1).transpose(0, 1)  # [Q, columns, n_1, ..., n_k]
    return [torch.movedim(P, mode, 1).flatten(2) for mode in range(2, P.ndim)]
