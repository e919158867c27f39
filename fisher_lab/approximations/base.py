"""The Approximation noun: pure functions from LayerStats to a FisherMatrix, hyper-parameters only."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats

Moments = dict[str, Tensor]


class Approximation(ABC):
    """A structured approximation of one layer's Fisher block.

    A subclass (best a frozen dataclass of its options) writes `moments` and `assemble`. Defining it registers it under
    its class name: `compare`, the command line, the plots and the trainers then know it.
    """

    sweeps: int = 1  # passes over the data; from the second on, `moments` sees the matrix assembled before
    exponent: float = -1.0  # power of the damped matrix that a trainer applies to the gradient
    needs_factors: bool = False  # whether inputs and output gradients are needed apart (refuses batch-mean statistics)
    keeps_examples: float = 0  # of how many examples of the data its moments hold the columns; math.inf for all
    listed: bool = True  # whether `compare` includes it by default when it can be built without arguments

    _registry: ClassVar[dict[str, type[Approximation]]] = {}

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not register:
            return
        known = Approximation._registry.get(cls.__name__)
        if known is not None and known.__module__.startswith("fisher_lab.") and known.__module__ != cls.__module__:
            raise ValueError(
                f"An approximation named {cls.__name__} is part of fisher_lab ({known.__module__}), "
                "expected a new name; rename the class."
            )
        Approximation._registry[cls.__name__] = cls

    @abstractmethod
    def moments(self, stats: LayerStats, matrix: FisherMatrix | None = None) -> Moments:
        """Means over the examples of `stats` from which the matrix is assembled.

        Args:
            stats: the layer's inputs and output gradients over a batch.
            matrix: the matrix assembled last; only methods with `sweeps > 1` read it.
        """

    @abstractmethod
    def assemble(self, moments: Moments, matrix: FisherMatrix | None = None) -> FisherMatrix:
        """The approximation from its (averaged) moments; `matrix` as in `moments`."""

    def reassemble(self, moments: Moments, matrix: FisherMatrix) -> FisherMatrix:
        """The approximation after another sweep over the data that `matrix` was assembled from."""
        return self.assemble(moments, matrix)

    def average(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """(1 - weight) old + weight new, which suits every moment that is a mean over examples."""
        return {name: _mixed(old[name], x, weight) for name, x in new.items()}

    def follow(self, old: Moments, new: Moments, weight: float | Tensor) -> Moments:
        """A moving average of observations, `new` the latest; a mean that forgets is a mean like any other."""
        return self.average(old, new, weight)

    def carry(self, moments: Moments, matrix: FisherMatrix) -> Moments:
        """Moments after `matrix` was assembled from them (eigenvalues move to the new basis)."""
        return moments

    @property
    def label(self) -> str:
        """Class name, then the options that differ from their defaults: `MiniBlock(linear=col)`."""
        parameters = inspect.signature(type(self)).parameters.values()
        options = [(p.name, p.default, getattr(self, p.name, p.default)) for p in parameters]
        changed = ", ".join(f"{name}={value}" for name, default, value in options if value != default)
        return type(self).__name__ + (f"({changed})" if changed else "")

    def check_factors(self, stats: LayerStats) -> Tensor:
        """The layer inputs, or an error for statistics that have none."""
        if stats.a is None:
            raise ValueError(
                f"{self.label} needs layer inputs and output gradients apart, got batch-mean gradients; "
                "use per-example statistics."
            )
        return stats.a


def _mixed(old: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    if not old.is_floating_point():  # which lerp, of half as many passes, does not take
        return old + weight * (new - old)
    return torch.lerp(old, new, weight.to(old.dtype) if isinstance(weight, Tensor) else weight)


def registry() -> dict[str, type[Approximation]]:
    """Every approximation known, by class name, in order of definition."""
    return dict(Approximation._registry)


def default_approximations() -> list[Approximation]:
    """One of every listed approximation that can be built without arguments."""
    found = []
    for cls in Approximation._registry.values():
        required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind < 2]
        if cls.listed and not required:
            found.append(cls())
    return found


def build(approximation: Approximation, stats: LayerStats) -> FisherMatrix:
    """The approximation of one layer from one batch, through all its sweeps."""
    matrix = approximation.assemble(approximation.moments(stats))
    for _ in range(approximation.sweeps - 1):
        matrix = approximation.reassemble(approximation.moments(stats, matrix), matrix)
    return matrix


def check_approximation(value: Any, otherwise: str = "") -> None:
    """Raise TypeError for what is no Approximation; `otherwise` says what else is understood."""
    if isinstance(value, Approximation):
        return
    found = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    if isinstance(value, type):
        found = f"the class {value.__name__}"
    raise TypeError(f"Got {found} as approximation, expected an instance such as fl.KFAC(){otherwise}.")


def check_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError where an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{owner} got {name}={value!r}, expected one of {', '.join(map(repr, choices))}.")
