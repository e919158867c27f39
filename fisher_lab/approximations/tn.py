"""TN, tensor-normal: Ren & Goldfarb (2021), Tensor Normal Training; the covariance behind TNT.

The gradient of W is a tensor with k modes; with U_i = 1/N sum mat_i(P) mat_i(P)^T and t = tr U_i,

    F ~ U_1 (x) ... (x) U_k / t^(k-1),

which follows from E[mat_i mat_i^T] = V_i prod_{j != i} tr V_j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fisher_lab._ground.arguments import is_whole, shown
from fisher_lab.approximations.base import Approximation
from fisher_lab.approximations.moments import Moments
from fisher_lab.approximations.tkfac import unit_trace
from fisher_lab.matrices import Dense, DirectSum, FisherMatrix, Kronecker
from fisher_lab.statistics import Sums


@dataclass(frozen=True)
class TN(Approximation):
    """Kronecker product over the modes of the weight tensor, with the trace of F.

    Exact where F is a Kronecker product over these modes. With two modes it equals
    TKFAC(spatial="full"). With a convolution's kernel modes the bias is a block of its own, exact
    in itself.

    Args:
        modes: most modes to use; a weight with fewer uses its own. Default: (out, in) for Linear,
            (out, in, kernel) for convolutions; 2 flattens all inputs together with the bias, 4
            splits kh and kw.

    Raises:
        ValueError: for fewer than two modes.

    State: sum of n_i^2. See also: TKFAC, Shampoo.

    Example:
        >>> K = fl.estimate(fl.TN(), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    modes: int | None = None

    def __post_init__(self) -> None:
        if self.modes is not None and not is_whole(self.modes, 2):
            raise ValueError(
                f"TN got modes={shown(self.modes)}, expected 2 or more, or None for the weight's "
                "own modes."
            )

    def factor_sizes(self, rows: int, kernel: Sequence[int], bias: bool) -> tuple[int, ...]:
        """One of every mode, and the block of the bias where it is apart."""
        return mode_sizes(rows, kernel, bias, self.modes)

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """`mode0`, `mode1`, ... `[Q, n_i, n_i]`, and `bias` `[d_out, d_out]` where the bias is
        apart.
        """
        return mode_covariances(sums, self.modes)

    def assemble(self, moments: Moments) -> FisherMatrix:
        """Product of the mode covariances over t^(k-1)."""
        first, *rest = covariances(moments)
        factors = [first]
        for U in rest:  # the first alone carries the trace
            factors.append(unit_trace(U))
        product = Kronecker(tuple(factors))
        return with_bias(product, moments)


def mode_covariances(sums: Sums, modes: int | None = None) -> dict[str, Tensor]:
    """Second moments of every mode unfolding of the per-example gradients (see TN.moments)."""
    if modes is None:
        modes = 3
    sizes = input_modes(sums.kernel, modes)
    if len(sizes) == 1:  # the bias is an input like others
        return {"mode0": sums.left(), "mode1": sums.right()}
    found = {}
    for i, U in enumerate(sums.modes(sizes)):
        found[f"mode{i}"] = U
    if sums.bias:
        found["bias"] = sums.bias_block()
    return found


def input_modes(kernel: tuple[int, ...], modes: int) -> tuple[int, ...]:
    """The input sizes of a weight with at most `modes` modes, the last ones merged."""
    most = modes - 1
    if len(kernel) <= most:
        return kernel
    own = kernel[: most - 1]
    others = kernel[most - 1 :]
    merged = math.prod(others)
    return (*own, merged)


def mode_sizes(
    rows: int, kernel: Sequence[int], bias: bool, modes: int | None = None
) -> tuple[int, ...]:
    """Rows of the mode covariances."""
    if modes is None:
        modes = 3
    sizes = input_modes(tuple(kernel), modes)
    if len(sizes) == 1:
        return rows, sizes[0] + bias
    if bias:
        return (rows, *sizes, rows)
    return (rows, *sizes)


def covariances(moments: Moments) -> list[Tensor]:
    """The mode covariances in order."""
    found: list[Tensor] = []
    name = "mode0"
    while name in moments:
        found.append(moments[name])
        name = f"mode{len(found)}"
    return found


def with_bias(weight: FisherMatrix, moments: Moments) -> FisherMatrix:
    """The direct sum with the bias block, where there is one."""
    if "bias" not in moments:
        return weight
    bias = moments["bias"]
    block = Dense(bias, (len(bias), 1))
    return DirectSum((weight, block))
