"""How far an approximation is from the exact block: one function per error measure.

Every measure reads the quantities of a `Pair` (or their `total` over layers) and gives a value with
its noise floor: the size of the rounding (or Lanczos) error in the value itself. A value below its
floor is reported as 0 with that floor. Called as `errors.frobenius(exact, approximation)` each
measure returns the value alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fisher_lab._ground.arguments import check_kind, names_of
from fisher_lab._ground.text import did_you_mean, first_paragraph
from fisher_lab.errors.damped import DampedPair
from fisher_lab.errors.network import COLUMNS, Network
from fisher_lab.errors.pair import Pair
from fisher_lab.errors.quantities import DampedQuantities, Measured, NetworkQuantities, Quantities
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics.contractions import Columns

Formula = Callable[[Any], Measured]
Judges = Literal["size", "matrix", "direction"]


@dataclass(frozen=True)
class Measure:
    """All that there is to know about an error measure; nothing else of the package knows one by
    its name.

    Attributes:
        name: what it is asked for by, the name of its formula.
        formula: from the quantities of a pair, or of several layers, to a value with its noise
            floor.
        default: whether `compare` measures it without being asked.
        damped: whether it is a function of a DampedPair, one value for each damping.
        layered: whether it is a function of sums over layers, so that it has a value over all
            layers.
        network: whether it is a function of the whole network's F instead: one value for all
            approximations, or with `damped` one for the step of each.
        exact: its value where the approximation is the exact block; None for a measure that judges
            nothing, so that figures draw no such line and the report recommends nothing by it.
        symbol: its formula in LaTeX for the axes of figures.
        title: what the report calls it in a sentence.
        needs: names of the quantities that its formula reads; None for whatever it reads.
        judges: what of the matrix it judges, which says where the report and the figures put it.
        smooth: whether it has a derivative at its exact value, and with it a standard error there;
            a norm has none.
    """

    name: str
    formula: Formula
    default: bool
    damped: bool
    layered: bool
    network: bool
    exact: float | None
    symbol: str
    title: str
    needs: tuple[str, ...] | None
    judges: Judges | None
    smooth: bool

    def reads(self, quantity: str) -> bool:
        """Whether its row says that the formula reads a quantity."""
        return self.needs is not None and quantity in self.needs

    def read(self, quantities: Any) -> tuple[str, ...]:
        """The quantities that the formula reads: what its row says, else what it is seen to read.

        Args:
            quantities: to try it on.
        """
        if self.needs is not None:
            return self.needs
        watched = _Watched(quantities)
        self.formula(watched)
        return tuple(watched.read)

    def describe(self) -> str:
        """The first paragraph of the formula's docstring, on one line."""
        return first_paragraph(self.formula)


class _Watched:
    """Quantities that write down which of them are read."""

    def __init__(self, quantities: Any) -> None:
        self._quantities = quantities
        self.read: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name != "eps" and name not in self.read:
            self.read.append(name)
        return getattr(self._quantities, name)


MEASURES: dict[str, Measure] = {}
SEVERAL = ("default", "all")  # words that stand for several measures


def exact_value(name: str) -> float | None:
    """The value of an error at the exact block; None where no measure of that name says one."""
    row = MEASURES.get(name)
    if row is None:
        return None
    return row.exact


def judging(what: Judges, names: Container[str]) -> list[str]:
    """Those of some errors that judge one thing, in the order of the registry."""
    found = []
    for row in MEASURES.values():
        if row.judges == what and row.name in names:
            found.append(row.name)
    return found


def measure(
    default: bool = False,
    damped: bool = False,
    layered: bool = True,
    network: bool = False,
    exact: float | None = None,
    symbol: str = "",
    title: str | None = None,
    needs: Sequence[str] | None = None,
    judges: Judges | None = None,
    smooth: bool = False,
) -> Callable[[Formula], Callable[..., float]]:
    """Register an error measure under its function's name.

    The public function takes matrices and returns a float.

    Args:
        default: whether `compare` measures it without being asked.
        damped: whether it is a function of a DampedPair, one value for each damping.
        layered: whether it has a value over all layers.
        network: whether it is a function of NetworkQuantities, one value for the whole network, or
            with `damped` of the DampedQuantities of a step of the whole network; by name only: it
            needs the columns of all layers at once.
        exact: its value at the exact block, usually 0 or 1; None for a measure that judges nothing:
            it is measured, but neither recommended by nor drawn with a line that says what is
            exact.
        symbol: its formula in LaTeX, for the axes of figures.
        title: what the report calls it; None for its name.
        needs: names of the quantities that the formula reads, attributes of `Quantities` or of a
            DampedPair; None for whatever it reads. A measure that says it needs `top_difference`
            shares the Lanczos runs with others.
        judges: "matrix" (how far all of it is), "direction" (up to a factor) or "size": which of
            several measures the report names first.
        smooth: whether it has a derivative at its exact value.

    Returns:
        The decorator.

    Raises:
        ValueError: for a function whose name is "default", "all" or that of another measure.
    """

    def decorate(formula: Formula) -> Callable[..., float]:
        name = formula.__name__
        _check_name(name, formula)
        names = None if needs is None else tuple(needs)
        MEASURES[name] = Measure(
            name=name,
            formula=formula,
            default=default,
            damped=damped,
            layered=layered,
            network=network,
            exact=exact,
            symbol=symbol,
            title=title or name,
            needs=names,
            judges=judges,
            smooth=smooth,
        )
        if network and damped:
            public = _step_function(formula)
        elif network:
            public = _network_function(formula)
        elif damped:
            public = _damped_function(formula)
        else:
            public = _plain_function(formula)
        public.__name__ = name
        public.__qualname__ = name
        public.__module__ = formula.__module__
        public.__doc__ = formula.__doc__
        return public

    return decorate


def _check_name(name: str, formula: Formula) -> None:
    """Refuse a name that stands for something else already.

    Raises:
        ValueError: for a word of `chosen`, or the name of another formula.
    """
    if name in SEVERAL:
        raise ValueError(
            f"Got an error measure named {name!r}, which stands for several measures, expected "
            "another name; rename the function."
        )
    known = MEASURES.get(name)
    if known is None:
        return
    earlier = (known.formula.__module__, known.formula.__qualname__)
    if earlier == (formula.__module__, formula.__qualname__):
        return  # its module was loaded anew
    raise ValueError(
        f"Got a second error measure named {name!r} beside {'.'.join(earlier)}, expected a new "
        "name; rename the function."
    )


def _plain_function(formula: Formula) -> Callable[..., float]:
    def public(exact: FisherMatrix, approx: FisherMatrix) -> float:
        _check_blocks(exact, approx)
        pair = Pair(exact, approx)
        return formula(pair).value

    return public


def _damped_function(formula: Formula) -> Callable[..., float]:
    def public(
        exact: FisherMatrix,
        approx: FisherMatrix,
        gradient: Tensor | None = None,
        damping: float = 1e-2,
    ) -> float:
        _check_blocks(exact, approx)
        pair = DampedPair(exact, approx, gradient, damping)
        return formula(pair).value

    return public


def _network_function(formula: Formula) -> Callable[..., float]:
    def public(columns: Columns | Sequence[Columns]) -> float:
        check_kind("columns", columns, (Mapping, list, tuple), COLUMNS)
        pieces = [columns] if isinstance(columns, Mapping) else list(columns)
        network = Network(pieces)
        return formula(network).value

    return public


def _step_function(formula: Formula) -> Callable[..., float]:
    def public(network: Any, step: Mapping[str, Tensor], damping: float) -> float:
        if not callable(getattr(network, "quantities", None)):
            found = type(network).__name__
            raise TypeError(f"Got network of type {found}, expected what fl.network returned.")
        return formula(network.quantities(step, damping)).value

    return public


def _check_blocks(*blocks: FisherMatrix) -> None:
    for block in blocks:
        if not isinstance(block, FisherMatrix):
            raise TypeError(
                f"Got a block of type {type(block).__name__}, expected a FisherMatrix, such as "
                "exact['0']."
            )


def _floored(value: float, noise: float) -> Measured:
    """What is not above its noise is reported as 0."""
    if abs(value) <= noise:
        value = 0.0
    return Measured(value, noise)


def _relative(numerator: float, denominator: float) -> float:
    """The quotient; 0 / 0 is 0 (both matrices are zero), x / 0 is infinite."""
    if denominator > 0:
        return numerator / denominator
    if numerator == 0:
        return 0.0
    return math.copysign(math.inf, numerator)


@measure(
    default=True,
    exact=0.0,
    symbol=r"$(\mathrm{tr}\,\hat F - \mathrm{tr}\,F)\;/\;\mathrm{tr}\,F$",
    needs=["trace_exact", "trace_approx"],
    judges="size",
    smooth=True,
)
def trace(q: Quantities) -> Measured:
    """(tr F^ - tr F) / tr F.

    Example:
        >>> abs(fl.errors.trace(exact, kfac)) < 0.5
        True
    """
    noise = 16 * q.eps * (1 + abs(_relative(q.trace_approx, q.trace_exact)))
    return _floored(_relative(q.trace_approx - q.trace_exact, q.trace_exact), noise)


@measure(
    default=True,
    exact=1.0,
    symbol=r"$\mathrm{tr}\,\hat F\;/\;\mathrm{tr}\,F$",
    needs=["trace_exact", "trace_approx"],
    judges="size",
    smooth=True,
)
def trace_ratio(q: Quantities) -> Measured:
    """tr F^ / tr F.

    Example:
        >>> 0.5 < fl.errors.trace_ratio(exact, kfac) < 2
        True
    """
    ratio = _relative(q.trace_approx, q.trace_exact)
    return Measured(ratio, 16 * q.eps * abs(ratio))


def _root(square: Measured, scale: float, eps: float) -> Measured:
    """sqrt(square) / sqrt(scale) with the noise floor that goes with it.

    Args:
        square: the square.
        scale: what it is relative to.
        eps: of the precision: no floor lies below one rounding.
    """
    if square.value <= square.noise:
        noise = math.sqrt(_relative(square.noise, scale))
        return Measured(0.0, noise)
    value = math.sqrt(_relative(square.value, scale))
    propagated = value * square.noise / (2 * square.value)  # d sqrt(s) = ds / (2 sqrt(s))
    rounding = min(16 * eps, value)
    return Measured(value, max(propagated, rounding))


@measure(
    default=True,
    exact=0.0,
    symbol=r"$|\hat F - F|_F\;/\;|F|_F$",
    title="Frobenius",
    needs=["square_exact", "square_difference"],
    judges="matrix",
)
def frobenius(q: Quantities) -> Measured:
    """|F^ - F|_F / |F|_F.

    Example:
        >>> 0 < fl.errors.frobenius(exact, kfac) < 1
        True
    """
    return _root(q.square_difference, q.square_exact, q.eps)


@measure(
    default=True,
    exact=0.0,
    symbol=r"$\min_c\,|c\hat F - F|_F\;/\;|F|_F$",
    needs=["square_exact", "square_approx", "inner", "square_difference"],
    judges="matrix",
)
def frobenius_rescaled(q: Quantities) -> Measured:
    """min over c of |c F^ - F|_F / |F|_F = sqrt(1 - cosine^2): the error of the shape alone.

    Example:
        >>> fl.errors.frobenius_rescaled(exact, kfac) <= fl.errors.frobenius(exact, kfac)
        True
    """
    # |F^|^2 |F - c F^|^2 = |F|^2 |F^|^2 - <F, F^>^2, written with the difference so that it does
    # not cancel
    difference = q.square_difference
    gap = q.square_approx - q.inner  # <F^ - F, F^>
    if q.square_approx <= 0:
        value = 0.0 if q.square_exact <= 0 else 1.0
        return Measured(value, 0.0)
    best = gap * gap / q.square_approx  # what the best factor takes off
    square = max(difference.value - best, 0.0)
    noise = difference.noise + 8 * q.eps * abs(gap)
    return _root(Measured(square, noise), q.square_exact, q.eps)


@measure(
    default=True,
    exact=1.0,
    symbol=r"$\langle F, \hat F\rangle\;/\;(|F|_F\,|\hat F|_F)$",
    needs=["square_exact", "square_approx", "inner"],
    judges="direction",
    smooth=True,
)
def cosine(q: Quantities) -> Measured:
    """<F, F^> / (|F|_F |F^|_F).

    Example:
        >>> 0.5 < fl.errors.cosine(exact, kfac) < 1
        True
    """
    if q.square_exact <= 0 and q.square_approx <= 0:
        return Measured(1.0, 16 * q.eps)  # both are zero
    norms = math.sqrt(q.square_exact) * math.sqrt(q.square_approx)
    value = _relative(q.inner, norms)
    return Measured(min(value, 1.0), 16 * q.eps)


@measure(
    default=True,
    exact=0.0,
    symbol=r"$|\hat F - F|_2\;/\;|F|_2$",
    title="spectral norm",
    needs=["top_exact", "top_difference"],
    judges="matrix",
)
def spectral(q: Quantities) -> Measured:
    """|F^ - F|_2 / |F|_2.

    Example:
        >>> 0 < fl.errors.spectral(exact, kfac) < 1
        True
    """
    top = q.top_difference
    value = _relative(top.value, q.top_exact)
    noise = _relative(top.noise, q.top_exact)
    return _floored(value, noise)


@measure(
    layered=False,
    exact=0.0,
    symbol="l2 distance of sorted eigenvalues / $|F|_F$",
    needs=["spectrum_difference", "square_exact", "square_approx"],
)
def spectrum(q: Quantities) -> Measured:
    """l2 distance of the sorted eigenvalues, relative to |F|_F; layer by layer only.

    Example:
        >>> fl.errors.spectrum(exact, kfac) <= fl.errors.frobenius(exact, kfac)
        True
    """
    scale = q.square_exact + q.square_approx
    rounding = (64 * q.eps) ** 2 * scale  # eigenvalues are rounded, some times more than entries
    return _root(Measured(q.spectrum_difference, rounding), q.square_exact, q.eps)


@measure(
    damped=True,
    exact=1.0,
    symbol="cosine of damped steps",
    title="direction",
    needs=["xy", "xx", "yy", "rounding"],
    judges="direction",
)
def damped_cosine(q: DampedQuantities) -> Measured:
    """Cosine between the damped steps (F + lambda I)^-1 g and (F^ + lambda I)^-1 g.

    Example:
        >>> gradient = torch.ones(6, 9, dtype=torch.float64)
        >>> 0.5 < fl.errors.damped_cosine(exact, kfac, gradient, damping=0.1) <= 1
        True
    """
    norms = math.sqrt(q.xx) * math.sqrt(q.yy)
    value = _relative(q.xy, norms)
    return Measured(min(value, 1.0), 4 * q.rounding)


@measure(
    default=True,
    damped=True,
    exact=1.0,
    symbol="share of the best model decrease",
    needs=["yg", "yHy", "gx", "rounding"],
)
def damped_efficiency(q: DampedQuantities) -> Measured:
    """Share of the best decrease of the damped quadratic model that the step along (F^ + lambda
    I)^-1 g reaches.

    (y . g)^2 / [(y . (F + lambda I) y) (g . (F + lambda I)^-1 g)], 1 only for the exact direction.

    Example:
        >>> gradient = torch.ones(6, 9, dtype=torch.float64)
        >>> 0.5 < fl.errors.damped_efficiency(exact, kfac, gradient, damping=0.1) <= 1
        True
    """
    # the best length of the step along y, times how much of the decrease along x it meets
    length = _relative(q.yg, q.yHy)
    share = length * _relative(q.yg, q.gx)
    return Measured(min(share, 1.0), 4 * q.rounding)


@measure(
    damped=True,
    exact=0.0,
    symbol=r"$\lambda\,|(\hat F+\lambda I)^{-1} - (F+\lambda I)^{-1}|_2$",
    needs=["inverse_difference"],
)
def damped_spectral(q: DampedQuantities) -> Measured:
    """lambda |(F^ + lambda I)^-1 - (F + lambda I)^-1|_2, which lies between 0 and 1.

    Example:
        >>> 0 < fl.errors.damped_spectral(exact, kfac, damping=0.1) < 1
        True
    """
    top = q.inverse_difference
    return _floored(top.value, top.noise)


@measure(
    layered=False,
    network=True,
    symbol=r"$|F_{\mathrm{outside\ the\ blocks}}|_F\;/\;|F|_F$",
    needs=["square_outside", "square_network"],
)
def off_block(q: NetworkQuantities) -> Measured:
    """|F outside the blocks of the layers|_F / |F|_F of the whole network's F; no approximation is
    measured by it.

    Example:
        >>> found = fl.compare(model, loss, x, [fl.KFAC()], errors=["off_block"], progress=False)
        >>> 0 < found.rows[0].value < 1
        True
    """
    outside = max(q.square_outside, 0.0)
    share = _relative(outside, q.square_network)
    value = math.sqrt(share)
    return Measured(value, 16 * q.eps * value)


@measure(
    damped=True,
    layered=False,
    network=True,
    exact=1.0,
    symbol="share of the network's best decrease",
    title="the whole network's step",
    needs=["yg", "yHy", "gx", "rounding"],
    judges="direction",
)
def network_efficiency(q: DampedQuantities) -> Measured:
    """Share of the best decrease of the damped quadratic model of the whole network, what couples
    its layers included, that the step along (F^ + lambda I)^-1 g reaches.

    (y . g)^2 / [(y . (F + lambda I) y) (g . (F + lambda I)^-1 g)] with one lambda, relative to
    tr F / d of the whole network, and F with its blocks between layers: 1 only for the exact
    direction, and less for the exact blocks of the layers.

    Example:
        >>> F = fl.network(model, loss, (x, y))
        >>> fl.errors.network_efficiency(F, F.gradient, 0.01) < 1  # the step of gradient descent
        True
    """
    share = min(_relative(q.yg, q.yHy) * _relative(q.yg, q.gx), 1.0)
    return Measured(share, 4 * q.rounding)


def chosen(names: str | Sequence[str]) -> list[Measure]:
    """The measures behind one or several names, among them "default" and "all"; each once.

    "all" are those of layers: measures of the network are asked for by name.

    Raises:
        ValueError: for unknown names.
    """
    known: dict[str, list[Measure]] = {word: [] for word in SEVERAL}
    for name, row in MEASURES.items():
        known[name] = [row]
        if row.default:
            known["default"].append(row)
        if not row.network:
            known["all"].append(row)
    wanted: list[Measure] = []
    for name in names_of("errors", names):
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"Got error {name!r}{did_you_mean(name, known)}, expected "
                f'"default", "all" or some of {", ".join(MEASURES)}.'
            )
        wanted += known[name]
    if not wanted:
        raise ValueError('Got errors=[], expected "default", "all" or at least one name.')
    return list(dict.fromkeys(wanted))
