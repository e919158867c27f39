"""An exact block and an approximation under damping: steps and inverses."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.arguments import number
from fisher_lab._ground.linalg import eigenvalues
from fisher_lab._ground.quadrature import Bounds, inverse_form
from fisher_lab.errors.pair import DENSE_DIM
from fisher_lab.errors.quantities import Asked, DampedQuantities, Measured, quantity
from fisher_lab.errors.spectral import extremes
from fisher_lab.matrices import FisherMatrix

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to tr F / d
DAMPING = 1e-2  # that steps are judged at where nobody asks for another
QUADRATURE = 1e-4  # distance of the bounds of g . x, relative; the lower one is nearer than that
MOST_PRODUCTS = 20_000
# what a block of many columns gives by products alone, without its damped inverse
BY_PRODUCTS = frozenset({"yg", "yHy", "gx", "rounding"})


class DampedPair(Asked):
    """The damped step of both matrices for one gradient g.

    x = (F + lambda I)^-1 g and y = (F^ + lambda I)^-1 g.

    Args:
        exact: the block F.
        approx: the approximation F^.
        gradient: g `[d_out, d_in]`; None if only the spectral error is wanted.
        damping: lambda relative to tr F / d.
        inverse: (F + lambda I)^-1, if it is already there; else formed when it is needed.
        best: bounds of g . x, if they are already there, so that x is not needed for it.
    """

    kind = DampedQuantities

    def __init__(
        self,
        exact: FisherMatrix,
        approx: FisherMatrix,
        gradient: Tensor | None,
        damping: float,
        inverse: FisherMatrix | None = None,
        best: Bounds | None = None,
    ) -> None:
        super().__init__(eps=max(exact.rounding, approx.rounding))
        self.exact = exact
        self.approx = approx
        self.shift = absolute_damping(exact, damping)
        self.numbers["shift"] = self.shift
        self._gradient = gradient
        self._known_inverse = inverse
        self._best = best

    @cached_property
    def inverse(self) -> FisherMatrix:
        """(F + lambda I)^-1."""
        if self._known_inverse is not None:
            return self._known_inverse
        return self.exact.powered(-1.0, self.shift)

    @quantity
    def rounding(self) -> float:
        """Relative rounding error of a damped step.

        It is eps times the condition number of F + lambda I, with a margin; where g . x comes from
        bounds, their distance, if that is more.
        """
        top = float(self.exact.frobenius_norm())  # an upper bound of |F|_2
        condition = 1 + top / self.shift
        rounded = 16 * self.eps * condition
        if self._best is None:
            return rounded
        apart = (self._best.high - self._best.low) / self._best.low
        return max(rounded, apart)

    @property
    def gradient(self) -> Tensor:
        """g."""
        if self._gradient is None:
            raise ValueError(
                "damped_cosine and damped_efficiency need a gradient, got None; pass "
                "gradient=[d_out, d_in]."
            )
        return self._gradient

    @cached_property
    def _x(self) -> Tensor:
        return self.inverse @ self.gradient

    @cached_property
    def approx_inverse(self) -> FisherMatrix:
        """(F^ + lambda I)^-1."""
        inverse = self.approx.powered(-1.0, self.shift)
        for tensor in inverse.tensors().values():
            # structures do not look whether a Cholesky factorisation succeeded: trainers must not
            # wait for that
            if not bool(torch.isfinite(tensor).all()):
                return self.approx.rescued(-1.0, self.shift)
        return inverse

    def forget_inverse(self) -> None:
        """Free the approximation's inverse, once its step is known."""
        self.__dict__.pop("approx_inverse", None)

    @cached_property
    def step(self) -> Tensor:
        """y = (F^ + lambda I)^-1 g."""
        return self.approx_inverse @ self.gradient

    @quantity
    def xy(self) -> float:
        """x . y."""
        return float((self._x * self.step).sum())

    @quantity
    def xx(self) -> float:
        """x . x."""
        return float(self._x.square().sum())

    @quantity
    def yy(self) -> float:
        """y . y."""
        return float(self.step.square().sum())

    @quantity
    def yg(self) -> float:
        """y . g."""
        return float((self.step * self.gradient).sum())

    @quantity
    def gx(self) -> float:
        """g . x."""
        if self._best is not None:
            return self._best.low  # the nearer one
        return float((self._x * self.gradient).sum())

    @quantity
    def yHy(self) -> float:
        """y . (F + lambda I) y."""
        Fy = self.exact @ self.step
        undamped = (self.step * Fy).sum()
        return float(undamped) + self.shift * self.yy

    @quantity
    def inverse_difference(self) -> Measured:
        """lambda |(F + lambda I)^-1 - (F^ + lambda I)^-1|_2, between 0 and 1."""
        if self.exact.dim <= DENSE_DIM:
            difference = self.inverse.dense() - self.approx_inverse.dense()
            top = eigenvalues(difference).abs().max()
            return Measured(self.shift * float(top), self.rounding)
        found = extremes(self.inverse.minus(self.approx_inverse), self.exact)
        unfinished = self.shift * found.residual  # of the Lanczos method
        return Measured(self.shift * found.norm, max(unfinished, self.rounding))


def best_decrease(exact: FisherMatrix, gradient: Tensor, shift: float) -> Bounds:
    """Bounds of g . (F + lambda I)^-1 g by products with F, for blocks too large for an inverse.

    Args:
        exact: F.
        gradient: g `[d_out, d_in]`, not zero.
        shift: lambda.
    """

    def flat(v: Tensor) -> Tensor:
        return (exact @ v.view(exact.shape)).flatten()

    (found,) = inverse_form(flat, gradient.flatten(), [shift], QUADRATURE, MOST_PRODUCTS)
    return found


def absolute_damping(exact: FisherMatrix, damping: float) -> float:
    """Lambda for a damping relative to tr F / d, the mean eigenvalue.

    Raises:
        ValueError: if the damping is not positive and finite, or F is zero.
    """
    if not 0 < number(damping) < math.inf:
        raise ValueError(
            f"Got damping={damping!r}, expected a positive number relative to tr F / d."
        )
    mean = float(exact.trace()) / exact.dim
    if mean <= 0:
        raise ValueError(
            "The exact block is zero, expected a positive trace: no damping is relative to it."
        )
    return damping * mean
