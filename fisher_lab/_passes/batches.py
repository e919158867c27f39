"""Data as batches: (x, y), x, a DataLoader or any iterable of batches, checked, converted and safe
to read again.

A batch is what people have: inputs alone, a pair (inputs, y), or a mapping in which one key holds
the labels. Inputs are a tensor x `[N, ...]`, a tuple of them (the model is called as
`model(*inputs)`) or a mapping (`model(**inputs)`). Entries whose first dimension is not the
examples (a flag, None, a table that all examples share) are handed on as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        y = None if self.y is None else self.y[some]
        return Batch(taken(self.inputs, some), y, self.index)


# -- inputs of any form ----------------------------------------------------------------------------
def entries(inputs: Inputs) -> list[Any]:
    """The entries of inputs, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs)


def rebuilt(inputs: Inputs, new: list[Any]) -> Inputs:
    """Inputs of the same form with other entries."""
    if isinstance(inputs, Tensor):
        return new[0]
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, new, strict=True))
    return tuple(new)


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with every tensor changed."""
    new = [change(entry) if isinstance(entry, Tensor) else entry for entry in entries(inputs)]
    return rebuilt(inputs, new)


def leading(inputs: Inputs) -> Tensor:
    """The first tensor, whose first dimension are the examples."""
    tensors = [entry for entry in entries(inputs) if isinstance(entry, Tensor)]
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
        found.append(isinstance(entry, Tensor) and entry.ndim > 0 and entry.shape[0] == N)
    return found


def taken(inputs: Inputs, some: slice) -> Inputs:
    """The inputs of some of the examples."""
    new = []
    for entry, own in zip(entries(inputs), by_example(inputs), strict=True):
        new.append(entry[some] if own else entry)
    return rebuilt(inputs, new)


def doubled(inputs: Inputs) -> Inputs:
    """Every example twice, one after the other."""
    new = []
    for entry, own in zip(entries(inputs), by_example(inputs), strict=True):
        new.append(torch.cat([entry, entry]) if own else entry)
    return rebuilt(inputs, new)


def checksum(x: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, going on from `start`."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), start)


def batch_checksum(inputs: Inputs, y: Tensor | None, start: int = 0) -> int:
    """CRC-32 of all tensors of a batch."""
    crc = start
    for entry in entries(inputs):
        if isinstance(entry, Tensor):
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
        self, data: Any, dtype: torch.dtype, device: torch.device, memory: int, labels: str = LABELS
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
            return [split(data, self.labels)]
        if (
            isinstance(data, list)
            and len(data) == 2
            and all(isinstance(part, Tensor) for part in data)
        ):
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
        if not isinstance(data, Iterator):
            return list(data) if isinstance(data, list | tuple) else None
        return self._copied(data, memory)

    def _copied(self, data: Iterator[Any], memory: int) -> list[Any]:
        """Copies of the batches of an iterator, which can be read only once and whose buffers may
        be used again.
        """
        kept = []
        size = 0
        for batch in data:
            inputs, y = split(batch, self.labels)
            tensors = [entry for entry in (*entries(inputs), y) if isinstance(entry, Tensor)]
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if size > memory:
                raise ValueError(
                    f"The data can be read only once and holds more than {readable(memory)}, "
                    "expected data that can be read again; pass a DataLoader or a list of "
                    "batches, or raise memory=."
                )
            copy = None if y is None else y.clone()
            kept.append((mapped(inputs, torch.Tensor.clone), copy))
        return kept

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches once, checking that they are those of the first time."""
        checksums: list[int] = []
        examples = 0
        for index, batch in enumerate(self._source):
            inputs, y = split(batch, self.labels)
            _check(inputs, y, index)
            if self._kept is None:
                checksums.append(batch_checksum(inputs, y))
                known = self._checksums
                if known is not None and checksums[-1:] != known[index : index + 1]:
                    raise ValueError(_CHANGED.format(index=index))
            examples += examples_of(inputs)
            yield Batch(
                mapped(inputs, self._convert), None if y is None else self._convert(y), index
            )
        if examples == 0:
            raise ValueError(
                "The data has no batches, expected at least one example; check the data."
            )
        if self._kept is None:
            if self._checksums is not None and len(checksums) != len(self._checksums):
                raise ValueError(_CHANGED.format(index=len(checksums)))
            self._checksums = checksums
        self.N = examples

    def counted(self) -> int:
        """Number of examples, for which the data is read once where nobody has."""
        if self.N is None:
            for _ in self:
                pass
        assert self.N is not None
        return self.N

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))

    def _convert(self, x: Tensor) -> Tensor:
        dtype = self.dtype if x.is_floating_point() else x.dtype
        return x.detach().to(self.device, dtype)


_CHANGED = (
    "Batch {index} differs between two passes over the data, expected the same batches; "
    "use shuffle=False and no random augmentation."
)


def _is_batch(data: Any) -> bool:
    """Whether the data is one batch, not several."""
    if isinstance(data, Tensor | Mapping):
        return True
    return isinstance(data, tuple) and any(isinstance(part, Tensor | Mapping) for part in data)


def split(batch: Any, labels: str = LABELS) -> tuple[Inputs, Tensor | None]:
    """Inputs and labels of one batch.

    Args:
        batch: see the top of this file.
        labels: the key of y in a mapping.

    Raises:
        TypeError: for what is no batch.
        ValueError: for a mapping that holds nothing but labels.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return _split_mapping(batch, labels)
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = (batch[0], None)
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, y = batch
        if _are_inputs(inputs) and (y is None or isinstance(y, Tensor)):
            return (tuple(inputs) if isinstance(inputs, list) else inputs), y
    inside = ""
    if isinstance(batch, list | tuple):
        types = [type(part).__name__ for part in batch[:4]]
        inside = f" ({', '.join(types)})" if types else ""
    raise TypeError(
        f"Got a batch of type {type(batch).__name__}{inside}, expected a tensor x, a pair (x, y) "
        "of tensors, or a mapping of tensors; convert arrays with torch.as_tensor, write several "
        "inputs as ((x1, x2), y)."
    )


def _split_mapping(batch: Mapping[str, Any], labels: str) -> tuple[Inputs, Tensor | None]:
    inputs = {key: value for key, value in batch.items() if key != labels}
    y = batch.get(labels)
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(
            f"Got labels of type {type(y).__name__} under {labels!r}, expected a tensor; convert "
            "them with torch.as_tensor."
        )
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        raise ValueError(
            f"Got a batch with the keys {', '.join(map(repr, batch))}, expected at least one "
            f"tensor beside the labels {labels!r}; check the batches, or name the key of the "
            "labels with labels=."
        )
    return inputs, y


def _are_inputs(value: Any) -> bool:
    """Whether a value can be the inputs of a model."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(isinstance(entry, Tensor) for entry in value.values())
    return isinstance(value, tuple | list) and any(isinstance(entry, Tensor) for entry in value)


def _check(inputs: Inputs, y: Tensor | None, index: int) -> None:
    """Refuse batches that are empty, not finite, or whose labels do not belong to the inputs."""
    first = leading(inputs)
    N = examples_of(inputs)
    if N == 0:
        raise ValueError(
            f"Batch {index} has inputs of shape {tuple(first.shape)}, expected at least one "
            "example [N, ...]."
        )
    if y is not None and (y.ndim == 0 or y.shape[0] != N):
        raise ValueError(
            f"Batch {index} has {N} inputs and labels of shape {tuple(y.shape)}, expected one "
            "label per input."
        )
    for entry in entries(inputs):
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            continue
        finite = torch.isfinite(entry)
        if not bool(finite.all()):
            bad = int((~finite.reshape(len(entry), -1)).any(1).sum())
            raise ValueError(
                f"Batch {index} has NaN or infinite inputs in {bad} examples, expected finite "
                "ones; clean the data."
            )
