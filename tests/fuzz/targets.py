"""Every public callable, found by itself: what the API reference lists, its classes' methods and
the commands.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fisher_lab as fl
from fisher_lab import training
from fisher_lab.optim import Method
from fisher_lab.optim.base import LayerOptimizer
from tests.contracts.matrices import MATRICES
from tests.fuzz import values
from tests.fuzz.values import OF_ONE, RIGHT, Make, World

DOCS = str(Path(__file__).parents[2] / "docs")

# What people who extend the library write; it is the library that calls it, with things that it
# made itself.
OF_EXTENSIONS = ("Statistics", "Layers")
# Public methods for those who extend, or that only the library calls.
WRITTEN = {
    "Approximation": "moments assemble reassemble check_factors carry moments_at assemble_at",
    "FisherMatrix": (
        "known_square stack with_tensors tensors rescued remembers quadratic differences "
        "identity_chunks square_distance powered"
    ),
    "Likelihood": "*",
    "NetworkFisher": "project combine quantities_of",
}
OPTIMIZERS = "compare matrices observing step state_dict load_state_dict attach"
# Made from what the library alone has.
NOT_MADE = (
    "NetworkFisher",
    "StepBudget",
    "Recommendation",
    "Choice",
    "ByLayer",
    "Method",
    "Likelihood",
    "Approximation",
)


@dataclass(frozen=True)
class Target:
    """Something public that can be called.

    Attributes:
        name: as it is documented.
        bind: from a world to the function to call.
        makers: right values of its arguments, by name; None for an argument that has none.
        positional: arguments that are given without their names.
    """

    name: str
    bind: Callable[[World], Callable[..., Any]]
    makers: dict[str, Make | None]
    positional: tuple[str, ...] = ()


def all_targets() -> list[Target]:
    """Every public callable, each once."""
    if DOCS not in sys.path:
        sys.path.append(DOCS)
    import fisher_docs

    found: dict[str, Target] = {}
    for section, things in fisher_docs.API.items():
        if section in OF_EXTENSIONS:
            continue
        for thing in things:
            for target in _of_thing(thing, fisher_docs.members):
                found.setdefault(target.name, target)
    for function in (training.make_optimizer, training.train_command, training.tune_command):
        target = _function(function.__name__, function)
        found[target.name] = target
    return list(found.values())


def _of_thing(thing: Any, members: Callable[[type], dict[str, Any]]) -> Iterator[Target]:
    if not inspect.isclass(thing):
        module = thing.__module__.split(".")[1]
        name = thing.__name__
        if module in ("plots",):
            name = f"{module}.{name}"
        yield _function(name, thing)
        return
    if issubclass(thing, fl.FisherMatrix):
        if thing is fl.FisherMatrix:
            yield from _methods(thing, members, _some_matrix)
        return  # structures are made by approximations
    if thing.__name__ not in NOT_MADE:
        prefix = "optim." if issubclass(thing, LayerOptimizer) else ""
        yield _function(f"{prefix}{thing.__name__}", thing)
    instance = INSTANCES.get(thing.__name__)
    if issubclass(thing, LayerOptimizer) and thing is not Method:
        instance = _optimizer_of(thing)
    if instance is not None:
        yield from _methods(thing, members, instance)


def _function(name: str, function: Callable[..., Any]) -> Target:
    makers = _makers(name, function)
    return Target(name, lambda world: function, makers, _positional(function))


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    kind = inspect.Parameter.POSITIONAL_ONLY
    return tuple(parameter.name for parameter in parameters if parameter.kind is kind)


def _methods(
    cls: type, members: Callable[[type], dict[str, Any]], instance: Make
) -> Iterator[Target]:
    """The methods that people call, on an instance."""
    wanted = set(members(cls))
    if issubclass(cls, LayerOptimizer):
        wanted = set(OPTIMIZERS.split())
    if cls is fl.FisherMatrix:
        wanted.add("__matmul__")
    for name in sorted(wanted):
        function = getattr(cls, name, None)
        hidden = name.startswith("_") and name != "__matmul__"
        if hidden or not inspect.isfunction(function) or _is_written(cls, name):
            continue
        full = f"{cls.__name__}.{name}"

        def bind(world: World, name: str = name) -> Callable[..., Any]:
            return getattr(instance(world), name)

        makers = _makers(full, function)
        positional = tuple(makers) if name.startswith("__") else _positional(function)
        yield Target(full, bind, makers, positional)


def _is_written(cls: type, name: str) -> bool:
    for base in cls.__mro__:
        names = WRITTEN.get(base.__name__, "").split()
        if name in names or "*" in names:
            return True
    return False


def _makers(name: str, function: Callable[..., Any]) -> dict[str, Make | None]:
    """Right values of the arguments, by name."""
    found: dict[str, Make | None] = {}
    for parameter in inspect.signature(function).parameters.values():
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.name != "self" and parameter.kind not in variable:
            default = RIGHT.get(parameter.name)
            short = name.removeprefix("optim.")
            found[parameter.name] = OF_ONE.get((short, parameter.name), default)
    return found


def _some_matrix(world: World) -> fl.FisherMatrix:
    names = [name for name in MATRICES if MATRICES[name]().shape == (3, 4)]
    return MATRICES[world.choose(names)]()


def _optimizer_of(cls: type) -> Make:
    def made(world: World) -> Any:
        model = values.dense_net()
        arguments: list[Any] = [model, values.nn.CrossEntropyLoss()]
        if cls is fl.NaturalGradient:
            arguments.append(fl.KFAC())
        optimizer = cls(*arguments, lr=0.01)
        loss = values.nn.functional.cross_entropy(model(values.inputs()), values.classes())
        loss.backward()
        return optimizer

    return made


INSTANCES: dict[str, Make] = {
    "Comparison": lambda world: values.comparison(),
    "NetworkFisher": lambda world: values.network(),
    "StepBudget": lambda world: values.step_budget(),
}
