"""What a FisherMatrix refuses: each time one sentence with the value, what is expected and the
cure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_lab.errors import damped_spectral
from fisher_lab.matrices import BlockDiagonal, Dense, FisherMatrix, Kronecker
from tests.contracts.matrices import MATRICES, Own, dense_of, normal
from tests.helpers import assert_same

NAN = float("nan")
INF = float("inf")


def scalar(value: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(value, **({"dtype": torch.float64} | kwargs))


@pytest.fixture(params=MATRICES)
def matrix(request) -> FisherMatrix:
    return MATRICES[request.param]()


CALLS: dict[str, tuple[str, Callable[[FisherMatrix, Tensor], Any]]] = {
    "factor -1": ("-1", lambda m, X: m.scaled(-1)),
    "factor NaN": ("nan", lambda m, X: m.scaled(NAN)),
    "factor inf": ("inf", lambda m, X: m.scaled(INF)),
    "factor text": ("'a'", lambda m, X: m.scaled("a")),
    "factor None": ("None", lambda m, X: m.scaled(None)),
    "factors": ("[2]", lambda m, X: m.scaled(scalar([1.0, 2.0]))),
    "power NaN": ("nan", lambda m, X: m.powered(NAN, 0.1)),
    "power inf": ("inf", lambda m, X: m.powered(INF, 0.1)),
    "power text": ("'a'", lambda m, X: m.powered("a", 0.1)),
    "power None": ("None", lambda m, X: m.powered(None, 0.1)),
    "power true": ("True", lambda m, X: m.powered(True, 0.1)),
    "complex power": ("1j", lambda m, X: m.powered(1j, 0.1)),
    "damping None": ("None", lambda m, X: m.solve(X, None)),
    "dampings": ("[2]", lambda m, X: m.solve(X, scalar([0.1, 0.2]))),
    "damping true": ("bool", lambda m, X: m.solve(X, scalar(True, dtype=torch.bool))),
    "complex damping": ("complex", lambda m, X: m.solve(X, scalar(1, dtype=torch.complex64))),
    "damping elsewhere": ("meta", lambda m, X: m.solve(X, scalar(0.1, device="meta"))),
    "array elsewhere": ("meta", lambda m, X: m @ X.to("meta")),
    "single array": ("float32", lambda m, X: m @ X.float()),
    "whole numbers": ("int32", lambda m, X: m @ X.int()),
    "complex array": ("complex128", lambda m, X: m @ X.to(torch.complex128)),
    "sparse array": ("sparse", lambda m, X: m @ X.to_sparse()),
    "inner with nothing": ("NoneType", lambda m, X: m.inner(None)),
    "inner with another weight": ("(7, 1)", lambda m, X: m.inner(of_another_weight())),
    "minus another weight": ("(7, 1)", lambda m, X: m.minus(of_another_weight())),
    "part of none": ("0", lambda m, X: m.part(0, 0)),
    "part too far": ("5", lambda m, X: m.part(5, 2)),
}


def of_another_weight() -> FisherMatrix:
    return Kronecker((torch.eye(7)[None].double(), torch.eye(1)[None].double()))


def test_a_refusal_is_a_sentence(matrix: FisherMatrix) -> None:
    if isinstance(matrix, Own):  # whose own `scaled` is called
        return
    for shown, run in CALLS.values():
        with pytest.raises((ValueError, TypeError), match=f"{re.escape(shown)}.*expected.*"):
            run(matrix, normal(*matrix.shape))


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_a_scalar_in_a_tensor_is_never_looked_at_and_gives_nan(
    matrix: FisherMatrix, value: float
) -> None:
    """A trainer's damping stays on its device: what is not >= 0 and finite makes all
    numbers NaN.
    """
    X = normal(*matrix.shape)
    assert bool(matrix.solve(X, scalar(value)).isnan().all())
    if not isinstance(matrix, Own):
        assert bool((matrix.scaled(scalar(value)) @ X).isnan().any())


def test_an_array_may_ask_for_its_derivative(matrix: FisherMatrix) -> None:
    X = normal(*matrix.shape).requires_grad_()
    (matrix @ X).sum().backward()
    ones = torch.ones(matrix.dim, dtype=torch.float64)
    assert_same(X.grad.flatten(), dense_of(matrix) @ ones)


@pytest.mark.parametrize("columns", [False, True])
def test_a_damping_below_rounding_inverts_by_eigenvalues(columns: bool) -> None:
    """In float32 the Cholesky factorisation of such a block fails."""
    v = torch.linspace(1, 2, 6)
    block = torch.outer(v, v)
    if columns:
        matrix: FisherMatrix = BlockDiagonal(block[None], (6, 1), 1)
    else:
        matrix = Kronecker((torch.ones(1, 1), block[None]), identities=(0,))
    exact = Dense(block, matrix.shape) if columns else Dense(block, (1, 6))
    assert damped_spectral(exact, matrix, damping=1e-9) <= 1
