"""The Approximation noun: pure functions from the sums of a layer to a FisherMatrix."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from fisher_lab._ground.arguments import shown
from fisher_lab._ground.text import did_you_mean
from fisher_lab.approximations.moments import Means, Moments, as_moments
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats, Sums

# what a class may no longer define, and what takes its place
GONE = {
    "average": (
        "moments mix themselves: return fl.approximations.Columns, or a Moments with its own `mix`"
    ),
    "keeps_examples": (
        "moments say what they hold: return fl.approximations.Columns, or a Moments with "
        "`examples_held`"
    ),
}
ITERATED = ("carry", "reassemble")  # which only an Iterated is asked for
# of the methods among them, with self: (old, new, weight) and (moments, matrix)
ARGUMENTS = {"average": 4, "carry": 3, "reassemble": 3}


class Approximation(ABC):
    """A structured approximation of one layer's Fisher block.

    A subclass (best a frozen dataclass of its options) writes `moments` and `assemble`. Defining it
    registers it under its class name: `compare`, the command line, the plots and the trainers then
    know it.

    See Also:
        Iterated: one that needs the matrix assembled last.

    Example:
        >>> fl.MiniBlock(linear="col").label
        'MiniBlock(linear=col)'
    """

    sweeps: int = 1  # passes over the data
    exponent: float = -1.0  # power of the damped matrix that a trainer applies to the gradient
    # whether inputs and output gradients are needed apart (refuses batch-mean statistics)
    needs_factors: bool = False
    # whether `compare` includes it by default when it can be built without arguments
    listed: bool = True

    _registry: ClassVar[dict[str, type[Approximation]]] = {}

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not register:
            return
        _check_class(cls)
        _check_name(cls)
        Approximation._registry[cls.__name__] = cls

    @abstractmethod
    def moments(self, sums: Sums) -> Moments | Mapping[str, Tensor]:
        """What is remembered of a batch.

        Args:
            sums: the layer's inputs and output gradients over the batch, and the sums over them
                that others share.

        Returns:
            Named tensors, each the mean of something over the examples; or `Columns`, `Rows` or
            other Moments.
        """

    @abstractmethod
    def assemble(self, moments: Moments) -> FisherMatrix:
        """The approximation from moments, of one batch or mixed of many.

        Args:
            moments: `moments["A"]` is one of the tensors.
        """

    def factor_sizes(
        self,
        rows: int,
        kernel: Sequence[int],
        bias: bool,
    ) -> tuple[int, ...]:
        """Rows of the square matrices that it holds of a layer, so that what does not fit the
        memory is refused before anything is computed; none where that is not known.

        Args:
            rows: of W.
            kernel: sizes of W's input modes.
            bias: whether W has a last column for the bias.
        """
        return ()

    @property
    def label(self) -> str:
        """Class name, then the options that differ from their defaults: `MiniBlock(linear=col)`."""
        changed = []
        signature = inspect.signature(type(self))
        for p in signature.parameters.values():
            value = getattr(self, p.name, p.default)
            if value != p.default:
                changed.append(f"{p.name}={value}")
        name = type(self).__name__
        if not changed:
            return name
        options = ", ".join(changed)
        return f"{name}({options})"

    def is_exact_of(self, N: int) -> bool:
        """Whether it is the exact block of N examples whatever these are, so that its errors on
        them say nothing of other examples.
        """
        return False

    def check_factors(self, sums: Sums) -> None:
        """Raise ValueError for statistics without layer inputs."""
        if sums.a is None:
            raise ValueError(
                f"{self.label} needs layer inputs and output gradients apart, got batch-mean "
                "gradients; use per-example statistics."
            )


class Iterated(Approximation, register=False):
    """An approximation that goes on from the matrix assembled last.

    That is another sweep over the same data (`sweeps` = 2 or more, as the eigenvalue-corrected
    ones), or, in a trainer, the next observation of data that have changed a little.
    """

    @abstractmethod
    def moments_at(self, sums: Sums, matrix: FisherMatrix) -> Moments | Mapping[str, Tensor]:
        """As `moments`, once a matrix was assembled."""

    def assemble_at(self, moments: Moments, matrix: FisherMatrix) -> FisherMatrix:
        """The approximation from moments that saw `matrix`, and perhaps from earlier ones."""
        return self.assemble(moments)

    def reassemble(self, moments: Moments, matrix: FisherMatrix) -> FisherMatrix:
        """The same where the moments are of another sweep over the very data behind `matrix`."""
        return self.assemble_at(moments, matrix)

    def carry(self, moments: Moments, matrix: FisherMatrix) -> Moments:
        """Moments after `matrix` was assembled from them (eigenvalues move to the new basis)."""
        return moments


# -- what estimators and trainers call -------------------------------------------------------------
def observed(approximation: Approximation, sums: Sums, matrix: FisherMatrix | None) -> Moments:
    """The moments of a batch.

    Args:
        approximation: which.
        sums: the batch.
        matrix: assembled last; None before the first.
    """
    with sums.unchanged(approximation.label):
        found = _found(approximation, sums, matrix)
    if isinstance(found, Mapping) and not isinstance(found, Moments):
        # `assemble` may work on its moments in place
        found = {name: sums.apart(x) for name, x in found.items()}
    return as_moments(found, sums.shape, approximation.label)


def _found(
    approximation: Approximation,
    sums: Sums,
    matrix: FisherMatrix | None,
) -> Moments | Mapping[str, Tensor]:
    """What the approximation itself returns."""
    if isinstance(approximation, Iterated) and matrix is not None:
        return approximation.moments_at(sums, matrix)
    if _takes_matrix(type(approximation).moments):
        # a class of one's own, written for an earlier version
        return approximation.moments(sums, matrix)  # type: ignore[call-arg]
    return approximation.moments(sums)


def check_names(
    approximation: Approximation,
    older: Moments | None,
    newer: Moments | None,
    matrix: FisherMatrix | None,
) -> None:
    """Refuse to mix means of different names: what one side lacks would be lost, or weigh all.

    What goes on from a matrix may hold other means than before the first one.

    Args:
        approximation: whose moments they are.
        older: seen so far; None before the first.
        newer: of the latest examples.
        matrix: assembled last; None before the first.

    Raises:
        ValueError: where the names differ.
    """
    if not isinstance(older, Means) or not isinstance(newer, Means):
        return
    if older.named.keys() == newer.named.keys():
        return
    if isinstance(approximation, Iterated) and matrix is not None:
        return
    raise ValueError(
        f"{approximation.label}.moments returned {sorted(newer.named)} after "
        f"{sorted(older.named)}, expected the same names for every batch; return zeros for what a "
        "batch lacks."
    )


def assembled(
    approximation: Approximation,
    moments: Moments,
    matrix: FisherMatrix | None,
    again: bool = False,
) -> FisherMatrix:
    """The matrix of moments.

    Args:
        approximation: which.
        moments: of one batch, or mixed of many.
        matrix: assembled last; None before the first.
        again: whether the moments are those of another sweep over the data behind `matrix`.
    """
    if isinstance(approximation, Iterated) and matrix is not None:
        if again:
            return approximation.reassemble(moments, matrix)
        return approximation.assemble_at(moments, matrix)
    if _takes_matrix(type(approximation).assemble):
        return approximation.assemble(moments, matrix)  # type: ignore[call-arg]
    return approximation.assemble(moments)


def carried(approximation: Approximation, moments: Moments, matrix: FisherMatrix) -> Moments:
    """The moments, to go on from after `matrix` was assembled from them."""
    if isinstance(approximation, Iterated):
        return approximation.carry(moments, matrix)
    return moments


def build(approximation: Approximation, stats: LayerStats | Sums) -> FisherMatrix:
    """The approximation of one layer from one batch, through all its sweeps."""
    sums = stats if isinstance(stats, Sums) else Sums(stats)
    matrix = None
    for sweep in range(approximation.sweeps):
        moments = observed(approximation, sums, matrix)
        again = sweep > 0
        with sums.unchanged(approximation.label):
            matrix = assembled(approximation, moments, matrix, again)
    assert matrix is not None
    return matrix


@cache
def _takes_matrix(method: Callable[..., Any]) -> bool:
    """Whether a method is written as for earlier versions, which handed it the matrix, too."""
    signature = inspect.signature(method)
    return "matrix" in signature.parameters


def _check_name(cls: type[Approximation]) -> None:
    """Refuse a class that takes the name of one of ours.

    Raises:
        ValueError: where another module defines it.
    """
    known = Approximation._registry.get(cls.__name__)
    if known is None or known.__module__ == cls.__module__:
        return
    if known.__module__.startswith("fisher_lab."):
        raise ValueError(
            f"An approximation named {cls.__name__} is part of fisher_lab "
            f"({known.__module__}), expected a new name; rename the class."
        )


def _check_class(cls: type[Approximation]) -> None:
    """Refuse definitions that nothing would ask for.

    Raises:
        TypeError: what a class of earlier versions did otherwise.
    """
    for name, cure in GONE.items():
        if _as_earlier(cls, name):
            raise TypeError(f"{cls.__name__} defines {name}, expected that it does not: {cure}.")
    for name in ITERATED:
        if not issubclass(cls, Iterated) and _as_earlier(cls, name):
            raise TypeError(
                f"{cls.__name__} defines {name}, expected that only an fl.approximations.Iterated "
                "does; subclass that, and write moments_at for the later sweeps."
            )


def _as_earlier(cls: type[Approximation], name: str) -> bool:
    """Whether a class defines a name as earlier versions asked for it, and not as an option or a
    helper of its own.
    """
    if not hasattr(cls, name):
        return False
    for base in cls.__mro__:
        if name in inspect.get_annotations(base):
            return False  # an option of a dataclass
    value = inspect.getattr_static(cls, name)
    if name not in ARGUMENTS:
        return not inspect.isroutine(value)
    if not inspect.isroutine(value):
        return False
    try:
        inspect.signature(getattr(cls, name)).bind(*range(ARGUMENTS[name]))
    except TypeError:
        return False  # a helper that is called otherwise
    return True


def registry() -> dict[str, type[Approximation]]:
    """Every approximation known, by class name, in order of definition."""
    return dict(Approximation._registry)


def default_approximations() -> list[Approximation]:
    """One of every listed approximation that can be built without arguments.

    Example:
        >>> "KFAC" in [method.label for method in fl.default_approximations()]
        True
    """
    found = []
    for cls in Approximation._registry.values():
        if cls.listed and not _required(cls):
            found.append(cls())
    return found


def _required(cls: type[Approximation]) -> list[str]:
    """The arguments without which a class cannot be built."""
    signature = inspect.signature(cls)
    required = []
    for p in signature.parameters.values():
        named = p.kind < p.VAR_POSITIONAL  # neither *args nor **kwargs
        if named and p.default is p.empty:
            required.append(p.name)
    return required


def check_approximation(value: Any, otherwise: str = "") -> None:
    """Raise TypeError for what is no Approximation; `otherwise` says what else is understood."""
    if isinstance(value, Approximation):
        return
    if isinstance(value, type):
        found = f"the class {value.__name__}"
    elif isinstance(value, str | int | float | None):
        found = repr(value)
    else:
        found = f"a {type(value).__name__}"
    raise TypeError(
        f"Got {found} as approximation, expected an instance such as fl.KFAC(){otherwise}."
    )


def check_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError where an option is none of its choices."""
    # arrays answer a comparison with arrays
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, choices))
        guess = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{owner} got {name}={shown(value)}{guess}, expected one of {known}.")
