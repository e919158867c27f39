"""A Kronecker product of k factors per group (KFAC, TKFAC, TN, Shampoo, KPSVD, LNGD)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, mode_product, shifted_power, spd_inverse, symmetrize
from fisher_lab.matrices.base import FisherMatrix
from fisher_lab.matrices.centred import centring_flops, kronecker_difference
from fisher_lab.matrices.eigenbasis import EigenbasisDiagonal
from fisher_lab.statistics import LayerStats, Sums, as_sums


@dataclass(frozen=True, eq=False)
class Kronecker(FisherMatrix):
    """U_1 (x) ... (x) U_k, block-diagonal over Q groups; for k = 2 it maps X to G X A.

    Args:
        factors: PSD matrices `[Q, n_i, n_i]`, or diagonals `[Q, n_i]`; the first acts on the rows
            of W.
        identities: which of the factors are the identity, as diagonals of ones. Where only one
            other is left, exact damping is a shift of that one.
    """

    factors: tuple[Tensor, ...]
    identities: tuple[int, ...] = ()

    @classmethod
    def of_eigenpairs(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Kronecker:
        """The product of B_i diag(v_i) B_i^T, whose powers then need no further decomposition.

        Args:
            pairs: eigenvalues v_i `[Q, n_i]` and eigenvectors B_i `[Q, n_i, n_i]` of every factor.
        """
        factors = []
        for values, vectors in pairs:
            factors.append((vectors * values.unsqueeze(-2)) @ vectors.transpose(-1, -2))
        matrix = cls(tuple(factors))
        matrix._remember("eigenpairs", tuple(pairs))
        return matrix

    @cached_property
    def eigenpairs(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Eigenvalues and eigenvectors of every factor; None for the basis of a diagonal."""
        return tuple(
            (factor, None) if factor.ndim == 2 else eigh(factor) for factor in self.factors
        )

    @property
    def decomposed(self) -> bool:
        """Whether the eigenpairs are known already."""
        return self.remembers("eigenpairs")

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes `(Q, n_1, ..., n_k)`."""
        return (self.factors[0].shape[0], *(factor.shape[1] for factor in self.factors))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: the first mode are the rows, the others the columns."""
        Q, first, *rest = self.modes
        return Q * first, math.prod(rest)

    def _apply(self, X: Tensor) -> Tensor:
        return mode_product(X.reshape(*X.shape[:-2], *self.modes), self.factors).reshape(X.shape)

    def trace(self) -> Tensor:
        """Sum over groups of the product of the traces."""
        return self._per_group([_diagonal(factor).sum(-1) for factor in self.factors]).sum()

    def frobenius_norm(self) -> Tensor:
        """Root of the sum over groups of the product of squared norms."""
        return (
            self._per_group([factor.square().flatten(1).sum(-1) for factor in self.factors])
            .sum()
            .sqrt()
        )

    def spectral_norm(self) -> Tensor:
        """Largest product of largest eigenvalues."""
        tops = [
            factor.amax(-1) if factor.ndim == 2 else torch.linalg.eigvalsh(factor)[:, -1]
            for factor in self.factors
        ]
        return self._per_group(tops).max()

    @staticmethod
    def _per_group(numbers: list[Tensor]) -> Tensor:
        return torch.stack(numbers).prod(0)

    @cached_property
    def eigenbasis(self) -> EigenbasisDiagonal:
        """This matrix in its eigenbasis."""
        values = self.eigenpairs[0][0]
        for other, _ in self.eigenpairs[1:]:
            values = values.unsqueeze(-1) * other.reshape(len(other), *(1,) * (values.ndim - 1), -1)
        return EigenbasisDiagonal(tuple(vectors for _, vectors in self.eigenpairs), values)

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues, sorted."""
        return self.eigenbasis.eigenvalues()

    def quadratic(self, stats: LayerStats | Sums) -> Tensor:
        """<F, self>; sum of (g^T G g)(a^T A a) where the columns have rank one."""
        if len(self.factors) != 2 or stats.a is None:
            return super().quadratic(stats)
        G, A = self.factors
        if stats.T == 1:
            g, a = _multiply(stats.g, G), _multiply(stats.a, A)
            return (
                torch.einsum("nq,nq->", (g * stats.g).sum((0, 2, 4)), (a * stats.a).sum((1, 3)))
                / stats.N
            )
        sums = as_sums(stats)
        if 2 * sums.d_in < sums.N * sums.T:  # else left(A) costs less than looking
            # that of its own eigenvectors, where the corrected approximation was built too
            for basis in sums.bases:
                values = [
                    _in_basis(factor, B) for factor, B in zip(self.factors, basis, strict=True)
                ]
                if values[0] is not None and values[1] is not None:
                    return torch.einsum("qo,qi,qoi->", values[0], values[1], sums.squares(basis))
        left = sums.left(A)  # <F, G (x) A> = <1/N sum P A P^T, G>
        if G.ndim == 2:
            left = left.diagonal(dim1=-2, dim2=-1)
        return (G * left).sum()

    def _square_distance_to(self, stats: LayerStats, most_flops: float) -> float | None:
        """From centred features, for two factors and columns of rank one."""
        if (
            len(self.factors) != 2
            or not stats.rank_one
            or stats.Q != 1
            or 2 * centring_flops(stats) > most_flops
        ):
            return None
        G, A = (factor[0] if factor.ndim == 3 else factor[0].diag() for factor in self.factors)
        return max(0.0, kronecker_difference(stats, G, A))

    def scaled(self, c: float | Tensor) -> Kronecker:
        """c times the first factor that is no identity."""
        factors = list(self.factors)
        scaled = next(iter(self._others), 0)
        factors[scaled] = factors[scaled] * c
        identities = tuple(i for i in self.identities if i != scaled)
        return Kronecker(tuple(factors), identities)

    @property
    def _others(self) -> tuple[int, ...]:
        """The factors that are not known to be the identity."""
        return tuple(i for i in range(len(self.factors)) if i not in self.identities)

    @property
    def signature(self) -> Hashable:
        """By the shapes of the factors; alone with eigenpairs, which joining would forget."""
        if self.decomposed:
            return None
        return self._shapes(), self.identities

    def rescued(self, p: float, damping: float | Tensor) -> EigenbasisDiagonal:
        """From the eigenvalues of the factors, clamped at zero."""
        return self.eigenbasis._powered(p, damping)

    @property
    def damps_exactly(self) -> bool:
        """Beside identities: I (x) A + lambda I is I (x) (A + lambda I)."""
        return len(self._others) == 1

    def _powered(self, p: float, damping: float | Tensor) -> FisherMatrix:
        damped = isinstance(damping, Tensor) or damping > 0
        if p == -1 and damped and self.damps_exactly:
            inverses = list(self.factors)
            (other,) = self._others
            one = torch.ones(self.modes[0], dtype=self.dtype, device=self.device)
            inverses[other] = _inverse(self.factors[other], one, damping)
            return Kronecker(tuple(inverses), self.identities)
        return self.rescued(p, damping)

    def _powered_factored(self, p: float, damping: float | Tensor) -> Kronecker:
        shift = damping ** (1 / len(self.factors))
        scales = self._balance()
        powers = []
        if p == -1:
            for factor, scale in zip(self.factors, scales, strict=True):
                powers.append(_inverse(factor, scale, shift))
            return Kronecker(tuple(powers))
        for (values, vectors), scale in zip(self.eigenpairs, scales, strict=True):
            power = shifted_power(values * scale[:, None], p, shift)
            if vectors is not None:
                power = (vectors * power.unsqueeze(-2)) @ vectors.transpose(-1, -2)
            powers.append(power)
        return Kronecker(tuple(powers))

    def _balance(self) -> Tensor:
        """Numbers `[k, Q]` that scale the factors to equal mean eigenvalue in every group; their
        product is 1.

        For k = 2 damping the factors then by sqrt(lambda) is KFAC's pi split, for any k it is TNT's
        damping with eps^k = lambda. All zero where a factor vanishes.
        """
        means = torch.stack([_diagonal(factor).mean(-1) for factor in self.factors])
        common = means.clamp(min=0).log().mean(0).exp()
        return torch.where(means > 0, common / means, torch.zeros_like(means))


def _inverse(factor: Tensor, scale: Tensor, shift: float | Tensor) -> Tensor:
    """(scale factor + shift)^-1 without an eigendecomposition."""
    if factor.ndim == 2:
        return shifted_power(factor * scale[:, None], -1, shift)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return spd_inverse(symmetrize(factor * scale[:, None, None]) + shift * eye)


def _in_basis(factor: Tensor, basis: Tensor | None) -> Tensor | None:
    """The diagonal `[Q, n]` of a factor in an orthogonal basis in which it is diagonal up to
    rounding, else None.
    """
    if factor.ndim == 2 or basis is None:
        return factor if factor.ndim == 2 and basis is None else None
    rotated = basis.transpose(-1, -2) @ factor @ basis
    values = rotated.diagonal(dim1=-2, dim2=-1)
    rest, eps = torch.linalg.norm(rotated - torch.diag_embed(values)), torch.finfo(factor.dtype).eps
    return values if float(rest) <= 64 * eps * float(torch.linalg.norm(factor)) else None


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Factor times the vectors x `[..., Q, n]`."""
    return x * factor if factor.ndim == 2 else torch.einsum("...qi,qij->...qj", x, factor)
