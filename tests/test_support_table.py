"""The table layer x approximation x status is written from the registries and covers all
of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import fisher_lab as fl
from fisher_lab import approximations, layers

DOCS = Path(__file__).resolve().parent.parent / "docs"


def support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support", DOCS / "support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_adapter_and_approximation_has_its_place() -> None:
    """Every torch type of the registry has a row, every default approximation a column; nothing is
    left blank.
    """
    text = support().table()
    for kind in layers.registry():
        if kind.__module__.startswith("torch."):
            assert f"`{kind.__name__}`" in text
    header, _, *rows = text.strip().splitlines()
    for method in approximations.default_approximations():
        assert f"`{method.label}`" in header
    adapters = {
        adapter
        for adapter in layers.registry().values()
        if adapter.__module__.startswith("fisher_lab.")
    }
    assert {adapter for adapter, _, _ in support().SAMPLES.values()} == adapters
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))


def test_statuses_are_tried() -> None:
    """In the gradient form Kronecker products are exact, on a convolution they are not, and groups
    are said.
    """
    module = support()
    _, norm, shape = module.SAMPLES["(gradient form)"]
    assert module.status(fl.KFAC(), norm, shape) == "exact"
    assert module.status(fl.Diagonal(), norm, shape) == "diagonal"
    _, grouped, shape = module.SAMPLES["with groups"]
    assert module.status(fl.KFAC(), grouped, shape) == "Kronecker product per group"
