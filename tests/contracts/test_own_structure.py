"""A user's structure with the abstract members alone has every feature: compared, saved, trained
with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.matrices import DiagonalMatrix, FisherMatrix, base
from tests.contracts.matrices import Own
from tests.helpers import assert_same


@dataclass(frozen=True)
class Owned(fl.Approximation):
    """The diagonal, half of it as a multiple of the identity."""

    listed = False

    def moments(self, stats, matrix=None) -> dict[str, Tensor]:
        """The diagonal in the shape of W."""
        return {"diagonal": stats.squares().flatten(0, 1)}

    def assemble(self, moments, matrix=None) -> FisherMatrix:
        """As a user's structure."""
        diagonal = moments["diagonal"]
        half = diagonal.min() / 2
        return Own(half[None], diagonal - half)


fl.Approximation._registry.pop("Owned")


@dataclass(frozen=True)
class Listed(Owned):
    """The same numbers in the library's structure."""

    def assemble(self, moments, matrix=None) -> FisherMatrix:
        """As a diagonal."""
        return DiagonalMatrix(moments["diagonal"])


fl.Approximation._registry.pop("Listed")


def problem(widths: tuple[int, ...] = (5, 4, 4, 3)) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(16, widths[0], dtype=torch.float64)
    return model, x, torch.randint(widths[-1], (16,))


@pytest.mark.parametrize("widths", [(5, 4, 3), (40, 20)])
def test_it_is_compared_as_the_same_numbers_in_another_structure(widths) -> None:
    """Small blocks by dense algebra, large ones by operators."""
    model, x, _ = problem(widths)
    both = {"own": Owned(), "listed": Listed()}
    found = fl.compare(
        model, fl.Categorical(), x, both, errors="all", dampings=[0.1], progress=False
    )
    for row in found.rows:
        if row.approximation == "own":
            listed = found.value(row.layer, "listed", row.error, row.damping)
            assert row.value == pytest.approx(
                listed, rel=2e-3 if "spectral" in row.error else 1e-8, abs=1e-10
            ), row


def test_it_trains_as_the_same_numbers_in_another_structure(tmp_path) -> None:
    """Steps, a checkpoint and going on from it."""
    found = []
    for approximation in (Owned(), Listed()):
        model, x, y = problem()
        opt = fl.NaturalGradient(
            model, fl.Categorical(), approximation, lr=0.1, observe_every=1, refresh_every=1
        )
        for _ in range(3):
            with opt.observing():
                z = model(x)
            loss = fl.Categorical().loss(z, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        torch.save(opt.state_dict(), tmp_path / "checkpoint.pt")
        opt.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_same(found[0], found[1], 1e-10)


def test_slow_defaults_are_told_once(caplog, monkeypatch) -> None:
    monkeypatch.setattr(base, "_told", set())
    own = Own(torch.ones(1).double(), torch.ones(2, 3).double())
    with caplog.at_level(logging.WARNING, "fisher_lab"):
        for _ in range(2):
            assert own.signature is None
            own.rescued(-1.0, 0.1)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "Own has no signature of its own" in told[0]
    assert "Own has no rescued of its own" in told[1]


def test_the_structures_of_the_library_are_slow_by_choice_only(caplog, monkeypatch) -> None:
    from tests.contracts.matrices import MATRICES

    monkeypatch.setattr(base, "_told", set())
    with caplog.at_level(logging.WARNING, "fisher_lab"):
        for make in MATRICES.values():
            matrix = make()
            if not isinstance(matrix, Own):
                assert matrix.signature is None or matrix.signature
                matrix.rescued(-1.0, 0.1)
    assert not caplog.records
