"""Bounds of b^T (A + s I)^-1 b against a dense solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher_lab._ground.quadrature import inverse_form

SHIFTS = (1e-5, 1e-3, 1e-1, 10.0)


def semidefinite(d: int, rank: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """A `[d, d]` of some rank, eigenvalues over some decades, and b `[d]`."""
    torch.manual_seed(seed)
    U = torch.randn(d, rank, dtype=torch.float64)
    U = U * torch.logspace(0, -spread, rank, dtype=torch.float64)
    return U @ U.T, torch.randn(d, dtype=torch.float64)


def solved(A: Tensor, b: Tensor, shift: float) -> float:
    eye = torch.eye(len(b), dtype=b.dtype)
    return float(b @ torch.linalg.solve(A + shift * eye, b))


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 40),
    rank=st.integers(0, 40),
    spread=st.floats(0, 3),
    seed=st.integers(0, 99),
    inside=st.booleans(),
)
def test_the_bounds_hold_the_value(
    d: int, rank: int, spread: float, seed: int, inside: bool
) -> None:
    A, b = semidefinite(d, rank, spread, seed)
    if inside and rank:
        b = A @ b  # nothing of it in the null space
    found = inverse_form(lambda v: A @ v, b, SHIFTS, 1e-8)
    for shift, bounds in zip(SHIFTS, found, strict=True):
        value = solved(A, b, shift)
        rounding = 1e-13 * (1 + float(A.trace()) / shift)
        assert bounds.low <= value * (1 + rounding)
        assert bounds.high >= value * (1 - rounding)
        assert bounds.high - bounds.low <= 1e-8 * bounds.low


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_they_hold_it_also_where_the_steps_end_first(steps: int) -> None:
    A, b = semidefinite(60, 60, 3, seed=0)
    found = inverse_form(lambda v: A @ v, b, SHIFTS, 0.0, max_steps=steps)
    for shift, bounds in zip(SHIFTS, found, strict=True):
        assert bounds.low < solved(A, b, shift) < bounds.high
    # and are not only numbers far apart
    assert found[-1].high < 2 * found[-1].low


def test_more_steps_bring_them_closer() -> None:
    A, b = semidefinite(60, 60, 3, seed=1)
    before = inverse_form(lambda v: A @ v, b, SHIFTS, 0.0, max_steps=5)
    after = inverse_form(lambda v: A @ v, b, SHIFTS, 0.0, max_steps=20)
    for one, other in zip(before, after, strict=True):
        assert one.low <= other.low
        assert other.high <= one.high
