"""Small language models, and a and g of the layer to their logits by plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fisher_lab.layers import vocabulary

V, D, N, L = 11, 4, 6, 3


class LanguageModel(nn.Module):
    """Logits `[N, L, V]` of indices `[N, L]`; a tied one decodes with the weight that encodes."""

    def __init__(self, tied: bool = True, bias: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.encode = nn.Embedding(V, D, padding_idx=padding)
        self.mix = nn.Linear(D, D)
        self.decode = nn.Linear(D, V, bias=bias)
        if tied:
            self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        """Causal: a position sees those before it."""
        h = self.encode(x).cumsum(1)
        return self.decode(torch.tanh(self.mix(h)))


@pytest.fixture
def small_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary begins at six rows."""
    monkeypatch.setattr(vocabulary, "LARGEST_FACTOR", 5)


def model_of(tied: bool, bias: bool, padding: int | None = None) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tied, bias, padding).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, V, (N, L), generator=generator)
    y = torch.randint(0, V, (N, L), generator=generator)
    return x, y


def terms(model: LanguageModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """a `[N, T, d_in]` and g `[N, T, V]` of every position of every example, autograd on the parts
    of the forward pass; of a tied weight the lookups come first.
    """
    tied = model.decode.weight is model.encode.weight
    bias = model.decode.bias is not None
    inputs, gradients = [], []
    for n in range(len(x)):
        e = model.encode.weight.detach()[x[n]].requires_grad_()
        h = torch.tanh(model.mix(e.cumsum(0)))
        z = nn.functional.linear(h, model.decode.weight.detach(), model.decode.bias)
        loss = nn.functional.cross_entropy(z, y[n], reduction="sum")
        of_lookups, of_logits = torch.autograd.grad(loss, [e, z])
        a, g = [], []
        if tied:
            for t in range(L):
                onehot = torch.zeros(V, dtype=z.dtype)
                if x[n, t] != model.encode.padding_idx:
                    onehot[x[n, t]] = 1
                size = of_lookups[t].norm() / math.sqrt(D)
                a.append(of_lookups[t] / size)
                g.append(size * onehot)
        for t in range(L):
            a.append(h[t])
            g.append(of_logits[t])
        a = torch.stack(a)
        if bias:
            ones = torch.ones(len(a), 1).to(a)
            ones[: len(a) - L] = 0
            a = torch.cat([a, ones], 1)
        inputs.append(a)
        gradients.append(torch.stack(g))
    return torch.stack(inputs).detach(), torch.stack(gradients).detach()


def diagonal(M: Tensor) -> Tensor:
    return torch.diag(M.diagonal())


def expected_blocks(a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The exact block and every approximation `[V d_in, V d_in]`, factors over the rows cut to
    their diagonals, by the papers' formulas.
    """
    N, T = a.shape[:2]
    P = torch.einsum("ntv,nti->nvi", g, a)
    F = P.flatten(1).T @ P.flatten(1) / N
    A = torch.einsum("nti,ntj->ij", a, a) / (N * T)
    G = torch.einsum("ntv,ntw->vw", g, g) / N
    sizes_a = a.square().sum(-1)
    sizes_g = g.square().sum(-1)
    U1 = torch.einsum("nt,ntv,ntw->vw", sizes_a, g, g) / N
    U2 = torch.einsum("nt,nti,ntj->ij", sizes_g, a, a) / N
    left = torch.einsum("nvi,nwi->vw", P, P) / N
    right = torch.einsum("nvi,nvj->ij", P, P) / N

    def product(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.kron(diagonal(rows), columns)

    def corrected(columns: Tensor) -> Tensor:
        """The optimal diagonal in the basis I (x) B of the columns' factor."""
        B = torch.kron(
            torch.eye(g.shape[-1], dtype=a.dtype), torch.linalg.eigh(columns)[1].contiguous()
        )
        return B @ diagonal(B.T @ F @ B) @ B.T

    return {
        "Exact": F,
        "KFAC": product(G, A),
        "EKFAC": corrected(A),
        "TKFAC": product(U1, U2 / U2.trace()),
        "TKFAC(spatial=full)": product(left, right / right.trace()),
        "TEKFAC": corrected(U2),
        "TN": product(left, right / right.trace()),
        "LNGD": product(left, right / right.trace()),
        "Diagonal": diagonal(F),
    }
