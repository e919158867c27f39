"""What the measures are made of: plain numbers of one layer, or their sums over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


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


class Total:
    """The block-diagonal matrix of several layers against its approximation: sums, and maxima of spectral norms.

    Args:
        parts: the layers' quantities.
    """

    _SUMS = ("trace_exact", "trace_approx", "square_exact", "square_approx", "inner")
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
        if name in ("top_exact", "rounding"):
            return max(values)
        if name in ("top_difference", "inverse_difference"):
            return max(values)
        raise AttributeError(name)
