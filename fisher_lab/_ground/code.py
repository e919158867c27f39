"""Fingerprints of code that is not the library's: what a function or class of a user's runs.

A result depends on it as on the data. It is told by the compiled code, not by the text, so that
comments and lines elsewhere in the file change nothing, and code of a notebook has one too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any

# Their versions stand in the settings of a result.
KNOWN = frozenset(("fisher_lab", "torch", "numpy", "scipy", *sys.stdlib_module_names)) - {
    "__main__"
}
PLAIN = (str, bytes, int, float, complex, type(None), type(...))


def fingerprint(*things: Any) -> str | None:
    """A short checksum of the code of functions, classes and objects, None where all is known.

    Functions, classes and constants outside that the code names are followed, as far as they are
    not of the library itself or of those it is built on.

    Args:
        *things: what runs; of an object its class.
    """
    walk = _Walk()
    for thing in things:
        is_code = isinstance(thing, type | types.FunctionType | types.MethodType)
        walk.add(thing if is_code else type(thing))
    if not walk.is_foreign:
        return None
    return walk.hash.hexdigest()[:16]


class _Walk:
    """Goes through code, each thing once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.is_foreign = False
        self._seen: set[int] = set()
        # what has been seen must not be freed, or its number may come again
        self._alive: list[Any] = []

    def add(self, thing: Any) -> None:
        """Let one thing join."""
        if isinstance(thing, PLAIN):
            self._text(f"{type(thing).__name__} {thing!r}")
            return
        if isinstance(thing, tuple | list | frozenset | set):
            entries = sorted(thing, key=repr) if isinstance(thing, frozenset | set) else thing
            self._text(f"{type(thing).__name__} {len(thing)}")
            for entry in entries:
                self.add(entry)
            return
        thing = _unwrapped(thing)
        if id(thing) in self._seen or _is_known(thing):
            return
        self._seen.add(id(thing))
        self._alive.append(thing)
        if isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, types.FunctionType):
            self._function(thing)

    def _text(self, text: str) -> None:
        self.hash.update(f"{len(text)} {text};".encode("utf-8", "surrogatepass"))

    def _class(self, cls: type) -> None:
        self.is_foreign = True
        self._text(f"class {cls.__qualname__}")
        for base in cls.__mro__[1:]:
            self.add(base)
        for name, member in sorted(vars(cls).items()):
            if name not in ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__"):
                self._text(name)
                self.add(member)

    def _function(self, function: types.FunctionType) -> None:
        self.is_foreign = True
        self._text(f"function {function.__qualname__}")
        self.add(function.__defaults__)
        for name, value in sorted((function.__kwdefaults__ or {}).items()):
            self._text(name)
            self.add(value)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # of a name that has no value yet
                self.add(cell.cell_contents)
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        self.hash.update(code.co_code)
        self._text(" ".join((*code.co_names, *code.co_varnames, *code.co_freevars)))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            else:
                self.add(constant)
        for thing in _named(code, names):
            self.add(thing)


def _named(code: types.CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """The global things that code names, also in modules of the user's."""
    for name in code.co_names:
        thing = names.get(name)
        if isinstance(thing, types.ModuleType):
            if not _is_known_name(thing.__name__):
                for inside in code.co_names:
                    yield getattr(thing, inside, None)
        elif thing is not None:
            yield thing


def _unwrapped(thing: Any) -> Any:
    """The function inside."""
    while True:
        if isinstance(thing, staticmethod | classmethod | types.MethodType):
            thing = thing.__func__
        elif isinstance(thing, functools.partial | functools.cached_property):
            thing = thing.func
        elif isinstance(thing, property):
            thing = thing.fget
        elif hasattr(thing, "__wrapped__") and callable(thing):
            thing = thing.__wrapped__
        else:
            return thing


def _is_known(thing: Any) -> bool:
    module = getattr(thing, "__module__", None)
    return isinstance(module, str) and _is_known_name(module)


def _is_known_name(module: str) -> bool:
    return module.partition(".")[0] in KNOWN
