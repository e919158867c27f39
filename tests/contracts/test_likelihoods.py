"""What every likelihood promises, for everything in the registry, torch's losses, and one written
here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn.functional import softplus

import fisher_lab as fl
from fisher_lab._passes.labels import labels_of
from fisher_lab.likelihoods import (
    BernoulliProbability,
    GaussianVariance,
    Huber,
    Likelihood,
    Poisson,
    as_likelihood,
    registry,
)
from fisher_lab.likelihoods.base import diagonal_factors
from tests.helpers import assert_same, columns_at
from tests.layers.oracle import generator, normal, randomised


class Counts(Likelihood):
    """A user's own likelihood, written outside of the package: counts with rate exp(z)."""

    def factor(self, z: Tensor) -> Tensor:
        """Hessian of exp(z) - y z."""
        return diagonal_factors((z / 2).exp())

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts."""
        return torch.poisson(z.exp(), generator=generator)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p(y | z)."""
        return (y * z - z.exp() - torch.lgamma(y + 1)).flatten(1).sum(1)


Likelihood._registry.pop("Counts")

LIKELIHOODS = {
    "Categorical": (fl.Categorical(), (3,)),
    "Categorical at positions": (fl.Categorical(), (2, 3)),
    "Categorical dim=1": (fl.Categorical(dim=1), (3, 2)),
    "Gaussian": (fl.Gaussian(), (2,)),
    "Gaussian at positions": (fl.Gaussian(variance=0.5), (2, 2)),
    "Bernoulli": (fl.Bernoulli(), (2,)),
    "Bernoulli at positions": (fl.Bernoulli(), (1, 2, 2)),
    "CrossEntropyLoss": (as_likelihood(nn.CrossEntropyLoss()), (3,)),
    "CrossEntropyLoss at positions": (as_likelihood(nn.CrossEntropyLoss(reduction="sum")), (3, 2)),
    "MSELoss": (as_likelihood(nn.MSELoss()), (2,)),
    "BCEWithLogitsLoss": (as_likelihood(nn.BCEWithLogitsLoss()), (2, 2)),
    "BCELoss": (as_likelihood(nn.BCELoss()), (2, 2)),
    "NLLLoss": (as_likelihood(nn.NLLLoss()), (3, 2)),
    "KLDivLoss": (as_likelihood(nn.KLDivLoss(reduction="batchmean")), (2, 3)),
    "PoissonNLLLoss": (as_likelihood(nn.PoissonNLLLoss()), (2,)),
    "GaussianNLLLoss": (as_likelihood(nn.GaussianNLLLoss()), (2, 2)),
    "HuberLoss": (as_likelihood(nn.HuberLoss()), (2,)),
    "SmoothL1Loss": (as_likelihood(nn.SmoothL1Loss(reduction="sum")), (2, 2)),
    "BernoulliProbability": (BernoulliProbability(), (2,)),
    "GaussianVariance": (GaussianVariance(), (2, 2)),
    "Huber": (Huber(0.7, 2.0), (2,)),
    "Poisson": (Poisson(), (2,)),
    "Poisson of rates": (Poisson(log_rate=False), (2,)),
    "Counts": (Counts(), (2,)),
}
# what a model of these ends with
ENDS = {
    "BCELoss": torch.sigmoid,
    "BernoulliProbability": torch.sigmoid,
    "NLLLoss": lambda u: u.log_softmax(1),
    "KLDivLoss": lambda u: u.log_softmax(-1),
    "GaussianNLLLoss": lambda u: torch.stack([u[:, 0], softplus(u[:, 1])], 1),
    "GaussianVariance": lambda u: torch.stack([u[:, 0], softplus(u[:, 1])], 1),
    "Poisson of rates": softplus,
}
# the Hessian depends on the label: the factor is the root of its expectation
IN_EXPECTATION = ("BCELoss", "BernoulliProbability", "Gaussian", "Huber", "SmoothL1", "Poisson of")
# linear in its outputs, so that its gradient is the likelihood's only behind the log_softmax
BEHIND = ("NLLLoss", "KLDivLoss")
DISCRETE = [
    name
    for name in LIKELIHOODS
    if name.startswith(("Categorical", "Bernoulli", "Cross", "BCE", "NLL", "KL"))
]


def outputs(name: str, *shape: int, seed: int) -> Tensor:
    """Outputs that a model of this likelihood may have."""
    return ENDS.get(name, lambda u: u)(normal(*shape, seed=seed))


def labels_that_fit(likelihood: Likelihood, z: Tensor, seed: int = 4) -> Tensor:
    """Labels of the data: drawn, but KLDivLoss takes probabilities."""
    if likelihood.name == "KLDivLoss":
        return normal(*z.shape, seed=seed).softmax(-1)
    return likelihood.sample(z, generator(seed))


@pytest.fixture(params=LIKELIHOODS)
def pair(request) -> tuple[Likelihood, Tensor]:
    """A likelihood and outputs `[3, *output]`."""
    likelihood, shape = LIKELIHOODS[request.param]
    return likelihood, outputs(request.param, 3, *shape, seed=2)


@pytest.fixture
def registered() -> Iterator[None]:
    Likelihood._registry["Counts"] = Counts
    yield
    Likelihood._registry.pop("Counts")


def outer(S: Tensor, n: int) -> Tensor:
    """sum_r S_rn S_rn^T `[K, K]`."""
    columns = S[:, n].flatten(1)
    return columns.T @ columns


def test_every_registered_likelihood_is_tested() -> None:
    """Nothing is in the registry that these tests do not see."""
    assert set(registry()) <= {type(likelihood).__name__ for likelihood, _ in LIKELIHOODS.values()}


@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if not n.startswith(IN_EXPECTATION)])
def test_factor_is_a_root_of_the_hessian(name: str) -> None:
    """sum_r S S^T is the Hessian of -log p in z, whatever the label."""
    likelihood, shape = LIKELIHOODS[name]
    z = outputs(name, 3, *shape, seed=2)
    S, y = likelihood.factor(z), likelihood.sample(z, generator())
    assert S.shape[1:] == z.shape
    assert S.shape[0] == likelihood.rank(z)
    for n in range(len(z)):
        K = z[n].numel()
        H = hessian(
            lambda out, n=n: -likelihood.log_prob(out, y[n : n + 1]).sum(), z[n : n + 1]
        ).reshape(K, K)
        assert_same(outer(S, n), H, 1e-10)


@pytest.mark.parametrize("name", DISCRETE)
def test_expected_score_is_the_factor(name: str) -> None:
    """By enumeration of all labels: E[score] = 0 and E[score score^T] = sum_r S S^T, "mc" columns
    included.
    """
    likelihood, shape = LIKELIHOODS[name]
    z = outputs(name, 1, *shape, seed=3)
    base = getattr(likelihood, "base", likelihood)
    if isinstance(base, fl.Categorical):
        C, places = (
            z.shape[base.dim],
            [n for d, n in enumerate(z.shape) if d not in (0, base.dim % z.ndim)],
        )
    else:
        C, places = 2, list(z.shape[1:])
    F, mean, total = 0.0, 0.0, 0.0
    for labels in itertools.product(range(C), repeat=math.prod(places)):
        y = torch.tensor(labels).reshape(1, *places)
        p = likelihood.log_prob(z, y).exp()
        column = columns_at(likelihood, z, "mc", y)
        F, mean, total = F + p * outer(column, 0), mean + p * column, total + p
    assert float(total) == pytest.approx(1)
    assert float(mean.abs().max()) < 1e-12
    assert_same(F, outer(columns_at(likelihood, z, "true", y), 0), 1e-10)


@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if n not in DISCRETE])
def test_sampled_score_is_the_factor(name: str) -> None:
    """By sampling: the mean of score score^T comes near sum_r S S^T."""
    likelihood, shape = LIKELIHOODS[name]
    z = outputs(name, 1, *shape, seed=3).expand(40_000, *shape)
    score = columns_at(likelihood, z, "mc", likelihood.sample(z, generator(1)))[0].flatten(1)
    expected = outer(
        columns_at(likelihood, z[:1], "true", likelihood.sample(z[:1], generator())), 0
    )
    # the squares of a variance's score have heavy tails
    tolerance = 0.1 if name.startswith("Gaussian") and len(shape) == 2 else 0.03
    assert_same(score.T @ score / len(score), expected, tolerance)


def test_samples_are_valid_labels(pair) -> None:
    """Samples pass the likelihood's own check, come from the generator alone, and have finite
    log-probability.
    """
    likelihood, z = pair
    state = torch.get_rng_state()
    y = likelihood.sample(z, generator(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, likelihood.sample(z, generator(4)))
    likelihood.check_output(z)
    likelihood.check_values(z)
    likelihood.check_labels(z, labels_that_fit(likelihood, z))
    assert likelihood.log_prob(z, y).shape == (len(z),)
    assert bool(torch.isfinite(likelihood.log_prob(z, y)).all())


def test_examples_are_independent(pair) -> None:
    """Every quantity of a batch is that of its examples."""
    likelihood, z = pair
    y = likelihood.sample(z, generator(4))
    for kind in ("true", "mc", "empirical"):
        whole = columns_at(likelihood, z, kind, y)
        parts = torch.cat(
            [columns_at(likelihood, z[n : n + 1], kind, y[n : n + 1]) for n in range(len(z))], 1
        )
        assert_same(whole, parts, 1e-12)
        assert whole.shape == (labels_of(kind).directions(likelihood, z), *z.shape)


def test_empirical_is_the_gradient_of_the_loss(pair) -> None:
    """The empirical column is minus the gradient of one example's loss."""
    likelihood, z = pair
    y = labels_that_fit(likelihood, z)
    column = columns_at(likelihood, z, "empirical", y)[0, :1]
    out = z[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.loss(out, y[:1]), out)
    if likelihood.name in BEHIND:
        leaf = z[:1].clone().requires_grad_()
        normalised = leaf.log_softmax(likelihood.base.dim)
        (column,) = torch.autograd.grad(normalised, leaf, column, retain_graph=True)
        (gradient,) = torch.autograd.grad(normalised, leaf, gradient)
    assert_same(column, -gradient, 1e-12)


def test_single_precision(pair) -> None:
    """Columns have the type of the output."""
    likelihood, z = pair
    y = likelihood.sample(z.float(), generator())
    assert columns_at(likelihood, z.float(), "true", y).dtype == torch.float32


def test_the_users_likelihood_in_compare(registered) -> None:
    """A likelihood written here works in compare, estimate and exact_fisher without
    another edit.
    """
    model, x = randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), normal(5, 3)
    assert "Counts" in registry()
    for kind in ("true", "mc"):
        comparison = fl.compare(model, Counts(), x, [fl.KFAC(), fl.TN()], fisher=kind)
        assert all(row.checked < 1e-10 for row in comparison.rows)
        assert comparison.settings["likelihood"] == "Counts()"
        exact = fl.exact_fisher(model, Counts(), x, fisher=kind)
        assert_same(
            fl.estimate(fl.Exact(), model, Counts(), x, fisher=kind)["0"].dense(),
            exact["0"].dense(),
            1e-10,
        )


def test_softmax_root_of_sure_predictions() -> None:
    """Probabilities down to 1e-34: the outer products are right relative to the roots of the
    diagonal entries.
    """
    z = torch.tensor([[0.0, -78.0], [40.0, -38.0], [-60.0, 0.0]], dtype=torch.float64)
    z = torch.cat([z, z[:, :1] + torch.tensor([[3.0], [-20.0], [-50.0]], dtype=torch.float64)], 1)
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):  # the last class is the pivot
        S, p = fl.Categorical().factor(z[:, order]), z[:, order].softmax(-1)
        H = torch.einsum("rnc,rnd->ncd", S, S)
        others = torch.stack([p[:, [d for d in range(3) if d != c]].sum(1) for c in range(3)], 1)
        expected = torch.diag_embed(p * others) - (p[:, :, None] * p[:, None, :]) * (
            1 - torch.eye(3)
        )
        scale = (p * others).sqrt()
        assert float(((H - expected).abs() / (scale[:, :, None] * scale[:, None, :])).max()) < 1e-13
