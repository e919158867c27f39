"""Which layers are measured together."""

from __future__ import annotations

import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.diagnose.plan import plan


def groups(dtype: torch.dtype, memory: float) -> list[list[str]]:
    """Names of the layers of each group, for data in batches, whose columns are not kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    data = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)]
    source = Source(Setup(model, fl.Gaussian(), data, dtype=dtype, memory=memory))
    return [group.names for group in plan(source, source.layers, 2, "captured")]


def test_numbers_are_as_large_as_the_precision_makes_them() -> None:
    """Half the memory holds as many numbers of half the size."""
    memory = 4e-4  # GiB, of which two or three layers fit at a time
    double = groups(torch.float64, memory)
    assert 1 < len(double) < 8
    assert groups(torch.float32, memory / 2) == double
    assert len(groups(torch.float32, memory)) < len(double)
