"""How much memory there is, and how much the process has used."""

from __future__ import annotations

import math
import os
import sys

from fisher_lab._ground.arguments import number

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def available_bytes() -> int:
    """Memory that can be taken without swapping (Linux: MemAvailable; elsewhere half of the memory, or 4 GiB)."""
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
        raise ValueError(f"Got memory={memory!r}, expected a positive number of GiB, or None for half of what is free.")
    return int(memory * 2**30)


def readable(size: float) -> str:
    """Bytes for people: "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
