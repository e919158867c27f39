"""Arguments as users write them, brought to one form; what has none is told in one sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def names_of(what: str, value: Any) -> list[Any]:
    """A list of names, or one name alone, as a list.

    Args:
        what: the argument's name, for the message.
        value: the argument.

    Raises:
        TypeError: for what is neither.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"Got {what}={value!r}, expected a list of names.")
    return list(value)


def number(value: Any) -> float:
    """The value as a float; NaN, which no range admits, for what is no number."""
    try:
        return math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def is_whole(value: Any, least: int) -> bool:
    """Whether the value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def seed_of(value: Any) -> int:
    """A seed as an int.

    Raises:
        ValueError: for what is no whole number of 63 bits.
    """
    try:
        seed = operator.index(value)
    except TypeError:
        seed = 2**63
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"Got seed={value!r}, expected a whole number such as 0.")
    return seed
