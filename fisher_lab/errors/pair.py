"""An exact block and one approximation of it: the quantities that the undamped measures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from fisher_lab._ground.linalg import Extremes, eigenvalues
from fisher_lab.errors.quantities import Asked, Measured, Quantities, quantity
from fisher_lab.errors.spectral import advance_together, extremes
from fisher_lab.matrices import FisherMatrix

DENSE_DIM = 600  # dense differences up to this d, expansions and Lanczos above
DIRECT_FLOPS = 4e12  # most work spent on evaluating a tiny difference entry by entry
CANCELLED = 1e-8  # relative squared error below which the expansion has lost half of its digits


class Pair(Asked):
    """An exact block and an approximation of it: their quantities, each computed once, when a
    measure asks for it.

    Args:
        exact: the block F.
        approx: the approximation F^ over the same W.

    Raises:
        ValueError: if the two are over weights of different shape.
    """

    kind = Quantities

    def __init__(self, exact: FisherMatrix, approx: FisherMatrix) -> None:
        if tuple(exact.shape) != tuple(approx.shape):
            raise ValueError(
                f"Got an exact block over {tuple(exact.shape)} and an approximation over "
                f"{tuple(approx.shape)}, expected the same weight; compare matrices of the same "
                "layer."
            )
        # what rounds more than the other sets the floor of whatever is read from both
        super().__init__(eps=max(exact.rounding, approx.rounding))
        self.exact = exact
        self.approx = approx
        self.small = exact.dim <= DENSE_DIM
        self.extremes: Extremes | None = None  # of F - F^, where several pairs advanced together

    @quantity
    def trace_exact(self) -> float:
        """tr F."""
        return float(self.exact.trace())

    @quantity
    def trace_approx(self) -> float:
        """tr F^."""
        return float(self.approx.trace())

    @quantity
    def square_exact(self) -> float:
        """|F|_F^2."""
        return float(self.exact.frobenius_norm()) ** 2

    @quantity
    def square_approx(self) -> float:
        """|F^|_F^2."""
        known = self.exact.known_square(self.approx)
        if known is not None:
            return float(known)
        return float(self.approx.frobenius_norm()) ** 2

    @quantity
    def inner(self) -> float:
        """<F, F^>_F without a dense matrix, unless the block is small."""
        if self.small:
            products = self.exact.dense() * self.approx.dense()
            return float(products.sum())
        return float(self.exact.inner(self.approx))

    @cached_property
    def _difference(self) -> Tensor:
        return self.exact.dense() - self.approx.dense()

    @quantity
    def square_difference(self) -> Measured:
        """|F - F^|_F^2, entry by entry for small blocks, else expanded.

        Where the expansion cancels, it is entry by entry again, if that is not too much work.
        """
        scale = self.square_exact + self.square_approx
        rounding = (16 * self.eps) ** 2 * scale  # of a sum of squares of rounded differences
        if self.small:
            square = self._difference.square().sum()
            return Measured(float(square), rounding)
        expanded = self.square_exact - 2 * self.inner + self.square_approx
        cancellation = 8 * self.eps * scale  # three terms of this size are rounded
        if expanded > CANCELLED * scale:
            return Measured(expanded, cancellation)
        direct = self.exact.square_distance(self.approx, DIRECT_FLOPS)
        if direct is None:
            return Measured(max(expanded, 0.0), cancellation)
        return Measured(direct, rounding)

    @quantity
    def top_exact(self) -> float:
        """|F|_2."""
        return float(self.exact.spectral_norm())

    @quantity
    def top_difference(self) -> Measured:
        """|F - F^|_2, from all eigenvalues for small blocks and by Lanczos above."""
        # |F^|_F / sqrt(d) <= |F^|_2, which costs nothing more
        mean_square = self.square_approx / self.exact.dim
        scale = max(self.top_exact, mean_square**0.5)
        rounding = 16 * self.eps * scale
        if self.small:
            values = eigenvalues(self._difference)
            return Measured(float(values.abs().max()), rounding)
        own = self.exact.norm_of_difference(self.approx)
        if own is not None:
            norm, unfinished = own
            return Measured(norm, max(unfinished, rounding))
        found = self.extremes
        if found is None:
            found = extremes(self.exact.minus(self.approx), self.exact)
        return Measured(found.norm, max(found.residual, rounding))

    @quantity
    def spectrum_difference(self) -> float:
        """Sum of squared differences of the sorted eigenvalues."""
        differences = self.exact.eigenvalues() - self.approx.eigenvalues()
        return float(differences.square().sum())


def pairs(exact: FisherMatrix, approximations: Mapping[str, FisherMatrix]) -> dict[str, Pair]:
    """A Pair for every approximation; equal matrices (TKFAC and TN on a Linear layer) share one."""
    found: dict[str, Pair] = {}
    for label, matrix in approximations.items():
        twin = _twin(found.values(), matrix)
        if twin is None:
            twin = Pair(exact, matrix)
        found[label] = twin
    return found


def _twin(several: Iterable[Pair], approx: FisherMatrix) -> Pair | None:
    """The pair of an equal approximation."""
    for pair in several:
        if pair.approx.same(approx):
            return pair
    return None


def advance(several: Iterable[Pair], memory: float) -> None:
    """Run the Lanczos method for several pairs of one exact block side by side where that pays.

    Args:
        several: pairs of the same exact block.
        memory: bytes for the Lanczos vectors.
    """
    todo: list[Pair] = []
    approximations = []
    for pair in several:
        if pair.small or pair in todo:  # twins share a pair
            continue
        todo.append(pair)
        approximations.append(pair.approx)
    if not todo:
        return
    exact = todo[0].exact
    if not exact.shares_products:
        return
    together = advance_together(exact, approximations, memory)
    for pair, found in zip(todo, together, strict=True):
        pair.extremes = found
