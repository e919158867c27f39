"""Data as batches: (x, y), x, a DataLoader or any iterable of batches, checked, converted and safe to read again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.memory import readable

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """The data as a sequence of batches that can be read several times.

    Args:
        data: `(x, y)`, `x`, or an iterable of such batches; x `[N, ...]`. A tuple is one batch, a list several.
        dtype: floating inputs and labels are converted to it; integers stay.
        device: where batches go.
        memory: most bytes to keep of an iterator that can be read only once.

    Raises:
        ValueError, TypeError: empty data, NaN or infinite inputs, x and y of different length, other types.
    """

    def __init__(self, data: Any, dtype: torch.dtype, device: torch.device, memory: int) -> None:
        self.dtype, self.device = dtype, device
        self.N: int | None = None  # known after the first full pass
        self._checksums: list[int] | None = None
        self._kept = self._in_memory(data, memory)
        self._source: Iterable[Any] = data if self._kept is None else self._kept

    @property
    def single(self) -> bool:
        """Whether the data is one batch in memory."""
        return self._kept is not None and len(self._kept) == 1

    def _in_memory(self, data: Any, memory: int) -> list[Any] | None:
        if isinstance(data, Tensor) or (isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data)):
            return [_parts(data)]
        if isinstance(data, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            raise TypeError(
                "Got a list of two tensors as data, which may be inputs and labels or two batches of inputs; "
                "pass a tuple (x, y), or a list of (x, y) batches."
            )
        if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
            raise TypeError(
                f"Got data of type {type(data).__name__}, expected (x, y), x, a DataLoader or an iterable of batches; "
                "convert arrays with torch.as_tensor, wrap a Dataset in a DataLoader."
            )
        if not isinstance(data, Iterator):
            return list(data) if isinstance(data, list | tuple) else None
        kept, size = [], 0
        for batch in data:  # can be read only once, so it is kept
            x, y = _parts(batch)
            size += sum(t.numel() * t.element_size() for t in (x, y) if t is not None)
            if size > memory:
                raise ValueError(
                    f"The data can be read only once and holds more than {readable(memory)}, expected data that can be "
                    "read again; pass a DataLoader or a list of batches, or raise memory=."
                )
            kept.append((x.clone(), None if y is None else y.clone()))  # its buffers may be used again
        return kept

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches once, checking that they are those of the first time."""
        checksums, examples = [], 0
        for index, batch in enumerate(self._source):
            x, y = _parts(batch)
            _check(x, y, index)
            if self._kept is None:
                checksums.append(checksum(x) if y is None else checksum(y, checksum(x)))
                if self._checksums is not None and checksums[-1:] != self._checksums[index : index + 1]:
                    raise ValueError(_CHANGED.format(index=index))
            examples += x.shape[0]
            yield self._convert(x), None if y is None else self._convert(y)
        if examples == 0:
            raise ValueError("The data has no batches, expected at least one example; check the data.")
        if self._kept is None:
            if self._checksums is not None and len(checksums) != len(self._checksums):
                raise ValueError(_CHANGED.format(index=len(checksums)))
            self._checksums = checksums
        self.N = examples

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))

    def _convert(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, self.dtype if x.is_floating_point() else x.dtype)


_CHANGED = (
    "Batch {index} differs between two passes over the data, expected the same batches; "
    "use shuffle=False and no random augmentation."
)


def _parts(batch: Any) -> Batch:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = (batch[0], None)
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor):  # noqa: SIM102
        if batch[1] is None or isinstance(batch[1], Tensor):
            return batch[0], batch[1]
    inside = [type(part).__name__ for part in (batch if isinstance(batch, list | tuple) else ())]
    found = type(batch).__name__ + (f" ({', '.join(inside[:4])})" if inside else "")
    raise TypeError(
        f"Got a batch of type {found}, expected a tensor x or a pair (x, y) of tensors; convert arrays with "
        "torch.as_tensor."
    )


def _check(x: Tensor, y: Tensor | None, index: int) -> None:
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"Batch {index} has inputs of shape {tuple(x.shape)}, expected at least one example [N, ...].")
    if y is not None and (y.ndim == 0 or y.shape[0] != x.shape[0]):
        raise ValueError(
            f"Batch {index} has {x.shape[0]} inputs and labels of shape {tuple(y.shape)}, expected one label per input."
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum()) if x.ndim > 1 else int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"Batch {index} has NaN or infinite inputs in {bad} examples, expected finite ones; clean the data."
        )


def checksum(x: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, going on from `start`."""
    return zlib.crc32(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), start)
