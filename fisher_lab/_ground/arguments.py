"""Arguments as users write them, brought to one form; what has none is told in one sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 100  # characters of a value in a message


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
    if isinstance(value, Iterable):
        try:
            return list(value)
        except TypeError:
            pass  # a tensor without dimensions says that it can be gone through
    raise TypeError(f"Got {what}={shown(value)}, expected a list of names.")


def shown(value: Any) -> str:
    """A value for a message: itself where it is short, else its type."""
    try:
        text = repr(value)
    except Exception:  # of a class of the caller's
        text = ""
    # what has an address in memory or many lines tells nothing
    if 0 < len(text) <= LONGEST_SHOWN and "\n" not in text and " at 0x" not in text:
        return text
    return f"a {type(value).__name__}"


def check_kind(what: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuse a value of another type.

    Args:
        what: the argument's name, for the message.
        value: the argument.
        kind: its types.
        expected: what it is to be, in words.

    Raises:
        TypeError: for another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"Got {what}={shown(value)}, expected {expected}.")


def path_of(what: str, value: Any) -> Path:
    """A path as a Path.

    Args:
        what: the argument's name, for the message.
        value: the argument.

    Raises:
        TypeError: for what is neither text nor a path.
        ValueError: for a name that no file can have.
    """
    check_kind(what, value, (str, Path), 'a path such as "run.json"')
    path = Path(value)
    text = str(path)
    # half a character, and the end of a name to the system
    if not text.isprintable() and ("\0" in text or not _is_encodable(text)):
        raise ValueError(f"Got {what}={text!r}, expected a name that a file can have; rename it.")
    return path


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
