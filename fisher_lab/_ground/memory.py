"""How much memory there is, and how much the process has used."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

from fisher_lab._ground.arguments import number

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def available_bytes() -> int:
    """Memory that can be taken without swapping (Linux: MemAvailable; elsewhere half of the memory,
    or 4 GiB).
    """
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if not hasattr(os, "sysconf"):
        return 4 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not tell."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def budget_bytes(memory: float | None = None) -> int:
    """A memory budget in bytes: `memory` GiB, or half of what is free.

    Raises:
        ValueError: if `memory` is not positive.
    """
    if memory is None:
        return available_bytes() // 2
    if not 0 < number(memory) < math.inf:
        raise ValueError(
            f"Got memory={memory!r}, expected a positive number of GiB, or None for half of what "
            "is free."
        )
    return int(memory * 2**30)


def readable(size: float) -> str:
    """Bytes for people: "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def least(nbytes: float) -> str:
    """The smallest `memory=` that will do, in GiB and rounded up."""
    thousandths = math.ceil(nbytes / 2**30 * 1000)
    return f"{thousandths / 1000:g}"


@dataclass(frozen=True)
class Budget:
    """The memory that one question may take, and the share that each use of it has.

    What is alive at the same time must fit together: the columns that are kept, the piece that is
    captured beside them, what is measured of the layers of one group, and the vectors of the
    Lanczos runs. Shares of different times overlap.

    Attributes:
        total: bytes.
    """

    total: int

    @classmethod
    def of(cls, memory: float | None) -> Budget:
        """A budget of `memory` GiB, or of half of what is free.

        Raises:
            ValueError: if `memory` is not positive.
        """
        return cls(budget_bytes(memory))

    @property
    def for_columns(self) -> float:
        """Columns that are captured once and kept: a quarter, beside a piece, a group and its
        Lanczos vectors.
        """
        return self.total / 4

    @property
    def for_piece(self) -> int:
        """One piece of the data while it is captured: a quarter, beside the columns kept."""
        return self.total // 4

    @property
    def for_group(self) -> float:
        """Matrices of the layers that are measured together: a third, as nothing is captured
        meanwhile.
        """
        return self.total / 3

    @property
    def for_gradients(self) -> float:
        """Per-example gradients of one layer, formed once: a third, beside the columns and one
        group of its own.
        """
        return self.total / 3

    @property
    def for_lanczos(self) -> float:
        """Vectors of the Lanczos runs that share passes over the columns: a quarter."""
        return self.total / 4

    @property
    def for_jacobian(self) -> int:
        """Per-example gradients of all parameters in torch.func's truth: an eighth, since vmap
        holds copies.
        """
        return self.total // 8

    @staticmethod
    def for_factor(nbytes: float) -> float:
        """What a matrix of this size takes while it is worked on: itself, its eigenvectors, a copy
        and a result.
        """
        return 4 * nbytes

    @staticmethod
    def for_block(nbytes: float) -> float:
        """What a layer's columns (or dense block) take while they are measured: themselves and a
        result.
        """
        return 2 * nbytes
