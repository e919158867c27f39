"""(F + lambda I)^-1 of the whole network, by the route that costs least.

- "dense": an eigendecomposition of F `[d, d]`, for small networks.
- "gram": with U the columns, F = U U^T / N and K = U^T U / N,

      (F + lambda I)^-1 = (I - U (K + lambda I)^-1 U^T / N) / lambda,

  a Cholesky factorisation of K `[N R, N R]` for every damping.
- "krylov": products alone. g^T (F + lambda I)^-1 g of all dampings comes from one Lanczos run, with
  bounds; a solution from conjugate gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fisher_lab._ground.conjugate import conjugate_gradients
from fisher_lab._ground.quadrature import inverse_form
from fisher_lab.statistics import contractions
from fisher_lab.whole_network.products import Products

DAMPINGS = 5  # that costs are weighed for: `compare` asks for so many
DENSE_DIM = 1500  # up to here the eigendecomposition takes a second or two
# Products that a Lanczos run takes down to 1e-4 of the mean eigenvalue, measured on nets of 2,000
# to 2 million parameters: 1,000 to 5,000.
LANCZOS_STEPS = 3000
MOST_STEPS = 20_000
# Of g^T (F + lambda I)^-1 g: tables show four digits, and the lower bound, which is taken, is
# nearer to the value than the bounds are to each other.
TOLERANCE = 1e-4
SOLVED = 1e-8  # relative residual of a solution


class Form(NamedTuple):
    """g^T (F + lambda I)^-1 g, and how far it may be from the true value."""

    value: float
    noise: float


class Inverse(ABC):
    """(F + lambda I)^-1 for lambda > 0.

    Args:
        fisher: F.
    """

    route: ClassVar[str]

    def __init__(self, fisher: Products) -> None:
        self.fisher = fisher

    @abstractmethod
    def solve(self, g: Tensor, shift: float) -> Tensor:
        """(F + shift I)^-1 g for g `[d]`."""

    @abstractmethod
    def form(self, g: Tensor, shifts: Sequence[float]) -> list[Form]:
        """g^T (F + shift I)^-1 g for every shift."""

    def _rounding(self, value: float, shift: float) -> float:
        """What rounding may do to a value: eps times the condition number of F + shift I."""
        eps = torch.finfo(self.fisher.dtype).eps
        condition = self.fisher.condition(shift)
        return 16 * eps * condition * value


class Dense(Inverse):
    """By the eigenvectors of F."""

    route = "dense"

    def __init__(self, fisher: Products) -> None:
        super().__init__(fisher)
        values, self.vectors = torch.linalg.eigh(fisher.dense())
        self.values = values.clamp(min=0)  # rounding may leave negative ones

    def solve(self, g: Tensor, shift: float) -> Tensor:
        """In the eigenbasis."""
        c = self.vectors.T @ g
        return self.vectors @ (c / (self.values + shift))

    def form(self, g: Tensor, shifts: Sequence[float]) -> list[Form]:
        """A sum of positive terms."""
        squares = (self.vectors.T @ g).square()
        found = []
        for shift in shifts:
            value = float((squares / (self.values + shift)).sum())
            found.append(Form(value, self._rounding(value, shift)))
        return found


class Gram(Inverse):
    """By the Gram matrix of the columns."""

    route = "gram"

    def __init__(self, fisher: Products) -> None:
        super().__init__(fisher)
        self.K = gram(fisher)

    def solve(self, g: Tensor, shift: float) -> Tensor:
        """Woodbury's identity."""
        fisher = self.fisher
        b = projections(fisher, g)
        x = self._reduced(b, shift)
        back = torch.zeros_like(g)
        start = 0
        for columns in fisher.pieces():
            n = next(iter(columns.values())).N
            end = start + fisher.R * n
            back += fisher.combine(columns, x[start:end].view(fisher.R, n))
            start = end
        return (g - back / fisher.N) / shift

    def form(self, g: Tensor, shifts: Sequence[float]) -> list[Form]:
        """(g^T g - b^T (K + shift I)^-1 b) / shift with b = U^T g / sqrt(N)."""
        fisher = self.fisher
        b = projections(fisher, g)
        square = float(g @ g)
        found = []
        for shift in shifts:
            x = self._reduced(b, shift)
            inside = float(b @ x) / fisher.N
            value = (square - inside) / shift
            # the difference of two numbers of the size of g^T g, divided by shift
            lost = 16 * torch.finfo(fisher.dtype).eps * square / shift
            found.append(Form(value, self._rounding(value, shift) + lost))
        return found

    def _reduced(self, b: Tensor, shift: float) -> Tensor:
        """(K + shift I)^-1 b."""
        damped = self.K.clone()
        damped.diagonal().add_(shift)
        factor = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1)


class Krylov(Inverse):
    """By products with F."""

    route = "krylov"

    def solve(self, g: Tensor, shift: float) -> Tensor:
        """Conjugate gradients: Hestenes & Stiefel (1952).

        Raises:
            ValueError: if the residual stays above SOLVED of the norm of g.
        """
        found = conjugate_gradients(self.fisher.apply, g, shift, SOLVED, MOST_STEPS)
        if found.residual <= SOLVED:
            return found.x
        raise ValueError(
            f"Conjugate gradients left a residual of {found.residual:.0e} after {MOST_STEPS} "
            f"products, expected {SOLVED:.0e}; use more damping or fewer examples."
        )

    def form(self, g: Tensor, shifts: Sequence[float]) -> list[Form]:
        """The rules of Gauss and Radau, from one run for all shifts."""
        found = []
        bounds = inverse_form(self.fisher.apply, g, shifts, TOLERANCE, MOST_STEPS)
        for shift, bound in zip(shifts, bounds, strict=True):
            # the rule of Gauss is much the nearer one
            rounding = self._rounding(bound.low, shift)
            found.append(Form(bound.low, bound.high - bound.low + rounding))
        return found


def gram(fisher: Products) -> Tensor:
    """K `[N R, N R]`, the sum of the layers' Gram matrices, piece after piece of the columns."""
    pieces = list(fisher.pieces())
    rows = []
    for mine in pieces:
        row = []
        for theirs in pieces:
            total: Tensor | None = None
            for name in fisher.shapes:
                part = contractions.gram(mine[name], theirs[name])
                total = part if total is None else total.add_(part)
            assert total is not None
            row.append(total)
        rows.append(torch.cat(row, 1) if len(row) > 1 else row[0])
    K = torch.cat(rows) if len(rows) > 1 else rows[0]
    return K.div_(fisher.N)


def projections(fisher: Products, v: Tensor) -> Tensor:
    """U^T v `[N R]`, in the order of `gram`."""
    V = fisher.unflatten(v)
    return torch.cat([fisher.project(columns, V).flatten() for columns in fisher.pieces()])


def inverse_of(fisher: Products) -> Inverse:
    """The route that costs least, by its multiplications, of those that fit the memory."""
    d = fisher.dim
    n = fisher.N * fisher.R
    itemsize = torch.finfo(fisher.dtype).bits // 8
    room = fisher.budget.for_group
    if d <= DENSE_DIM:
        return Dense(fisher)
    # K, the copy that is factorised, and the layer's share while K is summed
    if fisher.kept and 3 * n**2 * itemsize <= room:
        factorised = n**2 * _widths(fisher) + DAMPINGS * n**3 / 3
        products = LANCZOS_STEPS * _product_flops(fisher)
        if factorised < products:
            return Gram(fisher)
    return Krylov(fisher)


def _widths(fisher: Products) -> float:
    """Multiplications for one entry of K, of all layers."""
    columns = next(fisher.pieces())
    total = 0.0
    for stats in columns.values():
        # by inputs and output gradients at every pair of positions, or by whole gradients
        by_factors = stats.T**2 * (stats.d_in + stats.d_out) * stats.Q
        total += min(by_factors, stats.dim)
    return total


def _product_flops(fisher: Products) -> float:
    """Multiplications of a product with F: two with the inputs of every position, two with the
    output gradients of every direction.
    """
    columns = next(fisher.pieces())
    each = 0.0
    for stats in columns.values():
        each += 2.0 * stats.T * stats.dim
        each += 2.0 * stats.R * stats.T * stats.Q * stats.d_out
    return each * fisher.N
