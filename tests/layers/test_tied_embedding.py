"""An Embedding and a Linear layer with one weight: a lookup is a position with a one-hot row."""

import math

import pytest
import torch
from torch import nn

import fisher_lab as fl

V, D, N, L = 11, 4, 6, 3


class LanguageModel(nn.Module):
    """Logits `[N, V, L]` of indices `[N, L]`, decoded with the weight that encodes."""

    def __init__(self, bias=False, padding=None):
        super().__init__()
        self.encode = nn.Embedding(V, D, padding_idx=padding)
        self.mix = nn.Linear(D, D)
        self.decode = nn.Linear(D, V, bias=bias)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        h = self.encode(x).cumsum(1)
        return self.decode(torch.tanh(self.mix(h))).mT


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, V, (N, L), generator=generator)
    y = torch.randint(0, V, (N, L), generator=generator)
    return x, y


def terms(model, x, y, bias):
    """a and g of every position of every example by autograd on the parts of the forward pass."""
    inputs, gradients = [], []
    for n in range(N):
        e = model.encode.weight.detach()[x[n]].requires_grad_()
        h = torch.tanh(model.mix(e.cumsum(0)))
        z = nn.functional.linear(h, model.decode.weight.detach(), model.decode.bias)
        loss = nn.functional.cross_entropy(z, y[n])  # the mean over positions
        of_lookups, of_logits = torch.autograd.grad(loss, [e, z])
        a, g = [], []
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
            ones = torch.cat([torch.zeros(L, 1), torch.ones(L, 1)]).to(a)
            a = torch.cat([a, ones], 1)
        inputs.append(a)
        gradients.append(torch.stack(g))
    return torch.stack(inputs).detach(), torch.stack(gradients).detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_tied_block_is_one_linear_layer_at_the_positions_of_both(bias, padding):
    torch.manual_seed(0)
    model = LanguageModel(bias, padding).double()
    x, y = data()
    a, g = terms(model, x, y, bias)
    P = torch.einsum("nto,nti->noi", g, a).flatten(1)
    exact = P.T @ P / N
    A = torch.einsum("nti,ntj->ij", a, a) / (N * 2 * L)
    G = torch.einsum("nto,ntp->op", g, g) / N

    loss = nn.CrossEntropyLoss()
    found = fl.estimate(fl.KFAC(), model, loss, (x, y), fisher="empirical")
    truth = fl.exact_fisher(model, loss, (x, y), fisher="empirical")
    assert list(found) == ["encode", "mix"]
    torch.testing.assert_close(truth["encode"].dense(), exact, rtol=1e-10, atol=1e-14)
    expected = torch.kron(G, A)
    torch.testing.assert_close(found["encode"].dense(), expected, rtol=1e-10, atol=1e-14)


def test_tied_block_says_what_it_is_and_is_checked():
    model = LanguageModel(padding=2)
    found = fl.compare(model, nn.CrossEntropyLoss(), data(), [fl.TN()], fisher="mc")
    about = found.settings["layers"]["encode"]
    assert about["tied"] == ["encode", "decode"]
    assert about["shape"] == [V, D]
    assert "one-hot" in about["lookups"]
    assert about["checked"] < 1e-12


def test_several_directions_keep_the_gradient_form():
    found = fl.compare(LanguageModel(), nn.CrossEntropyLoss(), data(), [fl.TN()])
    about = found.settings["layers"]["encode"]
    assert about["form"] == "gradient"
    assert "every direction" in about["reason"]


def test_terms_of_several_directions_add_up():
    layer = fl.layers.select(LanguageModel()).layers["encode"]
    lookup = layer.uses[0]
    x = data()[0]
    R = 2
    g = torch.randn(R, N, L, 1, D)
    a, rows = lookup.in_block(lookup.unroll_input(x), g)
    P = torch.einsum("rntqo,ntqi->rnoi", rows, a)
    expected = torch.zeros(R, N, V, D)
    for r in range(R):
        for n in range(N):
            expected[r, n].index_add_(0, x[n], g[r, n, :, 0])
    torch.testing.assert_close(P, expected)


def test_optimizer_treats_a_tied_weight():
    torch.manual_seed(0)
    model = LanguageModel(bias=True)
    loss = nn.CrossEntropyLoss()
    x, y = data()
    optimizer = fl.optim.KFAC(model, loss, lr=0.1)
    assert "encode" in str(optimizer)
    before = loss(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        with optimizer.observing():
            z = model(x)
        loss(z, y).backward()
        optimizer.step()
    assert loss(model(x), y).item() < before
    assert not torch.isnan(model.encode.weight).any()
