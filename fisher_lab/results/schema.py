"""What the files hold: names and types of all entries, checked by pydantic when a file is read.

Whoever wrote a file: what comes out of here has the types that tables, figures and reports rely on.
Entries that are not named here are kept where people add their own (settings, layers, quantities,
trials, records) and dropped elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypeVar

from annotated_types import Ge
from pydantic import AfterValidator, ConfigDict, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Size = Annotated[int, Ge(0)]
Number = float | None
T = TypeVar("T")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


# halves of characters too, which a file of JSON can hold and pydantic's own type refuses
Text = Annotated[str, PlainValidator(_text)]


class RowTable(TypedDict):
    """One error; see `Row`."""

    layer: Text
    approximation: Text
    error: Text
    value: float
    noise: float
    fisher: Text
    damping: NotRequired[Number]
    checked: NotRequired[Number]
    stderr: NotRequired[Number]
    precision: NotRequired[Text | None]


class CostTable(TypedDict):
    """What an approximation took; see `Cost`."""

    layer: Text
    approximation: Text
    seconds: float
    bytes: Size
    inverse: NotRequired[Number]
    step: NotRequired[Number]


class AboutTable(TypedDict, total=False):
    """What is known of a layer; see `LayerAbout`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    type: Text | None
    shape: Annotated[list[Size], AfterValidator(lambda sizes: _of_length(sizes, 2))] | None
    bias: bool | None
    form: Text | None
    route: Text | None
    bytes: Size | None
    seconds: Number
    checked: Number
    left_out: list[Text] | None
    damped: Text | None


class SettingsTable(TypedDict, total=False):
    """What determines a comparison; see `Settings`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    problem: dict[Text, Any] | None
    model: Text | None
    parameters: Size | None
    fisher: Text | None
    likelihood: Text | None
    N: Size | None
    R: Size | None
    output: list[int] | None
    seed: int | None
    dtype: Text | None
    precision: Text | None
    device: Text | None
    exact: Text | None
    layers: dict[Text, AboutTable] | None
    left_out: dict[Text, Text] | None
    approximations: list[Text] | None
    candidates: dict[Text, Text] | None
    errors: list[Text] | None
    dampings: list[float] | None
    standard_errors: bool | None
    fingerprint: Text | None
    code: dict[Text, Text] | None
    own_code: Text | None
    own: list[Text] | None
    versions: dict[Text, Text] | None
    machine: Text | None
    date: Text | None
    gradient: Text | None
    seconds: Number
    peak_bytes: Size | None
    complete: bool | None


class QuantityTable(TypedDict):
    """The numbers that the errors of an approximation are made of."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    layer: Text
    approximation: Text
    damping: NotRequired[Number]
    trace_exact: NotRequired[float]
    trace_approx: NotRequired[float]
    influences: NotRequired[dict[Text, list[float]] | None]


class CovarianceTable(TypedDict):
    """Covariances of the values of the approximations, of one error on one layer."""

    layer: Text
    error: Text
    damping: NotRequired[Number]
    approximations: list[Text]
    matrix: list[list[float]]


def _of_length(entries: list[T], length: int) -> list[T]:
    if len(entries) != length:
        raise ValueError(f"expected {length} entries, got {len(entries)}")
    return entries


def _numbers(found: QuantityTable) -> QuantityTable:
    """With numbers, or a number and its noise, under all other names."""
    for name, value in found.items():
        if name in QuantityTable.__annotations__ or value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                raise ValueError(f"expected numbers as {name}, got a {type(entry).__name__}")
    return found


def _square(found: CovarianceTable) -> CovarianceTable:
    """With a row and a column for every approximation."""
    count = len(found["approximations"])
    _of_length(found["matrix"], count)
    for row in found["matrix"]:
        _of_length(row, count)
    return found


class ComparisonTable(TypedDict):
    """All of a file of a comparison."""

    rows: list[RowTable]
    costs: list[CostTable]
    settings: SettingsTable
    quantities: list[Annotated[QuantityTable, AfterValidator(_numbers)]]
    # files of before there were standard errors have none
    covariances: NotRequired[list[Annotated[CovarianceTable, AfterValidator(_square)]]]


class TrialTable(TypedDict):
    """One trial of `tune`; a diverged one has no loss."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    optimizer: Text
    lr: float
    damping: Number
    loss: Number
    seconds: float
    epochs: Size


class TrialsTable(TypedDict):
    """All of a file of `tune`."""

    about: dict[Text, Any]
    trials: list[TrialTable]


class RecordTable(TypedDict):
    """One epoch of a training; a diverged one has no loss."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    epoch: Size
    step: Size
    loss: Number
    seconds: float
    lr: float


COMPARISON = TypeAdapter(ComparisonTable)
TRIALS = TypeAdapter(TrialsTable)
RECORDS = TypeAdapter(list[RecordTable])


def checked(adapter: TypeAdapter[T], contents: Any) -> T:
    """Contents of a file, of the types that they are to have.

    Args:
        adapter: one of the above.
        contents: plain containers and numbers.

    Raises:
        ValueError: naming the first entry that is of another type.
    """
    try:
        # a number in quotation marks is none
        return adapter.validate_python(contents, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        message = first["msg"]
        raise ValueError(f"{place}: {message[:1].lower()}{message[1:]}") from error
