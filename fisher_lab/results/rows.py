"""What one comparison consists of: rows, costs, and the settings that let it be trusted later."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ALL = "(all)"  # the layer name of errors over all layers


@dataclass(frozen=True)
class Row:
    """One error of one approximation on one layer.

    Attributes:
        layer: module name, or "(all)" for the block-diagonal matrix of all layers.
        approximation: class name, then non-default options in brackets.
        error: name of the measure.
        value: the error.
        noise: its noise floor; a value below it is reported as 0.
        damping: relative to tr F / d, for damped measures.
        checked: relative deviation of the captured exact block from torch.func along one random
            direction.
        fisher: which Fisher was measured: "true", "mc" or "empirical".
        stderr: standard error over the examples, where it was asked for and could be had.
        precision: the lowest one in which the model's forward pass computes, which `checked` and
            `noise` follow: "float64", "float32", ...; None in files of earlier versions.
    """

    layer: str
    approximation: str
    error: str
    value: float
    noise: float
    damping: float | None = None
    checked: float | None = None
    fisher: str = "true"
    stderr: float | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Cost:
    """What one approximation of one layer took.

    Attributes:
        layer: its name.
        approximation: label.
        seconds: to build it from all examples.
        bytes: to hold it.
        inverse: seconds to invert it, damped; None where no damped error was measured.
        step: seconds to apply that inverse to a gradient.
    """

    layer: str
    approximation: str
    seconds: float
    bytes: int
    inverse: float | None = None
    step: float | None = None


def costs_by_pair(costs: Iterable[Cost]) -> dict[tuple[str, str], Cost]:
    """Costs by layer and label."""
    return {(cost.layer, cost.approximation): cost for cost in costs}


class Record(dict[str, Any]):
    """A table as it stands in a file, whose documented entries can be read as attributes; None
    where one is missing.
    """

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__annotations__:
            return self.get(name)
        raise AttributeError(
            f"{type(self).__name__} has no entry {name!r}, expected one of those it documents."
        )


class LayerAbout(Record):
    """What is known of one layer.

    Attributes:
        type: class of its module.
        shape: `(Q * d_out, d_in)` of W.
        bias: whether the last column of W is the bias.
        form: "gradient" for a block over flattened parameters.
        route: how its exact block was held and measured; None until it is.
        bytes: of the exact block.
        seconds: to build the exact block, where that is told apart.
        checked: relative deviation of the captured block from torch.func.
        left_out: approximations that were not measured on it.
        damped: why damped errors were not, if they were asked for.

    What its adapter has to say (`Layer.notes`) stands beside these.
    """

    type: str | None
    shape: list[int] | None
    bias: bool | None
    form: str | None
    route: str | None
    bytes: int | None
    seconds: float | None
    checked: float | None
    left_out: list[str] | None
    damped: str | None


class Settings(Record):
    """Everything that determines a comparison, and what it took.

    Attributes:
        problem: settings of the problem, as they were given.
        model: class of the model.
        parameters: how many it has.
        fisher: "true", "mc" or "empirical".
        likelihood: p(y | z) or the loss.
        N: examples.
        R: directions per example.
        output: shape of an example's output.
        seed: of everything that is drawn.
        dtype: precision.
        precision: the lowest precision inside the model's forward pass, where that is lower.
        device: where it was computed.
        exact: "captured" or "func".
        layers: what is known of every layer.
        left_out: what was not measured, with the reason.
        approximations: their labels.
        candidates: what tells them from others, by label.
        code: what builds them for an optimizer, by label, where there is such a thing.
        own: labels of those that are the exact block of these very examples.
        errors: names of the measures.
        dampings: relative to tr F / d.
        standard_errors: whether they were asked for.
        fingerprint: of model, data, likelihood and labels.
        own_code: fingerprint of approximations, measures, likelihood and layers of the user's own;
            None where all are the library's.
        versions: of the libraries.
        machine: system and threads.
        date: of the run.
        gradient: which labels the gradient of damped measures has.
        seconds: of the run.
        peak_bytes: largest size of the process.
        complete: whether all layers are measured.
    """

    problem: Mapping[str, Any] | None
    model: str | None
    parameters: int | None
    fisher: str | None
    likelihood: str | None
    N: int | None
    R: int | None
    output: list[int] | None
    seed: int | None
    dtype: str | None
    precision: str | None
    device: str | None
    exact: str | None
    layers: Mapping[str, LayerAbout] | None
    left_out: Mapping[str, str] | None
    approximations: list[str] | None
    candidates: Mapping[str, str] | None
    code: Mapping[str, str] | None
    own: list[str] | None
    errors: list[str] | None
    dampings: list[float] | None
    standard_errors: bool | None
    fingerprint: str | None
    own_code: str | None
    versions: Mapping[str, str] | None
    machine: str | None
    date: str | None
    gradient: str | None
    seconds: float | None
    peak_bytes: int | None
    complete: bool | None

    def __init__(self, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        super().__init__()
        if values is not None:
            self.update(values)
        self.update(more)
        layers = self.get("layers")
        if layers is None:
            return
        # tables of a file, which hold plain tables
        known = {}
        for name, about in layers.items():
            known[name] = LayerAbout(about)
        self["layers"] = known

    def about(self, layer: str) -> LayerAbout:
        """What is known of one layer."""
        layers = self.layers or {}
        return layers.get(layer) or LayerAbout()

    @property
    def problem_name(self) -> str | None:
        """Name of the problem, if it has one."""
        problem = self.problem or {}
        name = problem.get("name")
        if name is None:
            return None
        return str(name)


def is_writable(name: str) -> bool:
    """Whether text has no halves of characters, which no file of text can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any, what: str) -> Any:
    """A value as plain JSON: text, numbers, True, False, None, lists and tables of these.

    Numbers of numpy and tensors with one entry become numbers.

    Args:
        value: the value.
        what: where it stands, for the message.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        table = {}
        for key, entry in value.items():
            where = f"{what}[{key!r}]"
            name = str(key)
            if name in table:  # which a file would hold once
                raise TypeError(
                    f"Got {where} beside an entry of the same name, expected keys that differ as "
                    "text; rename one."
                )
            table[name] = plain(entry, where)
        return table
    if isinstance(value, list | tuple):
        entries = []
        for index, entry in enumerate(value):
            where = f"{what}[{index}]"
            entries.append(plain(entry, where))
        return entries
    if isinstance(value, numbers.Integral):
        return int(value)
    # numpy's, and fractions
    if isinstance(value, numbers.Real):
        return float(value)
    return _plain_scalar(value, what)


def _plain_scalar(value: Any, what: str) -> Any:
    """The one entry of an array or a tensor."""
    # told by what they can do: numpy need not be there
    single = getattr(value, "item", None)
    if callable(single) and getattr(value, "size", None) is not None:
        try:
            return plain(single(), what)
        except (RuntimeError, ValueError):
            pass  # more than one entry
    raise TypeError(
        f"Got {what} of type {type(value).__name__}, expected text, numbers, lists or tables of "
        "these, which a file can hold; convert it."
    )
