"""What a problem is, and the register of those that ship with the library.

A problem is a function with default settings that returns a `Problem`; the decorator `problem`
registers it under its name. Adding one takes one file in this package.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from fisher_lab._ground.arguments import shown
from fisher_lab._ground.text import first_paragraph
from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import KINDS, FisherKind
from fisher_lab._passes.model import Output


@dataclass(frozen=True)
class Problem:
    """A model, how its outputs are read, and the examples on which its Fisher matrix is measured.

    Attributes:
        name: what the problem is called in tables and files.
        model: the network; problems of this library come in evaluation mode and float32.
        likelihood: a likelihood of `fisher_lab.likelihoods` or a torch loss module.
        data: the measuring examples, x `[N, *input]` and y `[N, *label]`; a user's own problem may
            give anything that `compare` takes.
        settings: everything needed to make the problem again, as plain JSON values.
        fisher: "true", "mc" or "empirical": the kind of Fisher matrix that is affordable for this
            problem.
        train_data: all training examples, x and y, or None.
        test_data: examples that were not trained on, x and y, or None.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z: a name, an index or a function; None for a tensor,
            or `logits`.

    Raises:
        TypeError: if `model` is no module, or a class was given as the likelihood instead of an
            instance.
        ValueError: if `fisher` is not one of the three kinds.

    See Also:
        `problem` registers a function that returns one, `load` finds one by name.

    Example:
        >>> problem = fl.problems.load("digits_mlp", steps=0, examples=20)
        >>> problem.data[0].shape
        torch.Size([20, 64])
    """

    name: str
    model: nn.Module
    likelihood: Any
    data: Any
    settings: dict[str, Any] = field(default_factory=dict)
    fisher: FisherKind = "true"
    train_data: tuple[Tensor, Tensor] | None = None
    test_data: tuple[Tensor, Tensor] | None = None
    labels: str = LABELS
    output: Output | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                f"problem {shown(self.name)} has a model of type {type(self.model).__name__}, "
                "expected a torch.nn.Module: return the network itself."
            )
        if inspect.isclass(self.likelihood):
            name = self.likelihood.__name__
            raise TypeError(
                f"problem {shown(self.name)} has the class {name} as its likelihood, expected an "
                f"instance: write {name}()."
            )
        if not isinstance(self.fisher, str) or self.fisher not in KINDS:
            raise ValueError(
                f"problem {shown(self.name)} has fisher={shown(self.fisher)}, "
                f"expected one of {', '.join(KINDS)}: choose one of these."
            )


class Description(NamedTuple):
    """One line about a problem, and its settings with their defaults."""

    summary: str
    settings: dict[str, Any]


_REGISTERED: dict[str, Callable[..., Problem]] = {}


def problem(function: Callable[..., Any]) -> Callable[..., Problem]:
    """Register a function that builds a problem under the function's name (decorator).

    Args:
        function: keyword settings with defaults -> a `Problem`, or a tuple (model, likelihood,
            data). The first line of its docstring is its summary.

    Returns:
        The function, which now always returns a `Problem` whose settings hold the values it was
        called with.

    Raises:
        ValueError: if another function is registered under this name.

    See Also:
        `names`, `describe`, `load`.

    Example:
        >>> @fl.problems.problem
        ... def my_problem(examples: int = 50):
        ...     "A network of my own."
        ...     return model, loss, (x[:examples], y[:examples])
        >>> fl.problems.load("my_problem").data[0].shape
        torch.Size([50, 8])
    """
    if not inspect.isfunction(function):
        found = type(function).__name__
        raise TypeError(
            f"Got a {found}, expected a function that returns (model, likelihood, data); put "
            "@problem above its def."
        )
    name = function.__name__
    signature = inspect.signature(function)
    taken = _REGISTERED.get(name)
    if taken is not None:
        # the same file may be run again, and then replaces its own
        old = inspect.getsourcefile(inspect.unwrap(taken))
        if old != inspect.getsourcefile(function):
            raise ValueError(
                f"Got a second problem named {name!r}, expected another name than that of "
                f"{taken.__module__}; rename the function."
            )

    @functools.wraps(function)
    def build(*args: Any, **settings: Any) -> Problem:
        bound = signature.bind(*args, **settings)
        bound.apply_defaults()
        result = function(*bound.args, **bound.kwargs)
        return as_problem(result, name, dict(bound.arguments))

    _REGISTERED[name] = build
    return build


def names() -> list[str]:
    """The names of all registered problems, sorted.

    Example:
        >>> "digits_mlp" in fl.problems.names()
        True
    """
    return sorted(_REGISTERED)


def describe() -> dict[str, Description]:
    """For every registered problem its summary and its settings with their defaults.

    Example:
        >>> sorted(fl.problems.describe()["digits_mlp"].settings)[:2]
        ['batch', 'examples']
    """
    found = {}
    for name in names():
        function = _REGISTERED[name]
        found[name] = Description(first_paragraph(function), defaults(function))
    return found


def registered(name: str) -> Callable[..., Problem] | None:
    """The function registered under `name`, or None."""
    return _REGISTERED.get(name)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a function that have a default, with it."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            found[name] = parameter.default
    return found


def as_problem(result: Any, name: str, settings: dict[str, Any]) -> Problem:
    """Make a `Problem` of what a problem function returned.

    Args:
        result: a `Problem`, or a tuple (model, likelihood, data).
        name: used where the result has no name of its own.
        settings: the values the function was called with; those recorded by the function itself
            win.

    Raises:
        TypeError: if the result is neither.
    """
    if isinstance(result, tuple) and len(result) == 3:
        model, likelihood, data = result
        result = Problem(name, model, likelihood, data)
    if not isinstance(result, Problem):
        what = f"an object of type {type(result).__name__}"
        if isinstance(result, tuple):
            what = f"a tuple of {len(result)} entries"
        raise TypeError(
            f"problem {name!r} returned {what}, "
            "expected a Problem or a tuple (model, likelihood, data): return one of these"
        )
    name = result.name or name
    # what the function recorded itself comes last, and so wins
    recorded = {"name": name, **settings, **result.settings}
    return replace(result, name=name, settings=plain(recorded))


def plain(value: Any) -> Any:
    """The same value in JSON's types; what has none becomes its repr."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return repr(value)


def annotated_type(function: Callable[..., Any], setting: str) -> Any:
    """The annotated type of a setting, or None if there is none or it cannot be evaluated."""
    try:
        return typing.get_type_hints(inspect.unwrap(function)).get(setting)
    except (NameError, TypeError):
        return None
