"""How far an approximation is from the exact block: one function per error measure.

Every measure reads a `Pair` (or a `Total` of pairs over layers) and gives a value with its noise floor: the size of
the rounding (or Lanczos) error in the value itself. A value below its floor is reported as 0 with that floor.
Called as `errors.frobenius(exact, approximation)` each measure returns the value alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fisher_lab.linalg import lanczos
from fisher_lab.matrices import FisherMatrix, LowRank

DENSE_DIM = 600  # dense differences up to this d, expansions and Lanczos above
DIRECT_FLOPS = 1e12  # most work spent on evaluating a tiny difference entry by entry
CANCELLED = 1e-8  # relative squared error below which the expansion has lost half of its digits
TOLERANCE = 1e-3  # relative residual at which Lanczos stops
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to tr F / d


class Measured(NamedTuple):
    """A value and its noise floor."""

    value: float
    noise: float


class Quantities(Protocol):
    """What the undamped measures are made of, for one layer or summed over layers."""

    trace_exact: float
    trace_approx: float
    square_exact: float  # |F|_F^2
    square_approx: float
    inner: float  # <F, F^>
    square_difference: Measured  # |F - F^|_F^2
    top_exact: float  # |F|_2
    top_difference: Measured  # |F - F^|_2
    spectrum_difference: float  # sum of squared differences of the sorted eigenvalues
    eps: float


class Pair:
    """An exact block and an approximation of it, their shared quantities computed once.

    Args:
        exact: the block F.
        approx: the approximation F^ over the same W.

    Raises:
        ValueError: if the two are over weights of different shape.
    """

    def __init__(self, exact: FisherMatrix, approx: FisherMatrix) -> None:
        if tuple(exact.shape) != tuple(approx.shape):
            raise ValueError(
                f"Got an exact block over {tuple(exact.shape)} and an approximation over {tuple(approx.shape)}, "
                "expected the same weight; compare matrices of the same layer."
            )
        self.exact, self.approx = exact, approx
        self.eps = torch.finfo(exact.dtype).eps
        self.small = exact.dim <= DENSE_DIM

    @cached_property
    def trace_exact(self) -> float:
        """tr F."""
        return float(self.exact.trace())

    @cached_property
    def trace_approx(self) -> float:
        """tr F^."""
        return float(self.approx.trace())

    @cached_property
    def square_exact(self) -> float:
        """|F|_F^2."""
        return float(self.exact.frobenius_norm()) ** 2

    @cached_property
    def square_approx(self) -> float:
        """|F^|_F^2."""
        return float(self.approx.frobenius_norm()) ** 2

    @cached_property
    def inner(self) -> float:
        """<F, F^>_F without a dense matrix."""
        if self.small:
            return float((self.exact.dense() * self.approx.dense()).sum())
        if isinstance(self.exact, LowRank):
            return float(self.approx.quadratic(self.exact.stats))
        if isinstance(self.approx, LowRank):
            return float(self.exact.quadratic(self.approx.stats))
        return sum(float(((self.exact @ E) * (self.approx @ E)).sum()) for E in self.exact.identity_chunks())

    @cached_property
    def _difference(self) -> Tensor:
        return self.exact.dense() - self.approx.dense()

    @cached_property
    def square_difference(self) -> Measured:
        """|F - F^|_F^2: entry by entry for small blocks, else expanded, and entry by entry again where that cancels."""
        scale = self.square_exact + self.square_approx
        rounding = (16 * self.eps) ** 2 * scale  # of a sum of squares of rounded differences
        if self.small:
            return Measured(float(self._difference.square().sum()), rounding)
        expanded = self.square_exact - 2 * self.inner + self.square_approx
        if expanded > CANCELLED * scale:
            return Measured(expanded, 8 * self.eps * scale)
        columns = self.exact.stats.N * self.exact.stats.T if isinstance(self.exact, LowRank) else self.exact.dim
        if 4.0 * columns * self.exact.dim**2 <= DIRECT_FLOPS:
            direct = sum(float((self.exact @ E - self.approx @ E).square().sum()) for E in self.exact.identity_chunks())
            return Measured(direct, rounding)
        return Measured(max(expanded, 0.0), 8 * self.eps * scale)

    @cached_property
    def top_exact(self) -> float:
        """|F|_2."""
        return float(self.exact.spectral_norm())

    @cached_property
    def top_difference(self) -> Measured:
        """|F - F^|_2, from all eigenvalues for small blocks and by Lanczos above."""
        scale = max(self.top_exact, float(self.approx.frobenius_norm()) / self.exact.dim**0.5)
        rounding = 16 * self.eps * scale
        if self.small:
            return Measured(float(torch.linalg.eigvalsh(self._difference).abs().max()), rounding)
        found = spectral_extremes(lambda X: self.exact @ X - self.approx @ X, self.exact)
        return Measured(found.norm, max(found.residual, rounding))

    @cached_property
    def spectrum_difference(self) -> float:
        """Sum of squared differences of the sorted eigenvalues."""
        return float((self.exact.eigenvalues() - self.approx.eigenvalues()).square().sum())


class Total:
    """The block-diagonal matrix of several layers against its approximation: sums, and maxima of spectral norms.

    Args:
        parts: the layers' quantities.
    """

    _SUMS = ("trace_exact", "trace_approx", "square_exact", "square_approx", "inner", "spectrum_difference")
    _DAMPED = ("xy", "xx", "yy", "yg", "yHy", "gx")

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.eps = max(getattr(part, "eps", 0.0) for part in parts)

    def __getattr__(self, name: str) -> Any:
        values = [getattr(part, name) for part in self.parts]
        if name in self._SUMS or name in self._DAMPED:
            return sum(values)
        if name == "square_difference":
            return Measured(sum(v.value for v in values), sum(v.noise for v in values))
        if name == "top_exact":
            return max(values)
        if name in ("top_difference", "inverse_difference"):
            return max(values)
        raise AttributeError(name)


def spectral_extremes(apply: Callable[[Tensor], Tensor], like: FisherMatrix, tolerance: float = TOLERANCE) -> Any:
    """Extreme eigenvalues of an operator on arrays of the shape of W of `like`, by Lanczos."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(like.dim, generator=generator, dtype=like.dtype).to(like.device)
    return lanczos(lambda v: apply(v.view(like.shape)).flatten(), start, tolerance)


class DampedPair:
    """The damped step of both matrices for one gradient: x = (F + lambda I)^-1 g and y = (F^ + lambda I)^-1 g.

    Args:
        exact: the block F.
        approx: the approximation F^.
        gradient: g `[d_out, d_in]`; None if only the spectral error is wanted.
        damping: lambda relative to tr F / d.
        inverse: (F + lambda I)^-1, if it is already there.
    """

    def __init__(
        self,
        exact: FisherMatrix,
        approx: FisherMatrix,
        gradient: Tensor | None,
        damping: float,
        inverse: FisherMatrix | None = None,
    ) -> None:
        self.exact, self.approx, self.eps = exact, approx, torch.finfo(exact.dtype).eps
        self._gradient = gradient
        self.shift = absolute_damping(exact, damping)
        self.inverse = exact.powered(-1.0, self.shift) if inverse is None else inverse

    @property
    def gradient(self) -> Tensor:
        """g."""
        if self._gradient is None:
            raise ValueError(
                "damped_cosine and damped_efficiency need a gradient, got None; pass gradient=[d_out, d_in]."
            )
        return self._gradient

    @cached_property
    def _x(self) -> Tensor:
        return self.inverse @ self.gradient

    @cached_property
    def approx_inverse(self) -> FisherMatrix:
        """(F^ + lambda I)^-1."""
        return self.approx.powered(-1.0, self.shift)

    @cached_property
    def _y(self) -> Tensor:
        return self.approx_inverse @ self.gradient

    @cached_property
    def xy(self) -> float:
        """x . y."""
        return float((self._x * self._y).sum())

    @cached_property
    def xx(self) -> float:
        """x . x."""
        return float(self._x.square().sum())

    @cached_property
    def yy(self) -> float:
        """y . y."""
        return float(self._y.square().sum())

    @cached_property
    def yg(self) -> float:
        """y . g."""
        return float((self._y * self.gradient).sum())

    @cached_property
    def gx(self) -> float:
        """g . x."""
        return float((self._x * self.gradient).sum())

    @cached_property
    def yHy(self) -> float:
        """y . (F + lambda I) y."""
        return float((self._y * (self.exact @ self._y)).sum()) + self.shift * self.yy

    @cached_property
    def inverse_difference(self) -> Measured:
        """lambda |(F + lambda I)^-1 - (F^ + lambda I)^-1|_2, between 0 and 1."""
        if self.exact.dim <= DENSE_DIM:
            difference = self.inverse.dense() - self.approx_inverse.dense()
            return Measured(self.shift * float(torch.linalg.eigvalsh(difference).abs().max()), 16 * self.eps)
        found = spectral_extremes(lambda X: self.inverse @ X - self.approx_inverse @ X, self.exact)
        return Measured(self.shift * found.norm, max(self.shift * found.residual, 16 * self.eps))


def absolute_damping(exact: FisherMatrix, damping: float) -> float:
    """Lambda for a damping relative to tr F / d, the mean eigenvalue.

    Raises:
        ValueError: if the damping is not positive and finite, or F is zero.
    """
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"Got damping={damping}, expected a positive number relative to tr F / d.")
    mean = float(exact.trace()) / exact.dim
    if mean <= 0:
        raise ValueError("The exact block is zero, expected a positive trace: no damping is relative to it.")
    return damping * mean


# -- the measures ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measure:
    """A registered error measure."""

    name: str
    formula: Callable[[Any], Measured]
    default: bool
    damped: bool


MEASURES: dict[str, Measure] = {}


def measure(default: bool = False, damped: bool = False) -> Callable[[Callable[[Any], Measured]], Callable[..., float]]:
    """Register an error measure under its function's name; the public function takes matrices and returns a float.

    Args:
        default: whether `compare` measures it without being asked.
        damped: whether it is a function of a DampedPair, one value for each damping.
    """

    def decorate(formula: Callable[[Any], Measured]) -> Callable[..., float]:
        name = formula.__name__
        MEASURES[name] = Measure(name, formula, default, damped)
        if damped:

            def public(
                exact: FisherMatrix, approx: FisherMatrix, gradient: Tensor | None = None, damping: float = 1e-2
            ) -> float:
                return formula(DampedPair(exact, approx, gradient, damping)).value

        else:

            def public(exact: FisherMatrix, approx: FisherMatrix) -> float:  # type: ignore[misc]
                return formula(Pair(exact, approx)).value

        public.__name__, public.__doc__ = name, formula.__doc__
        return public

    return decorate


def _floored(value: float, noise: float) -> Measured:
    return Measured(0.0 if abs(value) <= noise else value, noise)


def _relative(numerator: float, denominator: float) -> float:
    """The quotient; 0 / 0 is 0 (both matrices are zero), x / 0 is infinite."""
    if denominator > 0:
        return numerator / denominator
    return 0.0 if numerator == 0 else math.copysign(math.inf, numerator)


@measure(default=True)
def trace(q: Quantities) -> Measured:
    """(tr F^ - tr F) / tr F."""
    noise = 16 * q.eps * (1 + abs(_relative(q.trace_approx, q.trace_exact)))
    return _floored(_relative(q.trace_approx - q.trace_exact, q.trace_exact), noise)


@measure(default=True)
def trace_ratio(q: Quantities) -> Measured:
    """tr F^ / tr F."""
    ratio = _relative(q.trace_approx, q.trace_exact)
    return Measured(ratio, 16 * q.eps * abs(ratio))


def _root(square: Measured, scale: float) -> Measured:
    """sqrt(square) / sqrt(scale) with the noise floor that goes with it."""
    if square.value <= square.noise:
        return Measured(0.0, math.sqrt(_relative(square.noise, scale)))
    value = math.sqrt(_relative(square.value, scale))
    return Measured(value, value * square.noise / (2 * square.value))


@measure(default=True)
def frobenius(q: Quantities) -> Measured:
    """|F^ - F|_F / |F|_F."""
    return _root(q.square_difference, q.square_exact)


@measure(default=True)
def frobenius_rescaled(q: Quantities) -> Measured:
    """min over c of |c F^ - F|_F / |F|_F = sqrt(1 - cosine^2): the error of the shape alone."""
    # |F^|^2 |F - c F^|^2 = |F|^2 |F^|^2 - <F, F^>^2, written with the difference so that it does not cancel
    difference = q.square_difference
    gap = q.square_approx - q.inner  # <F^ - F, F^>
    if q.square_approx <= 0:
        return Measured(0.0 if q.square_exact <= 0 else 1.0, 0.0)
    square = difference.value - gap * gap / q.square_approx
    return _root(Measured(max(square, 0.0), difference.noise + 8 * q.eps * abs(gap)), q.square_exact)


@measure(default=True)
def cosine(q: Quantities) -> Measured:
    """<F, F^> / (|F|_F |F^|_F)."""
    value = _relative(q.inner, math.sqrt(q.square_exact * q.square_approx))
    return Measured(min(value, 1.0), 16 * q.eps)


@measure(default=True)
def spectral(q: Quantities) -> Measured:
    """|F^ - F|_2 / |F|_2."""
    top = q.top_difference
    return _floored(_relative(top.value, q.top_exact), _relative(top.noise, q.top_exact))


@measure()
def spectrum(q: Quantities) -> Measured:
    """l2 distance of the sorted eigenvalues, relative to |F|_F."""
    return _root(
        Measured(q.spectrum_difference, (64 * q.eps) ** 2 * (q.square_exact + q.square_approx)), q.square_exact
    )


@measure(damped=True)
def damped_cosine(q: Any) -> Measured:
    """Cosine between the damped steps (F + lambda I)^-1 g and (F^ + lambda I)^-1 g."""
    return Measured(min(_relative(q.xy, math.sqrt(q.xx * q.yy)), 1.0), 64 * q.eps)


@measure(damped=True)
def damped_efficiency(q: Any) -> Measured:
    """Share of the best decrease of the damped quadratic model that the step along (F^ + lambda I)^-1 g reaches.

    (y . g)^2 / [(y . (F + lambda I) y) (g . (F + lambda I)^-1 g)], 1 only for the exact direction.
    """
    return Measured(min(_relative(q.yg**2, q.yHy * q.gx), 1.0), 64 * q.eps)


@measure(damped=True)
def damped_spectral(q: Any) -> Measured:
    """lambda |(F^ + lambda I)^-1 - (F + lambda I)^-1|_2, which lies between 0 and 1."""
    top = q.inverse_difference
    return _floored(top.value, top.noise)


def chosen(names: str | Sequence[str]) -> list[Measure]:
    """The measures behind "default", "all" or a list of names.

    Raises:
        ValueError: for unknown names.
    """
    if names == "default":
        return [m for m in MEASURES.values() if m.default]
    if names == "all":
        return list(MEASURES.values())
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in MEASURES:
            raise ValueError(f'Got error {name!r}, expected "default", "all" or some of {", ".join(MEASURES)}.')
    if not names:
        raise ValueError('Got errors=[], expected "default", "all" or at least one name.')
    return [MEASURES[name] for name in dict.fromkeys(names)]
