"""Find a problem by name, by module or by file, and give its settings the right types."""

import ast
import importlib
import importlib.util
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fisher_lab._ground.arguments import check_kind
from fisher_lab._ground.text import did_you_mean
from fisher_lab.problems.registry import Problem, annotated_type, as_problem, names, registered

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
FORMS = "a name, 'package.module:function' or 'path/file.py:function'"


def load(spec: str, optional: dict[str, Any] | None = None, /, **settings: Any) -> Problem:
    """Build the problem that `spec` names.

    Args:
        spec: the name of a registered problem, `package.module:function` or
            `path/file.py:function`. A user's function returns a `Problem` or a tuple (model,
            likelihood, data).
        optional: settings to pass only where the function has them.
        **settings: the function's arguments. Strings (from a command line) are converted to the
            type of the argument's default; tuples are written with commas: "20,20".

    Returns:
        The problem, with the settings it was made with.

    Raises:
        ValueError: for an unknown name, file, module, function or setting, or a value that cannot
            be converted.
        TypeError: for a setting of the wrong type, a missing one, or a function that returns
            something else.

    See Also:
        `names` and `describe` list what is registered; `problem` registers a function.

    Example:
        >>> fl.problems.load("digits_mlp", steps=0, examples=20).settings["examples"]
        20
    """
    if not isinstance(spec, str):
        raise TypeError(f"a problem is given by a string, got {type(spec).__name__}: write {FORMS}")
    if ":" not in spec:
        function = registered(spec)
        if function is None:
            guess = did_you_mean(spec, names())
            raise ValueError(
                f"there is no problem named {spec!r}{guess}: write one of {', '.join(names())}, "
                "or 'package.module:function' or 'path/file.py:function'"
            )
        given = _accepted(function, optional) | settings
        return function(**typed_settings(function, spec, given))
    target, _, name = spec.rpartition(":")
    if not target or not name.isidentifier():
        raise ValueError(f"cannot read the problem {spec!r}: expected {FORMS}")
    is_file = target.endswith(".py") or "/" in target or os.sep in target
    path = Path(target).expanduser()
    directory = path.resolve().parent if is_file else Path.cwd()
    # The user's own directory stays importable while the function runs, as it would be under
    # `python file.py`.
    with _importable(directory):
        module = _module_of_file(path) if is_file else _module_by_name(target)
        function = _function_of(module, name, target)
        given = _accepted(function, optional) | settings
        values = typed_settings(function, spec, given)
        return as_problem(function(**values), spec, values)


def _accepted(function: Callable[..., Any], optional: dict[str, Any] | None) -> dict[str, Any]:
    """Those of the settings that the function has."""
    if optional is not None:
        check_kind("optional", optional, dict, "settings by name")
    known = inspect.signature(function).parameters
    found = {}
    for key, value in (optional or {}).items():
        if key in known:
            found[key] = value
    return found


def typed_settings(
    function: Callable[..., Any], name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Check the settings of one function against its signature and convert their values.

    Args:
        function: the problem function.
        name: the problem's name, for messages.
        settings: values by setting; strings are converted.

    Raises:
        ValueError: for an unknown setting or a value that cannot be converted.
        TypeError: for a value of the wrong type, or if a setting without a default is missing.
    """
    known = {}
    free = False  # whether the function takes any name
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            free = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            known[key] = parameter
    for key in settings:
        if key not in known and not free:
            has = "it has no settings"
            if known:
                has = f"its settings are {', '.join(known)}"
            raise ValueError(
                f"problem {name!r} has no setting {key!r}{did_you_mean(key, known)}: {has}"
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in settings:
            raise TypeError(
                f"problem {name!r} needs the setting {key!r}, which has no default: give it a value"
            )
    typed = {}
    for key, value in settings.items():
        typed[key] = _typed(function, known.get(key), name, key, value)
    return typed


def _typed(
    function: Callable[..., Any],
    parameter: inspect.Parameter | None,
    name: str,
    key: str,
    value: Any,
) -> Any:
    """One value with the type of its default, or of its annotation where there is no default."""
    default: Any = inspect.Parameter.empty
    if parameter is not None:
        default = parameter.default
    kind: Any = type(default)
    if default is None or default is inspect.Parameter.empty:
        kind = annotated_type(function, key)
    entry: type = int
    if isinstance(default, tuple) and default:
        entry = type(default[0])
    try:
        return convert(value, kind, entry)
    except ValueError as error:
        raise ValueError(
            f"problem {name!r} cannot take {key}={value!r}: expected {error}{_like(default)}"
        ) from None
    except TypeError as error:
        raise TypeError(
            f"problem {name!r} cannot take {key}={value!r} of type {type(value).__name__}: "
            f"expected {error}{_like(default)}"
        ) from None


def _like(default: Any) -> str:
    """The default as an example, where there is one."""
    if default is None or default is inspect.Parameter.empty:
        return ""
    return f", such as the default {default!r}"


def convert(value: Any, kind: Any, entry: type = int) -> Any:
    """A value as bool, int, float, str or tuple of `entry`; for other kinds a string is read as a
    Python literal.

    Raises:
        ValueError: for a string that does not spell such a value; the message is only what was
            expected.
        TypeError: for an object of another type; likewise.
    """
    if kind is bool:
        return _bool(value)
    if kind is int:
        return _int(value)
    if kind is float:
        return _float(value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError("a string")
        return value
    if kind is tuple:
        return _tuple(value, entry)
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # a plain word is itself


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise TypeError("true or false")
    if value.lower() not in TRUE + FALSE:
        raise ValueError("true or false")
    return value.lower() in TRUE


def _int(value: Any) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise ValueError("a whole number") from None
    if isinstance(value, bool):
        raise TypeError("a whole number")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError("a whole number") from None


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None
    except TypeError:
        raise TypeError("a number") from None


def _tuple(value: Any, entry: type) -> tuple[Any, ...]:
    if isinstance(value, str):
        # "(20, 20)", "20,20" and "20, 20," alike
        parts = map(str.strip, value.strip(" ()[]").split(","))
        value = list(filter(None, parts))
    if not isinstance(value, Iterable):
        raise TypeError("several values (with commas between them on a command line)")
    return tuple(convert(part, entry) for part in value)


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Have `directory` on the import path for a while."""
    entry = str(directory)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r} to load a problem from: "
            "give the path of a Python file, as in 'path/file.py:function'"
        )
    if path.suffix != ".py":
        raise ValueError(
            f"cannot load a problem from {str(path)!r}: expected a Python file, as in "
            "'path/file.py:function'"
        )
    name = f"_fisher_lab_problem_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path.resolve())
    assert specification is not None  # it is an existing .py file
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    previous = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look a module up while it runs
    try:
        specification.loader.exec_module(module)
    except BaseException:
        if previous is None:
            del sys.modules[name]
        else:
            sys.modules[name] = previous
        raise
    return module


def _module_by_name(target: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        # A missing import inside the user's own module is another error, and stays what it is.
        if error.name is not None and (target == error.name or target.startswith(error.name + ".")):
            raise ValueError(
                f"there is no module {target!r} to load a problem from: "
                "run from the directory that holds it, or write 'path/file.py:function'"
            ) from None
        raise
    except (TypeError, ValueError) as error:
        if all(part.isidentifier() for part in target.split(".")):
            raise
        raise ValueError(
            f"cannot read the module name {target!r}: expected 'package.module:function' or "
            "'path/file.py:function'"
        ) from error


def _function_of(module: ModuleType, name: str, target: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    own = []
    for key, value in vars(module).items():
        if inspect.isfunction(value) and not key.startswith("_"):
            own.append(key)
    what = f"{target!r} has no function {name!r}"
    if function is not None:
        what = f"{name!r} in {target!r} is of type {type(function).__name__}, not a function"
    raise ValueError(
        f"{what}{did_you_mean(name, own)}: name a function that returns a Problem or a tuple "
        "(model, likelihood, data)"
    )
