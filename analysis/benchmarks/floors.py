"""What a step of each method cannot do without: its matrix products and factorisations, with
nothing around them.

Element by element work, copies and checks are not counted; a floor is the time of SGD's step and of
these.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 128  # examples that TENGraD keeps


class Pieces:
    """Every layer's matrices in their real sizes, filled with random numbers.

    Args:
        model: whose Linear layers are meant.
        loss: its loss as a function of the output and the data.
        x: a batch of the data `[N, d]`.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor
    ) -> None:
        self.model, self.loss, self.x = model, loss, x
        self.linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        shapes = [(m.out_features, m.in_features + 1) for m in self.linears]
        self.V = [torch.randn(o, i) for o, i in shapes]
        self.left, self.right = [spd(o) for o, _ in shapes], [spd(i) for _, i in shapes]
        self.g, self.a = (
            [torch.randn(len(x), o) for o, _ in shapes],
            [torch.randn(len(x), i) for _, i in shapes],
        )

    def layers(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Per layer V `[d_out, d_in]`, G, A, g `[N, d_out]`, a `[N, d_in]`."""
        return zip(self.V, self.left, self.right, self.g, self.a, strict=True)

    # -- every step --------------------------------------------------------------------------------
    def two_products(self) -> list[Tensor]:
        """G V A."""
        return [G @ V @ A for V, G, A, _, _ in self.layers()]

    def one_product(self) -> list[Tensor]:
        """V A: of small layers' row blocks only their reading, which is as much, is left out."""
        return [V @ A for V, _, A, _, _ in self.layers()]

    def four_products(self) -> list[Tensor]:
        """Into the eigenbasis, divided, and back."""
        return [G @ ((G.T @ V @ A) / V) @ A.T for V, G, A, _, _ in self.layers()]

    def woodbury(self) -> list[Tensor]:
        """U core U^T V for the columns of few examples: two thin products."""
        core = torch.ones(KEPT, KEPT)
        found = []
        for V, _, _, g, a in self.layers():
            g, a = g[:KEPT], a[:KEPT]
            s = ((g @ V) * a).sum(1) @ core
            found.append((g * s[:, None]).T @ a)
        return found

    def second_pass(self) -> None:
        """Forward and backward at the new weights."""
        self.loss(self.model(self.x), self.x).backward()
        self.model.zero_grad()

    def input_moments(self) -> list[Tensor]:
        """a^T a."""
        return [a.T @ a for *_, a in self.layers()]

    def quasi_newton(self) -> None:
        """Three products of the inputs' matrices with vectors, two of the outputs', a rank-two
        update of each.
        """
        for matrices, products in ((self.right, 3), (self.left, 2)):
            for M in matrices:
                v = M[0]
                for _ in range(products):
                    v = M @ v
                torch.addmm(M, M[:, :2], M[:2])

    # -- at an observation -------------------------------------------------------------------------
    def backward(self) -> list[Tensor]:
        """Of the sampled labels, to the outputs of the layers; the first one needs no gradient of
        its input.
        """
        return [g @ m.weight.detach() for g, m in list(zip(self.g, self.linears, strict=True))[1:]]

    def mean_gradient(self) -> list[Tensor]:
        """g^T a."""
        return [g.T @ a for *_, g, a in self.layers()]

    def left_mode(self) -> list[Tensor]:
        """V V^T."""
        return [V @ V.T for V in self.V]

    def right_mode(self) -> list[Tensor]:
        """V^T V."""
        return [V.T @ V for V in self.V]

    def output_moments(self) -> list[Tensor]:
        """g^T g."""
        return [g.T @ g for g in self.g]

    def squares(self) -> list[Tensor]:
        """Inputs and output gradients into the eigenbasis, and the products of their squares."""
        return [(g @ G).square().T @ (a @ A).square() for _, G, A, g, a in self.layers()]

    # -- at a refresh ------------------------------------------------------------------------------
    def invert(self) -> list[Tensor]:
        """Cholesky inverses of both factors."""
        return [torch.cholesky_inverse(torch.linalg.cholesky(M)) for M in [*self.left, *self.right]]

    def invert_right(self) -> list[Tensor]:
        """Cholesky inverses of the inputs' factors."""
        return [torch.cholesky_inverse(torch.linalg.cholesky(M)) for M in self.right]

    def decompose(self) -> list[Any]:
        """Eigendecompositions of both factors."""
        return [torch.linalg.eigh(M) for M in [*self.left, *self.right]]

    def roots(self) -> list[Tensor]:
        """Both powers from their eigenvectors."""
        return [M @ M.T for M in [*self.left, *self.right]]

    def carry(self) -> list[Tensor]:
        """Eigenvalues from the old basis to the new: two products of bases, two with the
        eigenvalues.
        """
        return [(G.T @ G).square() @ V @ (A.T @ A).square() for V, G, A, _, _ in self.layers()]

    def grams(self) -> list[Any]:
        """Gram matrices of few examples' columns, and their eigendecompositions."""
        found = []
        for _, _, _, g, a in self.layers():
            g, a = g[:KEPT], a[:KEPT]
            found.append(torch.linalg.eigh((g @ g.T) * (a @ a.T)))
        return found


def spd(n: int) -> Tensor:
    """A well-conditioned symmetric positive definite matrix whose eigenvalues differ."""
    X = torch.randn(n, n)
    return X @ X.T / n + torch.eye(n)


Work = tuple[Callable[[Pieces], Any], ...]
P = Pieces
MODES: Work = (P.backward, P.mean_gradient, P.left_mode, P.right_mode)
MOMENTS: Work = (P.backward, P.input_moments, P.output_moments)

# every step, at an observation, at a refresh
FLOORS: dict[str, tuple[Work, Work, Work]] = {
    "TNT": ((P.two_products,), MODES, (P.invert,)),
    "KFAC": ((P.two_products,), MOMENTS, (P.invert,)),
    "TKFAC": ((P.two_products,), MOMENTS, (P.invert,)),
    "MBF": ((P.one_product,), (P.backward, P.mean_gradient, P.right_mode), (P.invert_right,)),
    "EKFAC": ((P.four_products,), (*MOMENTS, P.squares), (P.decompose, P.carry)),
    "TEKFAC": ((P.four_products,), (*MOMENTS, P.squares), (P.decompose, P.carry)),
    "TENGraD": ((P.woodbury,), (P.backward,), (P.grams,)),
    "Shampoo": ((P.two_products,), (P.left_mode, P.right_mode), (P.decompose, P.roots)),
    "KBFGS": ((P.second_pass, P.two_products, P.input_moments, P.quasi_newton), (), ()),
}


def unavoidable(
    name: str, pieces: Pieces, observe: int, refresh: int, clock: Callable[[], float]
) -> float:
    """Seconds per step of what a method cannot do without beside SGD's step, amortised over its
    periods.
    """
    every, observed, refreshed = (
        timed(lambda w=w: [f(pieces) for f in w], clock) for w in FLOORS[name]
    )
    return every + observed / observe + refreshed / refresh


def timed(work: Callable[[], Any], clock: Callable[[], float], repeats: int = 5) -> float:
    """Median seconds of one call."""
    work()
    found = []
    for _ in range(repeats):
        started = clock()
        work()
        found.append(clock() - started)
    return sorted(found)[repeats // 2]
