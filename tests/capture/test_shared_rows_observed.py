"""Optimizers observe layers whose rows all examples share: a learned table of positions."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._passes.labels import labels_of
from fisher_lab._passes.model import Forward
from fisher_lab.layers import select
from fisher_lab.likelihoods import as_likelihood
from fisher_lab.optim.observation import statistics, watching

N, L, D, C = 5, 4, 3, 3


class Positions(nn.Module):
    """Scores `[N, C]` of inputs `[N, L, D]` with learned positions, looked up in one of
    three ways.
    """

    def __init__(self, how, length=L):
        super().__init__()
        self.positions = nn.Embedding(length, D)
        self.out = nn.Linear(D, C)
        self.how = how

    def forward(self, x):
        index = torch.arange(x.shape[1])
        if self.how == "row":
            index = index[None]
        table = self.positions(index)
        if self.how == "expanded":
            table = table[None].expand(len(x), -1, -1)
        return self.out(torch.tanh(x + table).mean(1))


HOW = ["plain", "row", "expanded"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("length", [L, N])  # as many positions as examples look like examples
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_second_moment_of_shared_rows_is_that_of_the_examples(how, length, fisher):
    """In the mean over what is drawn: sampled labels, or signs."""
    torch.manual_seed(0)
    model = Positions(how, length).double()
    x = torch.randn(N, length, D, dtype=torch.float64)
    y = torch.randint(0, C, (N,))
    loss = nn.CrossEntropyLoss()
    expected = "true" if fisher == "mc" else fisher
    truth = fl.exact_fisher(model, loss, (x, y), fisher=expected)["positions"].dense()
    layers = select(model, ["positions"]).layers
    generator = torch.Generator().manual_seed(1)
    likelihood = as_likelihood(loss)
    draws = 1500
    mean = torch.zeros_like(truth)
    with watching(Forward(model), layers) as forwards:
        model(x)
    placements = {}
    kind = labels_of(fisher)
    for _ in range(draws):
        watched = forwards[0]
        of_layers = statistics(watched, layers, likelihood, kind, y, generator, None, placements)
        found = of_layers["positions"]
        assert found.examples == N
        P = found.stats.gradients().flatten(2)  # [1, 1, d]
        mean += P[0].T @ P[0] / draws
    # without the root of N, or with signs left out, it is wrong by factors
    assert torch.dist(mean, truth) < 0.2 * truth.norm()


@pytest.mark.parametrize("how", HOW)
def test_positions_train(how):
    torch.manual_seed(0)
    model = Positions(how)
    x, y = torch.randn(N, L, D), torch.randint(0, C, (N,))
    loss = nn.CrossEntropyLoss()
    optimizer = fl.optim.KFAC(model, loss, lr=0.05, damping=1e-2)
    table = model.positions.weight.detach().clone()
    before = loss(model(x), y).item()
    for _ in range(15):
        optimizer.zero_grad()
        with optimizer.observing():
            z = model(x)
        loss(z, y).backward()
        optimizer.step()
    assert loss(model(x), y).item() < before
    assert not torch.equal(model.positions.weight, table)
