"""What an optimizer is told, checked once: options of all of it, settings of a group of layers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fisher_lab._ground.arguments import is_whole, number, seed_of
from fisher_lab._ground.text import did_you_mean
from fisher_lab._passes.labels import FisherKind, Labels, labels_of

Statistics = Literal["per_example", "mean", "gradient"]
MomentumOrder = Literal["before", "after"]
DampingStyle = Literal["exact", "factored"]
Refreshing = Literal["replicated", "sharded"]


@dataclass(frozen=True)
class Options:
    """What holds for all layers of an optimizer alike.

    Attributes:
        decay: rho of the moving averages.
        dtype: of statistics and factors; None for the parameters' own, at least float32.
        fallback_lr: learning rate of AdamW for the parameters that no layer covers.
        seed: of the optimizer's own random numbers.

    Raises:
        ValueError: an option out of range.
    """

    decay: float
    dtype: torch.dtype | None = None
    fallback_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float64, torch.float32):
            raise ValueError(
                f"Got dtype={self.dtype!r}, expected torch.float64, torch.float32 or None."
            )
        check_not_negative("fallback_lr", self.fallback_lr)
        if not 0 <= number(self.decay) < 1:
            raise ValueError(f"Got decay={self.decay!r}, expected a number from 0 to below 1.")
        # a numpy integer becomes a plain one, which is what a generator takes; a frozen dataclass
        # is set this way
        seed = seed_of(self.seed)
        object.__setattr__(self, "seed", seed)


@dataclass(frozen=True)
class NaturalOptions(Options):
    """Options of NaturalGradient.

    Attributes:
        kl_clip: largest lr^2 p^T F p of a step; None for no limit.
        observe_every: steps between observations.
        refresh_every: steps between refreshes of the inverses.
        fisher: labels of the statistics.
        statistics: of each example's gradient, of the batch-mean gradient at sampled labels, or of
            the training gradient itself.
        refresh: in several processes, who factorises: every rank everything, or each its share;
            None for what takes less time.

    Raises:
        ValueError: an option out of range, or two that contradict each other.
    """

    kl_clip: float | None = None
    observe_every: int = 10
    refresh_every: int = 100
    fisher: FisherKind = "mc"
    statistics: Statistics = "per_example"
    refresh: Refreshing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period("observe_every", self.observe_every)
        check_period("refresh_every", self.refresh_every)
        if self.kl_clip is not None and not number(self.kl_clip) > 0:
            raise ValueError(
                f"Got kl_clip={self.kl_clip!r}, expected a positive number, or None for no limit."
            )
        # refuses an unknown kind
        labels = labels_of(self.fisher)
        if self.statistics not in get_args(Statistics):
            raise ValueError(
                f'Got statistics={self.statistics!r}, expected "per_example", "mean" or "gradient".'
            )
        if self.refresh is not None:
            check_one_of("refresh", self.refresh, get_args(Refreshing))
        if self.statistics == "mean" and labels.expectation:
            raise ValueError(
                f'Got statistics="mean" with fisher="{self.fisher}", expected "mc" or "empirical": '
                "the mean over examples of an expectation over labels is no gradient."
            )

    @property
    def labels(self) -> Labels:
        """The kind of Fisher, which answers for itself."""
        return labels_of(self.fisher, self.seed)


class Option:
    """An attribute of an optimizer that stands in its frozen `options`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        return getattr(optimizer.options, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        changed = {self.name: value}
        # made anew, so that all are checked
        optimizer.options = dataclasses.replace(optimizer.options, **changed)


@dataclass(frozen=True)
class Settings:
    """What a group of layers may have of its own; `as_group` gives the dict that torch and its
    schedulers work on.

    Attributes:
        lr: learning rate.
        damping: lambda, on the scale of F.
        momentum: 0 for none.
        momentum_order: momentum before or after the gradient is multiplied by the inverse.
        weight_decay: added to the gradient, or taken from W if decoupled.
        decoupled: see `weight_decay`.

    Raises:
        ValueError: a setting out of range.
    """

    lr: float | Tensor
    damping: float
    momentum: float
    weight_decay: float
    decoupled: bool
    momentum_order: MomentumOrder = "before"

    def __post_init__(self) -> None:
        check_not_negative("lr", self.lr)
        check_not_negative("damping", self.damping)
        check_not_negative("weight_decay", self.weight_decay)
        if not 0 <= number(self.momentum) < 1:
            raise ValueError(
                f"Got momentum={self.momentum!r}, expected a number from 0 to below 1."
            )
        check_one_of("momentum_order", self.momentum_order, get_args(MomentumOrder))

    @classmethod
    def names(cls) -> list[str]:
        """What a group may set."""
        fields = dataclasses.fields(cls)
        return [field.name for field in fields]

    def as_group(self) -> dict[str, Any]:
        """The settings as entries of a torch parameter group."""
        group = {}
        for name in self.names():
            group[name] = getattr(self, name)
        return group


@dataclass(frozen=True)
class NaturalSettings(Settings):
    """Settings of a group of NaturalGradient.

    Attributes:
        damping_style: "exact" (F + lambda I) or "factored" (lambda^(1/k) on each of k balanced
            Kronecker factors).

    Raises:
        ValueError: a setting out of range.
    """

    damping_style: DampingStyle = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("damping_style", self.damping_style, get_args(DampingStyle))


def check_not_negative(name: str, value: Any) -> None:
    """Raise ValueError for what is no finite number from 0."""
    if not 0 <= number(value) < math.inf:
        raise ValueError(f"Got {name}={value!r}, expected a finite number >= 0.")


def check_period(name: str, value: Any) -> None:
    """Raise ValueError for what is no number of steps."""
    if not is_whole(value, 1):
        raise ValueError(f"Got {name}={value!r}, expected a whole number of steps, 1 or more.")


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of those allowed."""
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(
            f"Got {name}={value!r}{did_you_mean(str(value), allowed)}, expected one of {words}."
        )
