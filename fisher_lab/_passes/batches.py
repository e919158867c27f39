"""Data as batches: (x, y), x, a DataLoader or any iterable of batches, checked, converted and safe
to read again.

A batch is what people have: inputs alone, a pair (inputs, y), or a mapping in which one key holds
the labels. Inputs are a tensor x `[N, ...]`, a tuple of them (the model is called as
`model(*inputs)`) or a mapping (`model(**inputs)`). Entries whose first dimension is not the
examples (a flag, None, a table that all examples share) are handed on as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fisher_lab._ground.memory import readable

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
LABELS = "labels"  # the key of y in a mapping, unless another is named


@dataclass(frozen=True)
class Batch:
    """Some examples: what the model is called with, and their labels.

    Attributes:
        inputs: see the top of this file.
        y: labels `[N, ...]`, None without labels.
        index: place of the batch in the data.
    """

    inputs: Inputs
    y: Tensor | None
    index: int = 0

    @property
    def N(self) -> int:
        """Number of examples."""
        return examples_of(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return leading(self.inputs).device

    def part(self, some: slice) -> Batch:
        """Some of the examples."""
        y = self.y
        if y is not None:
            y = y[some]
        inputs = taken(self.inputs, some)
        return Batch(inputs, y, self.index)


# -- inputs of any form ----------------------------------------------------------------------------
def entries(inputs: Inputs) -> list[Any]:
    """The entries of inputs, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs)  # a new list, to be changed


def rebuilt(inputs: Inputs, new: list[Any]) -> Inputs:
    """Inputs of the same form with other entries."""
    if isinstance(inputs, Tensor):
        return new[0]
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, new, strict=True))
    return tuple(new)


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with every tensor changed."""
    new = entries(inputs)
    for place, entry in enumerate(new):
        if isinstance(entry, Tensor):
            new[place] = change(entry)
    return rebuilt(inputs, new)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The entries that are tensors."""
    return [entry for entry in entries(inputs) if isinstance(entry, Tensor)]


def leading(inputs: Inputs) -> Tensor:
    """The first tensor, whose first dimension are the examples."""
    tensors = tensors_of(inputs)
    for tensor in tensors:
        if tensor.ndim > 0:
            return tensor
    return tensors[0]


def examples_of(inputs: Inputs) -> int:
    """Number N of examples."""
    first = leading(inputs)
    if first.ndim == 0:
        return 0
    return first.shape[0]


def by_example(inputs: Inputs) -> list[bool]:
    """For each entry whether its first dimension are the examples."""
    N = examples_of(inputs)
    found = []
    for entry in entries(inputs):
        has_rows = isinstance(entry, Tensor) and entry.ndim > 0
        found.append(has_rows and entry.shape[0] == N)
    return found


def of_examples(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with every entry changed that belongs to the examples; the others as they are."""
    new = entries(inputs)
    for place, own in enumerate(by_example(inputs)):
        if own:
            new[place] = change(new[place])
    return rebuilt(inputs, new)


def taken(inputs: Inputs, some: slice) -> Inputs:
    """The inputs of some of the examples."""
    return of_examples(inputs, lambda entry: entry[some])


def doubled(inputs: Inputs) -> Inputs:
    """Every example twice, one after the other."""
    return of_examples(inputs, lambda entry: torch.cat([entry, entry]))


def checksum(x: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, going on from `start`."""
    on_host = x.detach().cpu()
    flat = on_host.contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    return zlib.crc32(raw.tobytes(), start)


def batch_checksum(inputs: Inputs, y: Tensor | None, start: int = 0) -> int:
    """CRC-32 of all tensors of a batch."""
    crc = start
    for entry in tensors_of(inputs):
        crc = checksum(entry, crc)
    if y is not None:
        crc = checksum(y, crc)
    return crc


# -- data ------------------------------------------------------------------------------------------
class Batches:
    """The data as a sequence of batches that can be read several times.

    Args:
        data: `(inputs, y)`, inputs alone, or an iterable of such batches. A tuple or mapping is one
            batch, a list several.
        dtype: floating inputs and labels are converted to it; integers stay.
        device: where batches go.
        memory: most bytes to keep of an iterator that can be read only once.
        labels: the key of y where a batch is a mapping.

    Raises:
        ValueError, TypeError: empty data, NaN or infinite inputs, inputs and y of different length,
            other types.
    """

    def __init__(
        self,
        data: Any,
        dtype: torch.dtype,
        device: torch.device,
        memory: int,
        labels: str = LABELS,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.labels = labels
        self.N: int | None = None  # known after the first full pass
        self._checksums: list[int] | None = None
        self._kept = self._in_memory(data, memory)
        self._source: Iterable[Any] = data if self._kept is None else self._kept

    @property
    def single(self) -> bool:
        """Whether the data is one batch in memory."""
        return self._kept is not None and len(self._kept) == 1

    def _in_memory(self, data: Any, memory: int) -> list[Any] | None:
        """The batches, where they are in memory already or can be read only once; None for what is
        read again.
        """
        if _is_batch(data):
            one = split(data, self.labels)
            return [one]
        if isinstance(data, list) and [isinstance(part, Tensor) for part in data] == [True, True]:
            raise TypeError(
                "Got a list of two tensors as data, which may be inputs and labels or two batches "
                "of inputs; pass a tuple (x, y), or a list of (x, y) batches."
            )
        if not isinstance(data, Iterable) or isinstance(data, str | bytes):
            raise TypeError(
                f"Got data of type {type(data).__name__}, expected (x, y), x, a mapping, a "
                "DataLoader or an iterable of batches; convert arrays with torch.as_tensor, wrap "
                "a Dataset in a DataLoader."
            )
        if isinstance(data, Iterator):
            return self._copied(data, memory)
        if isinstance(data, list | tuple):
            return list(data)
        return None

    def _copied(self, data: Iterator[Any], memory: int) -> list[Any]:
        """Copies of the batches of an iterator, which can be read only once and whose buffers may
        be used again.
        """
        kept = []
        size = 0
        for batch in data:
            inputs, y = split(batch, self.labels)
            copy = mapped(inputs, torch.Tensor.clone)
            tensors = tensors_of(copy)
            if y is not None:
                y = y.clone()
                tensors.append(y)
            for tensor in tensors:
                size += tensor.nbytes
            if size > memory:
                raise ValueError(
                    f"The data can be read only once and holds more than {readable(memory)}, "
                    "expected data that can be read again; pass a DataLoader or a list of "
                    "batches, or raise memory=."
                )
            kept.append((copy, y))
        return kept

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches once, checking that they are those of the first time."""
        checksums: list[int] = []
        examples = 0
        for index, batch in enumerate(self._source):
            inputs, y = split(batch, self.labels)
            _check(inputs, y, index)
            if self._kept is None:  # what is in memory does not change between two passes
                checksums.append(batch_checksum(inputs, y))
                self._compare(checksums, index + 1)
            examples += examples_of(inputs)
            inputs = mapped(inputs, self._convert)
            if y is not None:
                y = self._convert(y)
            yield Batch(inputs, y, index)
        if examples == 0:
            raise ValueError(
                "The data has no batches, expected at least one example; check the data."
            )
        if self._kept is None:
            self._compare(checksums, None)
            self._checksums = checksums
        self.N = examples

    def about(self, first: int) -> int:
        """About how many examples there are, without reading the data: of batches as large as the
        first one, where they have not been counted.

        Args:
            first: examples in the first batch.
        """
        if self.N is not None:
            return self.N
        if isinstance(self._source, Sized):
            return first * len(self._source)
        return first

    def counted(self) -> int:
        """Number of examples, for which the data is read once where nobody has."""
        if self.N is None:
            for _ in self:
                pass
        assert self.N is not None
        return self.N

    def _compare(self, checksums: list[int], count: int | None) -> None:
        """Refuse batches that differ from those of the first pass.

        Args:
            checksums: of the batches so far.
            count: how many they are; None after the last.
        """
        if self._checksums is None:
            return
        known = self._checksums[:count]
        if checksums == known:
            return
        index = len(checksums)
        if count is not None:
            index -= 1  # the last is not as it was; else one is missing
        raise ValueError(_CHANGED.format(index=index))

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))

    def _convert(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if x.is_floating_point():  # integers are indices, and stay
            dtype = self.dtype
        return x.detach().to(self.device, dtype)


_CHANGED = (
    "Batch {index} differs between two passes over the data, expected the same batches; "
    "use shuffle=False and no random augmentation."
)


def _is_batch(data: Any) -> bool:
    """Whether the data is one batch, not several."""
    if isinstance(data, Tensor | Mapping):
        return True
    if not isinstance(data, tuple):
        return False
    return any(isinstance(part, Tensor | Mapping) for part in data)


def split(batch: Any, labels: str = LABELS) -> tuple[Inputs, Tensor | None]:
    """Inputs and labels of one batch.

    Args:
        batch: see the top of this file.
        labels: the key of y in a mapping.

    Raises:
        TypeError: for what is no batch.
        ValueError: for a mapping that holds nothing but labels.
    """
    _check_packed(batch)
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return _split_mapping(batch, labels)
    inside = ""
    if isinstance(batch, list | tuple):
        pair = tuple(batch)
        if len(pair) == 1:
            pair = (*pair, None)
        if _is_pair(pair):
            inputs, y = pair
            _check_packed(inputs)
            if isinstance(inputs, list):
                inputs = tuple(inputs)
            return inputs, y
        types = [type(part).__name__ for part in batch[:4]]
        if types:
            inside = f" ({', '.join(types)})"
    raise TypeError(
        f"Got a batch of type {type(batch).__name__}{inside}, expected a tensor x, a pair (x, y) "
        "of tensors, or a mapping of tensors; convert arrays with torch.as_tensor, write several "
        "inputs as ((x1, x2), y)."
    )


def _check_packed(value: Any) -> None:
    """Refuse packed sequences, whose examples lie between each other."""
    if isinstance(value, PackedSequence):
        raise TypeError(
            "Got a PackedSequence as inputs, expected tensors whose first dimension are the "
            "examples; pass padded sequences and their lengths, ((x, lengths), y), and pack them "
            "inside the model."
        )


def _is_pair(pair: tuple[Any, ...]) -> bool:
    """Whether it is (inputs, y)."""
    if len(pair) != 2:
        return False
    inputs, y = pair
    labels = y is None or isinstance(y, Tensor)
    return labels and _are_inputs(inputs)


def _split_mapping(batch: Mapping[str, Any], labels: str) -> tuple[Inputs, Tensor | None]:
    inputs = dict(batch)
    y = inputs.pop(labels, None)
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(
            f"Got labels of type {type(y).__name__} under {labels!r}, expected a tensor; convert "
            "them with torch.as_tensor."
        )
    if not tensors_of(inputs):
        keys = ", ".join(map(repr, batch))
        raise ValueError(
            f"Got a batch with the keys {keys}, expected at least one tensor beside the labels "
            f"{labels!r}; check the batches, or name the key of the labels with labels=."
        )
    return inputs, y


def _are_inputs(value: Any) -> bool:
    """Whether a value can be the inputs of a model."""
    if isinstance(value, Tensor):
        return True
    if not isinstance(value, Mapping | tuple | list):
        return False
    return len(tensors_of(value)) > 0  # type: ignore[arg-type]  # a list becomes a tuple


def _check(inputs: Inputs, y: Tensor | None, index: int) -> None:
    """Refuse batches that are empty, not finite, or whose labels do not belong to the inputs."""
    _check_storage(inputs, y, index)
    N = examples_of(inputs)
    if N == 0:
        shape = tuple(leading(inputs).shape)
        raise ValueError(
            f"Batch {index} has inputs of shape {shape}, expected at least one example [N, ...]."
        )
    if y is not None and (y.ndim == 0 or y.shape[0] != N):
        shape = tuple(y.shape)
        raise ValueError(
            f"Batch {index} has {N} inputs and labels of shape {shape}, expected one label per "
            "input."
        )
    for entry in tensors_of(inputs):
        if not entry.is_floating_point():
            continue
        finite = torch.isfinite(entry)
        if not bool(finite.all()):
            by_row = finite.reshape(len(entry), -1)
            bad = int((~by_row).any(1).sum())
            raise ValueError(
                f"Batch {index} has NaN or infinite inputs in {bad} examples, expected finite "
                "ones; clean the data."
            )


def _check_storage(inputs: Inputs, y: Tensor | None, index: int) -> None:
    """Refuse sparse tensors and those without numbers."""
    tensors = tensors_of(inputs)
    if y is not None:
        tensors.append(y)
    for tensor in tensors:
        if tensor.is_meta:
            found = "on the device meta"
        elif tensor.layout != torch.strided:
            found = f"of layout {tensor.layout}"
        else:
            continue
        raise ValueError(
            f"Batch {index} has a tensor {found}, expected dense tensors that hold numbers; load "
            "it, or call .to_dense()."
        )
