"""A Kronecker product of k factors per group (KFAC, TKFAC, TN, Shampoo, KPSVD, LNGD)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.linalg import eigh, mode_product, shifted_power, spd_inverse, symmetrize
from fisher_lab.matrices.base import AnyStats, FisherMatrix, Scalar, checked_scalar
from fisher_lab.matrices.centred import centring_flops, kronecker_difference
from fisher_lab.matrices.eigenbasis import EigenbasisDiagonal
from fisher_lab.statistics import LayerStats, Sums, as_sums


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(FisherMatrix):
    """U_1 (x) ... (x) U_k, block-diagonal over Q groups; for k = 2 it maps X to G X A.

    Args:
        factors: PSD matrices `[Q, n_i, n_i]`, or diagonals `[Q, n_i]`; the first acts on the rows
            of W.
        identities: which of the factors are the identity, as diagonals of ones. Where only one
            other is left, exact damping is a shift of that one.
        root: the factors are such roots of sums over the examples, up to a factor: 2 for square
            roots. It tells how far rounding of the sums was magnified.

    Example:
        >>> G, A = torch.eye(2)[None], 3 * torch.eye(3)[None]
        >>> fl.matrices.Kronecker((G, A)).trace()
        tensor(18.)
    """

    factors: tuple[Tensor, ...]
    identities: tuple[int, ...] = ()
    root: int = 1

    @classmethod
    def of_eigenpairs(cls, pairs: Sequence[tuple[Tensor, Tensor]], root: int = 1) -> Kronecker:
        """The product of B_i diag(v_i) B_i^T, whose powers then need no further decomposition.

        Args:
            pairs: eigenvalues v_i `[Q, n_i]` and eigenvectors B_i `[Q, n_i, n_i]` of every factor.
            root: see the class.
        """
        factors = []
        for values, vectors in pairs:
            factors.append(_composed(values, vectors))
        matrix = cls(tuple(factors), root=root)
        matrix._remember("eigenpairs", tuple(pairs))
        return matrix

    @cached_property
    def eigenpairs(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Eigenvalues and eigenvectors of every factor; None for the basis of a diagonal."""
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for factor in self.factors:
            if _is_diagonal(factor):
                pairs.append((factor, None))
            else:
                pairs.append(eigh(factor))
        return tuple(pairs)

    @property
    def decomposed(self) -> bool:
        """Whether the eigenpairs are known already."""
        return self.remembers("eigenpairs")

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes `(Q, n_1, ..., n_k)`."""
        Q = self.factors[0].shape[0]
        sizes = []
        for factor in self.factors:
            sizes.append(factor.shape[1])
        return (Q, *sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: the first mode are the rows, the others the columns."""
        Q, first, *rest = self.modes
        return Q * first, math.prod(rest)

    def _apply(self, X: Tensor) -> Tensor:
        by_modes = X.reshape(*X.shape[:-2], *self.modes)
        image = mode_product(by_modes, self.factors)
        return image.reshape(X.shape)

    def trace(self) -> Tensor:
        """Sum over groups of the product of the traces."""
        traces = []
        for factor in self.factors:
            traces.append(_diagonal(factor).sum(-1))
        return _per_group(traces).sum()

    def frobenius_norm(self) -> Tensor:
        """Root of the sum over groups of the product of squared norms."""
        squares = []
        for factor in self.factors:
            entries = factor.square().flatten(1)
            squares.append(entries.sum(-1))
        return _per_group(squares).sum().sqrt()

    def spectral_norm(self) -> Tensor:
        """Largest product of largest eigenvalues."""
        tops = []
        for factor in self.factors:
            if _is_diagonal(factor):
                tops.append(factor.amax(-1))
            else:
                values = torch.linalg.eigvalsh(factor)
                tops.append(values[:, -1])
        return _per_group(tops).max()

    @cached_property
    def eigenbasis(self) -> EigenbasisDiagonal:
        """This matrix in its eigenbasis."""
        return _in_eigenbasis(self.eigenpairs)

    @cached_property
    def rounding(self) -> float:
        """That of the sums, magnified by the derivative of the root at the smallest eigenvalue."""
        eps = torch.finfo(self.dtype).eps
        if self.root == 1:
            return eps
        relative = []
        for values, _ in self.eigenpairs:
            relative.append(_magnified(values, self.root))
        of_groups = torch.stack(relative).sum(0)  # of a product, relative errors add up
        return eps * max(1.0, float(of_groups.max()))

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues, sorted."""
        return self.eigenbasis.eigenvalues()

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self>; sum of (g^T G g)(a^T A a) where the columns have rank one."""
        if len(self.factors) != 2 or stats.a is None:
            return super().quadratic(stats)
        G, A = self.factors
        if stats.rank_one:
            # columns of rank one: vec(P)^T (G (x) A) vec(P) = (g^T G g)(a^T A a)
            gG = _multiply(stats.g, G)
            aA = _multiply(stats.a, A)
            of_g = (gG * stats.g).sum((0, 2, 4))
            of_a = (aA * stats.a).sum((1, 3))
            return torch.einsum("nq,nq->", of_g, of_a) / stats.N
        sums = as_sums(stats)
        known = self._by_known_squares(sums)
        if known is not None:
            return known
        left = sums.left(A)  # <F, G (x) A> = <1/N sum P A P^T, G>
        if _is_diagonal(G) and not _is_diagonal(left):
            left = left.diagonal(dim1=-2, dim2=-1)
        return (G * left).sum()

    def _by_known_squares(self, sums: Sums) -> Tensor | None:
        """<F, self> from squared columns in its own eigenvectors, where these are there already.

        Where EKFAC is measured beside KFAC, its squares were taken in KFAC's eigenvectors.
        """
        if 2 * sums.d_in >= sums.N * sums.T:  # left(A) costs less than looking
            return None
        G, A = self.factors
        for basis in sums.bases:
            of_G = _in_basis(G, basis[0])
            of_A = _in_basis(A, basis[1])
            if of_G is not None and of_A is not None:
                return torch.einsum("qo,qi,qoi->", of_G, of_A, sums.squares(basis))
        return None

    def _square_distance_to(self, stats: LayerStats, most_flops: float) -> float | None:
        """From centred features, for two factors and columns of rank one."""
        if len(self.factors) != 2 or not stats.rank_one or stats.Q != 1:
            return None
        if 2 * centring_flops(stats) > most_flops:
            return None
        G = _full(self.factors[0])[0]
        A = _full(self.factors[1])[0]
        square = kronecker_difference(stats, G, A)
        return max(0.0, square)

    def scaled(self, c: Scalar) -> Kronecker:
        """c times the first factor that is no identity."""
        c = checked_scalar(c, "factor", self)
        factors = list(self.factors)
        # any factor would do; one that is no identity leaves the identities known
        scaled = self._others[0] if self._others else 0
        factors[scaled] = factors[scaled] * c
        identities = list(self.identities)
        if scaled in identities:
            identities.remove(scaled)
        return replace(self, factors=tuple(factors), identities=tuple(identities))

    @property
    def _others(self) -> tuple[int, ...]:
        """The factors that are not known to be the identity."""
        others = []
        for i in range(len(self.factors)):
            if i not in self.identities:
                others.append(i)
        return tuple(others)

    @property
    def signature(self) -> Hashable:
        """By the shapes of the factors; alone with eigenpairs, which joining would forget."""
        if self.decomposed:
            return None
        return self._shapes(), self.identities

    def rescued(self, p: float, damping: Scalar) -> EigenbasisDiagonal:
        """From the eigenvalues of the factors, clamped at zero."""
        if isinstance(damping, Tensor) or damping > 0:
            return self.eigenbasis._powered(p, damping)
        # without damping the power of a product is the product of powers, and rounding is told from
        # numbers factor by factor: a small product of two numbers is no rounding
        powers: list[tuple[Tensor, Tensor | None]] = []
        for values, vectors in self.eigenpairs:
            powers.append((_power_of_factor(values, vectors, p, 0.0), vectors))
        return _in_eigenbasis(powers)

    @property
    def damps_exactly(self) -> bool:
        """Beside identities: I (x) A + lambda I is I (x) (A + lambda I)."""
        return len(self._others) == 1

    def _powered(self, p: float, damping: Scalar) -> FisherMatrix:
        damped = isinstance(damping, Tensor) or damping > 0
        if p != -1 or not damped or not self.damps_exactly:
            return self.rescued(p, damping)
        # I (x) A + lambda I = I (x) (A + lambda I): a Cholesky factorisation, no eigenvectors
        inverses = list(self.factors)
        (other,) = self._others
        Q = self.modes[0]
        one = torch.ones(Q, dtype=self.dtype, device=self.device)
        inverses[other] = _inverse(self.factors[other], one, damping)
        return Kronecker(tuple(inverses), self.identities)

    def _powered_factored(self, p: float, damping: Scalar) -> Kronecker:
        k = len(self.factors)
        shift = damping ** (1 / k)  # so that the product of the shifts is lambda
        scales = self._balance()
        powers = []
        if p == -1:
            for factor, scale in zip(self.factors, scales, strict=True):
                powers.append(_inverse(factor, scale, shift))
            return Kronecker(tuple(powers))
        for (values, vectors), scale in zip(self.eigenpairs, scales, strict=True):
            power = _power_of_factor(values * scale[:, None], vectors, p, shift)
            if vectors is not None:
                power = _composed(power, vectors)
            powers.append(power)
        return Kronecker(tuple(powers))

    def _balance(self) -> Tensor:
        """Numbers `[k, Q]` that scale the factors to equal mean eigenvalue in every group; their
        product is 1.

        For k = 2 damping the factors then by sqrt(lambda) is KFAC's pi split, for any k it is TNT's
        damping with eps^k = lambda. All zero where a factor vanishes.
        """
        of_factors = []
        for factor in self.factors:
            of_factors.append(_diagonal(factor).mean(-1))
        means = torch.stack(of_factors)
        logs = means.clamp(min=0).log()
        common = logs.mean(0).exp()  # the geometric mean, 0 where a factor vanishes
        return torch.where(means > 0, common / means, torch.zeros_like(means))


def _per_group(numbers: list[Tensor]) -> Tensor:
    """The products over the factors of numbers `[Q]` of every factor."""
    return torch.stack(numbers).prod(0)


def _in_eigenbasis(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> EigenbasisDiagonal:
    """The product of factors from the eigenvalues and eigenvectors of every one."""
    (values, vectors), *others = pairs
    basis = [vectors]
    for other, vectors in others:
        # the outer product of the modes before with this one, group by group
        ones = [1] * (values.ndim - 1)
        along_last = other.reshape(len(other), *ones, -1)
        values = values.unsqueeze(-1) * along_last
        basis.append(vectors)
    return EigenbasisDiagonal(tuple(basis), values)


def _power_of_factor(values: Tensor, vectors: Tensor | None, p: float, shift: Scalar) -> Tensor:
    """(values + shift)^p of one factor `[Q, n]`; a diagonal's zeros are exact."""
    size = 0 if vectors is None else values.shape[-1]
    return shifted_power(values, p, shift, size)


def _magnified(roots: Tensor, k: int) -> Tensor:
    """Relative error `[Q]` of U^(1/k) for one of 1 in U, from the eigenvalues r `[Q, n]` of the
    root.

    To first order |f(U + E) - f(U)| <= max |f'| |E| over the spectrum, and f'(r^k) = r^(1-k) / k
    is largest at the smallest eigenvalue. Zeros stay zeros: they were told from rounding.
    """
    top = roots.amax(-1, keepdim=True)
    r = roots / torch.where(top > 0, top, 1.0)
    smallest = torch.where(r > 0, r, 1.0).amin(-1)
    slope = smallest ** (1 - k) / k
    size = torch.linalg.norm(r**k, dim=-1)
    of_root = torch.linalg.norm(r, dim=-1)
    return slope * size / torch.where(of_root > 0, of_root, 1.0)


def _composed(values: Tensor, vectors: Tensor) -> Tensor:
    """B diag(v) B^T from v `[Q, n]` and B `[Q, n, n]`."""
    scaled = vectors * values.unsqueeze(-2)
    return scaled @ vectors.transpose(-1, -2)


def _inverse(factor: Tensor, scale: Tensor, shift: Scalar) -> Tensor:
    """(scale factor + shift)^-1 without an eigendecomposition."""
    if _is_diagonal(factor):
        return shifted_power(factor * scale[:, None], -1, shift)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    balanced = symmetrize(factor * scale[:, None, None])
    return spd_inverse(balanced + shift * eye)


def _in_basis(factor: Tensor, basis: Tensor | None) -> Tensor | None:
    """The diagonal `[Q, n]` of a factor in an orthogonal basis in which it is diagonal up to
    rounding, else None.
    """
    if _is_diagonal(factor) and basis is None:
        return factor
    if _is_diagonal(factor) or basis is None:
        return None
    rotated = basis.transpose(-1, -2) @ factor @ basis
    values = rotated.diagonal(dim1=-2, dim2=-1)
    rest = torch.linalg.norm(rotated - torch.diag_embed(values))
    # two products of the size of the factor round by a small multiple of eps times its norm
    eps = torch.finfo(factor.dtype).eps
    rounding = 64 * eps * float(torch.linalg.norm(factor))
    if float(rest) > rounding:
        return None
    return values


def _is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is held as its diagonal `[Q, n]`."""
    return factor.ndim == 2


def _diagonal(factor: Tensor) -> Tensor:
    """The diagonal `[Q, n]` of a factor."""
    if _is_diagonal(factor):
        return factor
    return factor.diagonal(dim1=-2, dim2=-1)


def _full(factor: Tensor) -> Tensor:
    """The factor as matrices `[Q, n, n]`."""
    if _is_diagonal(factor):
        return torch.diag_embed(factor)
    return factor


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Factor times the vectors x `[..., Q, n]`."""
    if _is_diagonal(factor):
        return x * factor
    return torch.einsum("...qi,qij->...qj", x, factor)
