"""What the measures are made of: plain numbers of one layer, which add up to those of
all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Self, TypeVar, overload


class Measured(NamedTuple):
    """A value and its noise floor."""

    value: float
    noise: float


NOT_ASKED: Any = None  # the value of a quantity that no measure asked for
# of layers together: the largest
LARGEST = ("eps", "rounding", "top_exact", "top_difference", "inverse_difference")
# layers together have none; everything else adds up
OF_ONE_LAYER = ("shift", "spectrum_difference")


@dataclass(frozen=True)
class Numbers:
    """Numbers that measures read; None where none asked for it. `one + other` are those of two
    layers together.
    """

    eps: float = 0.0  # of the precision

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> Self:
        """Those among the entries of a table; numbers of a file have lost their type."""
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = numbers.get(field.name)
            if isinstance(value, list | tuple):
                value = Measured(*value)
            if value is not None:
                known[field.name] = value
        return cls(**known)

    def known(self) -> dict[str, float | Measured]:
        """The numbers that were asked for, by name."""
        entries = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                entries[field.name] = value
        return entries

    def __add__(self, other: Self) -> Self:
        mine = self.known()
        theirs = other.known()
        together: dict[str, Any] = {}
        for name in mine:
            if name not in theirs:
                continue
            if name in LARGEST:
                together[name] = max(mine[name], theirs[name])
            elif name not in OF_ONE_LAYER:
                together[name] = _sum(mine[name], theirs[name])
        return type(self)(**together)


def _sum(one: Any, other: Any) -> Any:
    """The sum; of measured values that of the noise floors, too."""
    if isinstance(one, Measured):
        return Measured(one.value + other.value, one.noise + other.noise)
    return one + other


@dataclass(frozen=True)
class Quantities(Numbers):
    """What undamped measures are made of, of one layer or of the block-diagonal matrix of several.

    Attributes:
        trace_exact: tr F.
        trace_approx: tr F^.
        square_exact: |F|_F^2.
        square_approx: |F^|_F^2.
        inner: <F, F^>.
        square_difference: |F - F^|_F^2.
        top_exact: |F|_2.
        top_difference: |F - F^|_2.
        spectrum_difference: sum of squared differences of the sorted eigenvalues; of one layer
            alone.
        eps: of the precision.
    """

    trace_exact: float = NOT_ASKED
    trace_approx: float = NOT_ASKED
    square_exact: float = NOT_ASKED
    square_approx: float = NOT_ASKED
    inner: float = NOT_ASKED
    square_difference: Measured = NOT_ASKED
    top_exact: float = NOT_ASKED
    top_difference: Measured = NOT_ASKED
    spectrum_difference: float = NOT_ASKED


@dataclass(frozen=True)
class DampedQuantities(Numbers):
    """What damped measures are made of: the steps x of F and y of F^ for one gradient g, and the
    damped inverses.

    Attributes:
        shift: lambda itself; of one layer alone.
        rounding: relative rounding error of a damped step.
        xy: x . y.
        xx: x . x.
        yy: y . y.
        yg: y . g.
        gx: g . x.
        yHy: y . (F + lambda I) y.
        inverse_difference: lambda |(F + lambda I)^-1 - (F^ + lambda I)^-1|_2.
        eps: of the precision.
    """

    shift: float = NOT_ASKED
    rounding: float = NOT_ASKED
    xy: float = NOT_ASKED
    xx: float = NOT_ASKED
    yy: float = NOT_ASKED
    yg: float = NOT_ASKED
    gx: float = NOT_ASKED
    yHy: float = NOT_ASKED  # noqa: N815 (as it is written in formulas)
    inverse_difference: Measured = NOT_ASKED


@dataclass(frozen=True)
class NetworkQuantities(Numbers):
    """What measures of the whole network are made of.

    Attributes:
        square_outside: |F outside the blocks of the layers|_F^2.
        square_network: |F|_F^2 of the whole network.
        eps: of the precision.
    """

    square_outside: float = NOT_ASKED
    square_network: float = NOT_ASKED


N = TypeVar("N", bound=Numbers)


def total(parts: Iterable[N]) -> N:
    """The numbers of all layers together.

    Args:
        parts: of every layer, one at least.
    """
    first, *rest = parts
    together = first
    for part in rest:
        together = together + part
    return together


class Asked:
    """Matrices, mostly a pair of them, whose numbers are computed when a measure first asks for
    them.

    Args:
        eps: of the precision.

    Attributes:
        numbers: those computed so far, by name.
    """

    kind: type[Numbers]

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.numbers: dict[str, Any] = {"eps": eps}

    def asked(self, names: Iterable[str] = ()) -> Any:
        """The numbers that were asked for so far.

        Args:
            names: of some to compute first.
        """
        for name in names:
            getattr(self, name)
        return self.kind(**self.numbers)


T = TypeVar("T")


class quantity(Generic[T]):  # noqa: N801
    """A number of `Asked` matrices that is computed once, and then stands in `numbers` under its
    name.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, pair: None, owner: type) -> Self: ...

    @overload
    def __get__(self, pair: Asked, owner: type) -> T: ...

    def __get__(self, pair: Asked | None, owner: type) -> Self | T:
        if pair is None:
            return self
        if self.name not in pair.numbers:
            pair.numbers[self.name] = self.compute(pair)
        found: T = pair.numbers[self.name]
        return found
