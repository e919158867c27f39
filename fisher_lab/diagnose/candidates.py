"""Candidates: what is compared with the exact block, an approximation to be built or matrices that
are ready.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from fisher_lab import approximations as approximations_known
from fisher_lab._passes.batches import checksum
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, check_approximation, default_approximations
from fisher_lab.approximations.base import observed
from fisher_lab.estimation.running import Running
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results import Cost
from fisher_lab.results.rows import is_writable
from fisher_lab.statistics import LayerStats, Sums

Matrices = Mapping[str, FisherMatrix]
READY = ", or {name: {layer: FisherMatrix}} for ready matrices"


class Candidate(ABC):
    """One row of the table of a layer.

    Args:
        label: its name in the result, which may be any text.
    """

    # how it follows from the data; None where it does not
    approximation: Approximation | None = None

    def __init__(self, label: str) -> None:
        self.label = label

    @property
    @abstractmethod
    def description(self) -> str:
        """What tells it from another candidate of the same label."""

    @property
    def code(self) -> str | None:
        """What builds it for an optimizer; None where no optimizer applies its damped inverse."""
        if self.approximation is None or self.approximation.exponent != -1:
            return None
        return code_of(self.approximation)

    def is_own(self, N: int) -> bool:
        """Whether it is the exact block of N examples, whatever these are."""
        return self.approximation is not None and self.approximation.is_exact_of(N)

    @abstractmethod
    def check(self, source: Source) -> None:
        """Raise ValueError where it has no matrix for a layer of the source."""

    @abstractmethod
    def begin(self) -> Running | None:
        """The state that passes over the data are to fill, None where none are needed."""

    @abstractmethod
    def column_bytes(self, example: LayerStats, N: int) -> float:
        """Memory of the columns that it keeps of N examples, of which one is given."""

    @abstractmethod
    def matrix(
        self, layer: str, state: Running | None, exact: FisherMatrix
    ) -> tuple[FisherMatrix, Cost]:
        """The matrix of a layer, of the type and on the device of the exact block, and what it
        took.

        Args:
            layer: name of the layer.
            state: what `begin` gave, filled.
            exact: the exact block.
        """


class Estimated(Candidate):
    """An approximation that is built from the same columns as the exact block."""

    def __init__(self, label: str, approximation: Approximation) -> None:
        super().__init__(label)
        self.approximation: Approximation = approximation

    @property
    def description(self) -> str:
        """Its options."""
        if type(self.approximation).__repr__ is object.__repr__:
            return self.approximation.label
        return repr(self.approximation)

    def check(self, source: Source) -> None:
        """Every layer has one."""

    def begin(self) -> Running:
        """An empty mean."""
        return Running(self.approximation)

    def column_bytes(self, example: LayerStats, N: int) -> float:
        """From the moments of the example, which tell how many of its kind they will hold."""
        moments = observed(self.approximation, Sums(example, shared=False), None)
        return min(moments.examples_held, N) * moments.nbytes

    def matrix(
        self, layer: str, state: Running | None, exact: FisherMatrix
    ) -> tuple[FisherMatrix, Cost]:
        """What was assembled."""
        assert state is not None
        found = state.matrix
        if not isinstance(found, FisherMatrix) or tuple(found.shape) != tuple(exact.shape):
            what = type(found).__name__
            if isinstance(found, FisherMatrix):
                what = f"a matrix over {tuple(found.shape)}"
            raise ValueError(
                f"{self.label} assembled {what} on layer {layer!r}, expected a FisherMatrix over "
                f"{tuple(exact.shape)}; check its assemble."
            )
        return found, Cost(layer, self.label, state.seconds, found.nbytes)


class Ready(Candidate):
    """Matrices from elsewhere, on the scale of the exact Fisher."""

    def __init__(self, label: str, matrices: Matrices) -> None:
        super().__init__(label)
        self.matrices = matrices

    @property
    def description(self) -> str:
        """A checksum."""
        crc = 0
        for name in sorted(self.matrices):
            for tensor in self.matrices[name].tensors().values():
                crc = checksum(tensor, crc)
        return f"ready matrices {crc:08x}"

    def check(self, source: Source) -> None:
        """Every layer needs a matrix over its weight."""
        for name, layer in source.layers.items():
            matrix = self.matrices.get(name)
            if isinstance(matrix, FisherMatrix) and tuple(matrix.shape) == tuple(layer.shape):
                continue
            found = "none"
            if isinstance(matrix, FisherMatrix):
                found = f"a matrix over {tuple(matrix.shape)}"
            raise ValueError(
                f"{self.label} has {found} for layer {name!r}, expected a FisherMatrix over "
                f"{tuple(layer.shape)}; name its layers with layers=[...]."
            )

    def begin(self) -> None:
        """Nothing is to be filled."""

    def column_bytes(self, example: LayerStats, N: int) -> float:  # noqa: ARG002
        """It is there already."""
        return 0

    def matrix(
        self,
        layer: str,
        state: Running | None,  # noqa: ARG002
        exact: FisherMatrix,
    ) -> tuple[FisherMatrix, Cost]:
        """The matrix given."""
        found = self.matrices[layer]
        return found.to(exact.device, exact.dtype), Cost(layer, self.label, 0.0, found.nbytes)


def named(approximations: Any) -> dict[str, Candidate]:
    """Candidates by label.

    Args:
        approximations: one or several Approximations, or
            `{name: Approximation or {layer: FisherMatrix}}`; None for the default ones.

    Raises:
        TypeError: for what is neither.
        ValueError: for none, or one twice.
    """
    if approximations is None:
        approximations = default_approximations()
    if isinstance(approximations, Mapping):
        found: dict[str, Candidate] = {}
        for name, value in approximations.items():
            if not isinstance(name, str):
                raise TypeError(f"Got {name!r} as the name of an approximation, expected text.")
            if not is_writable(name):
                raise ValueError(
                    f"Got {name!r} as the name of an approximation, which has half a character, "
                    "expected text that a file can hold; rename it."
                )
            found[name] = _candidate(name, value)
    else:
        found = _by_label(approximations)
    if not found:
        raise ValueError("Got no approximations, expected at least one, or None for all.")
    return found


def code_of(approximation: Approximation) -> str | None:
    """An approximation of the library as it is written in Python; None for another one."""
    kind = type(approximation)
    if getattr(approximations_known, kind.__name__, None) is not kind:
        return None
    options = []
    for field in inspect.signature(kind).parameters.values():
        value = getattr(approximation, field.name, field.default)
        if isinstance(value, Approximation):
            return None  # whose own code is not its text
        if value != field.default:
            options.append(f"{field.name}={value!r}")
    return f"fl.{kind.__name__}({', '.join(options)})"


def _by_label(approximations: Any) -> dict[str, Candidate]:
    """One or several approximations under their own labels."""
    several = isinstance(approximations, Iterable)
    # classes and texts are a mistake each, told below
    if not several or isinstance(approximations, str | type):
        approximations = [approximations]
    found: dict[str, Candidate] = {}
    for value in approximations:
        check_approximation(value, READY)
        if value.label in found:
            raise ValueError(f"Got {value.label} twice, expected every approximation once.")
        found[value.label] = Estimated(value.label, value)
    return found


def _candidate(label: str, value: Any) -> Candidate:
    if isinstance(value, Mapping):
        return Ready(label, value)
    check_approximation(value, READY)
    return Estimated(label, value)
