"""Every loss module of torch: its Gauss-Newton matrix against torch's own Hessian of the whole
batch.

The oracle knows nothing of likelihoods: J of all outputs of a batch by autograd, H the Hessian of
torch's loss of that batch by torch.func, and J^T H J. Where H depends on the labels, it is averaged
over labels whose first moments are those of the model's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn.functional import softplus

import fisher_lab as fl
from fisher_lab._passes.labels import labels_of
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.likelihoods import as_likelihood
from tests.helpers import assert_same
from tests.layers.oracle import generator, normal, randomised, weight_and_bias

# torch announces another meaning of KLDivLoss(reduction="mean")
pytestmark = pytest.mark.filterwarnings("ignore:reduction.*'mean' divides:UserWarning")

N = 5
OUT = 3


class Tail(nn.Module):
    """What a model ends with, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u)


class Body(nn.Module):
    """`[N, 4]` -> `[N, out]`, or with positions `[N, 4, L]` -> `[N, out, L]`."""

    def __init__(self, out: int, positions: bool) -> None:
        super().__init__()
        first, last = nn.Linear(4, 3), nn.Linear(3, out)
        if positions:
            first, last = nn.Conv1d(4, 3, 1), nn.Conv1d(3, out, 1)
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def identity(u: Tensor) -> Tensor:
    return u


def mean_and_variance(u: Tensor) -> Tensor:
    """Two outputs in dimension 1: `[N, 2 K]` -> `[N, 2, K]`."""
    mean, raw = u.chunk(2, 1)
    return torch.stack([mean, softplus(raw) + 0.1], 1)


def indices(*shape: int) -> Tensor:
    return torch.randint(0, OUT, shape, generator=generator(1))


def zeros_and_ones(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator(1)).double()


def probabilities(*shape: int) -> Tensor:
    return normal(*shape, seed=3).softmax(1)


def ignored(y: Tensor, index: int = -100) -> Tensor:
    chosen = torch.rand(y.shape, generator=generator(2)) < 0.4
    return torch.where(chosen, index, y)


W = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


@dataclass
class Case:
    """A loss, how its model ends, its labels, and the labels that its Hessian is averaged over.

    Attributes:
        inside: whether the tail is part of the loss to the oracle: the loss is linear in its
            output.
        labels_of: sets of labels whose mean Hessian is the expectation; None: those of the data.
    """

    loss: Callable[..., nn.Module]
    y: Tensor
    tail: Callable[[Tensor], Tensor] = identity
    inside: bool = False
    out: int = OUT
    positions: bool = False
    labels_of: Callable[[Tensor], list[Tensor]] | None = None
    reductions: tuple[str, ...] = ("mean", "sum")


def at_mean(z: Tensor) -> list[Tensor]:
    """Losses that are linear in the label: at its expectation."""
    return [z.detach()]


def two_sided(z: Tensor) -> list[Tensor]:
    """Losses that are quadratic in the label: mean and variance of these two are the model's."""
    mean, variance = z.detach()[:, 0], z.detach()[:, 1]
    return [mean - variance.sqrt(), mean + variance.sqrt()]


CASES = {
    "CE": Case(nn.CrossEntropyLoss, indices(N)),
    "CE weights": Case(lambda **k: nn.CrossEntropyLoss(weight=W, **k), indices(N)),
    "CE ignored": Case(nn.CrossEntropyLoss, ignored(indices(N, 4)), positions=True),
    "CE weights, ignored, smoothing": Case(
        lambda **k: nn.CrossEntropyLoss(weight=W, ignore_index=1, label_smoothing=0.2, **k),
        indices(N, 4),
        positions=True,
    ),
    "CE probabilities, weights, smoothing": Case(
        lambda **k: nn.CrossEntropyLoss(weight=W, label_smoothing=0.2, **k), 2 * probabilities(N, 3)
    ),
    "CE multi-hot, smoothing": Case(
        lambda **k: nn.CrossEntropyLoss(label_smoothing=0.2, **k), zeros_and_ones(N, 3)
    ),
    "NLL": Case(nn.NLLLoss, indices(N), lambda u: u.log_softmax(1), inside=True),
    "NLL weights, ignored": Case(
        lambda **k: nn.NLLLoss(weight=W, **k),
        ignored(indices(N, 4)),
        lambda u: u.log_softmax(1),
        inside=True,
        positions=True,
    ),
    "KL": Case(
        nn.KLDivLoss,
        1.5 * probabilities(N, 3),
        lambda u: u.log_softmax(1),
        inside=True,
        reductions=("batchmean", "mean", "sum"),
    ),
    "KL of logarithms": Case(
        lambda **k: nn.KLDivLoss(log_target=True, **k),
        probabilities(N, 3).log(),
        lambda u: u.log_softmax(1),
        inside=True,
        reductions=("batchmean", "mean", "sum"),
    ),
    "KL at positions": Case(
        nn.KLDivLoss,
        normal(N, 4, 3, seed=3).softmax(-1),
        lambda u: u.transpose(1, 2).log_softmax(-1),
        inside=True,
        positions=True,
        reductions=("batchmean", "mean", "sum"),
    ),
    "MSE": Case(nn.MSELoss, normal(N, 3, seed=4)),
    "BCE": Case(nn.BCELoss, zeros_and_ones(N, 3), torch.sigmoid, labels_of=at_mean),
    "BCE logits": Case(nn.BCEWithLogitsLoss, zeros_and_ones(N, 3)),
    "BCE logits, pos_weight": Case(
        lambda **k: nn.BCEWithLogitsLoss(pos_weight=W, **k), probabilities(N, 3)
    ),
    "Poisson": Case(nn.PoissonNLLLoss, indices(N, 3).double()),
    "Poisson full": Case(lambda **k: nn.PoissonNLLLoss(full=True, **k), indices(N, 3).double()),
    "Poisson rates": Case(
        lambda **k: nn.PoissonNLLLoss(log_input=False, eps=0.0, **k),
        indices(N, 3).double(),
        softplus,
        labels_of=at_mean,
    ),
    "Gaussian NLL": Case(
        nn.GaussianNLLLoss, normal(N, 3, seed=4), mean_and_variance, out=6, labels_of=two_sided
    ),
}
EACH = [(name, reduction) for name, case in CASES.items() for reduction in case.reductions]


def gauss_newton(case: Case, body: Body, x: Tensor, loss: Any, of: nn.Module) -> Tensor:
    """J^T H J `[d, d]` of the loss of the whole batch, in the parameters of a layer."""
    outer = identity if case.inside else case.tail
    inner = case.tail if case.inside else identity

    def value(u: Tensor, y: Tensor) -> Tensor:
        z = inner(u)
        if isinstance(loss, nn.GaussianNLLLoss):
            return loss(z[:, 0], y, z[:, 1])
        return loss(z, y)

    u = outer(body(x))
    parameters = dict(of.named_parameters())
    rows = []
    for entry in u.flatten():
        found = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True)
        rows.append(weight_and_bias(of)(dict(zip(parameters, found, strict=True))))
    J = torch.stack(rows)
    sets = [case.y] if case.labels_of is None else case.labels_of(u)
    second = jacrev(grad(value))
    H = sum(second(u.detach(), y).reshape(len(J), len(J)) for y in sets) / len(sets)
    return J.T @ H @ J


def parts(name: str, reduction: str) -> tuple[Case, Body, nn.Module, Tensor, Any]:
    case = CASES[name]
    body = randomised(Body(case.out, case.positions))
    model = nn.Sequential(body, Tail(case.tail))
    x = normal(N, 4, 4) if case.positions else normal(N, 4)
    return case, body, model, x, case.loss(reduction=reduction)


@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_the_gauss_newton_matrix_is_torchs(name: str, reduction: str) -> None:
    """Both truths, of every layer; a mean over what is kept has the scale of the whole batch."""
    case, body, model, x, loss = parts(name, reduction)
    data = (x, case.y)
    exact = fl.exact_fisher(model, loss, data)
    captured = fl.estimate(fl.Exact(), model, loss, data)
    comparison = fl.compare(model, loss, data, [fl.KFAC(), fl.EKFAC()], progress=False)
    assert all(row.checked < 1e-10 for row in comparison.rows)
    for layer, module in (("0.first", body.first), ("0.last", body.last)):
        expected = gauss_newton(case, body, x, loss, module)
        assert_same(exact[layer].dense(), expected, 1e-10)
        assert_same(captured[layer].dense(), expected, 1e-10)


@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_the_empirical_fisher_is_of_the_losses_own_gradients(name: str, reduction: str) -> None:
    """The gradient of each example in the loss of the whole batch, smoothing and weights
    included.
    """
    case, body, model, x, loss = parts(name, reduction)
    found = fl.estimate(fl.Exact(), model, loss, (x, case.y), fisher="empirical")["0.last"]
    rows = []
    for n in range(N):
        z = model(x)
        # the other examples as numbers: what is left is the gradient of example n
        alone = torch.cat([z[:n].detach(), z[n : n + 1], z[n + 1 :].detach()])
        value = as_likelihood(loss).loss(alone, case.y)
        grads = torch.autograd.grad(value, tuple(body.last.parameters()))
        rows.append(torch.cat([grads[0].flatten(1), grads[1][:, None]], 1).flatten())
    G = torch.stack(rows)
    scale = 1 if reduction == "sum" else N  # of the mean loss an example has 1 / N
    assert_same(found.dense(), scale * G.T @ G, 1e-10)


SAMPLED = [name for name in CASES if name.startswith(("BCE", "Poisson", "Gaussian", "NLL", "KL"))]


@pytest.mark.parametrize("name", [*SAMPLED, "CE weights, ignored, smoothing"])
def test_sampled_labels_average_to_the_closed_form(name: str) -> None:
    """The mean over many draws of the Monte-Carlo factors comes near the closed form."""
    case, _, model, x, loss = parts(name, "mean")
    likelihood = as_likelihood(loss).of_batch(case.y)
    with torch.no_grad():
        z = model(x)
    many = z.repeat(8000, *[1] * (z.ndim - 1))
    y = case.y.repeat(8000, *[1] * (case.y.ndim - 1))
    drawn = likelihood.sample(many, generator(7))
    S = labels_of("mc").factors(likelihood, many, drawn, y)[0].flatten(1)
    F = labels_of("true").factors(likelihood, z, None, case.y).flatten(2)
    for n in range(N):
        mine = S[n::N]
        assert_same(mine.T @ mine / len(mine), F[:, n].T @ F[:, n], 0.08)


@pytest.mark.parametrize(
    "loss",
    [nn.HuberLoss(delta=0.8), nn.SmoothL1Loss(beta=0.5), nn.HuberLoss(delta=2.0, reduction="sum")],
)
def test_huber_by_quadrature(loss: Any) -> None:
    """Its density by torch's own loss: the expectation of the second derivative, by integration."""
    r = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    elementwise = type(loss)(reduction="none", **parameter_of(loss))
    density = (-elementwise(r, torch.zeros_like(r))).exp()
    density = density / density.sum()
    middle = r.abs() < threshold(loss)
    curvature = 1 / (loss.beta if isinstance(loss, nn.SmoothL1Loss) else 1.0)
    expected = float(density[middle].sum()) * curvature
    likelihood = as_likelihood(loss)
    z = normal(2, 3)
    S = likelihood.factor(z)
    kappa = 1 if loss.reduction == "sum" else 1 / 3
    assert likelihood.kappa(z) == pytest.approx(kappa)
    assert_same(torch.einsum("rnk,rnl->nkl", S, S)[0], expected * torch.eye(3).double(), 1e-3)
    # the density itself, and draws from it
    many = torch.zeros(200_000, 1, dtype=torch.float64)
    drawn = likelihood.sample(many, generator(3))[:, 0]
    assert float(drawn.square().mean()) == pytest.approx(float((density * r**2).sum()), rel=0.03)
    inside = float((drawn.abs() < threshold(loss)).double().mean())
    assert inside == pytest.approx(float(density[middle].sum()), abs=0.01)
    log_prob = likelihood.log_prob(torch.zeros_like(r)[:, None], r[:, None])
    assert float(log_prob.exp().sum() * (r[1] - r[0])) == pytest.approx(1, abs=1e-6)
    y = normal(2, 3, seed=5)
    ratio = float(likelihood.loss(z, y) - likelihood.loss(y, y))
    count = 1 if loss.reduction == "sum" else z.numel()
    difference = float((likelihood.log_prob(y, y) - likelihood.log_prob(z, y)).sum())
    assert ratio == pytest.approx(difference / count)


def parameter_of(loss: Any) -> dict[str, float]:
    return {"beta": loss.beta} if isinstance(loss, nn.SmoothL1Loss) else {"delta": loss.delta}


def threshold(loss: Any) -> float:
    return next(iter(parameter_of(loss).values()))


def test_a_saturated_sigmoid_is_finite() -> None:
    """Probabilities of exactly 0 and 1 have no curvature behind their sigmoid, and no NaN."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    x = torch.tensor([[1e4], [-1e4], [0.1]], dtype=torch.float64)
    F = fl.exact_fisher(model, nn.BCELoss(), (x, torch.ones(3, 1).double()))["0"].dense()
    assert bool(torch.isfinite(F).all())
    alone = fl.exact_fisher(model, nn.BCELoss(), (x[2:], torch.ones(1, 1).double()))["0"].dense()
    assert_same(3 * F, alone, 1e-10)


def test_batches_of_a_mean_have_their_own_scale_whatever_the_memory() -> None:
    """The scale of a batch is of all its labels, also where it is captured in pieces."""
    case, body, model, x, loss = parts("CE ignored", "mean")
    batches = list(zip(x.split([3, 2]), case.y.split([3, 2]), strict=True))
    expected = torch.zeros(())
    for part, y in batches:
        own = Case(case.loss, y, positions=True)
        expected = expected + len(part) / N * gauss_newton(own, body, part, loss, body.last)
    assert_same(fl.exact_fisher(model, loss, batches)["0.last"].dense(), expected, 1e-10)
    source = Source(Setup(model, loss, batches))
    source.chunk = 1
    source._chunk = lambda names: 1  # type: ignore[method-assign]
    total = torch.zeros(())
    for stats in source.sweep(["0.last"]):
        U = stats["0.last"]
        P = torch.einsum("rntqo,ntqi->rnqoi", U.g, U.a).flatten(2).flatten(0, 1)
        total = total + P.T @ P
    assert_same(total / N, expected, 1e-10)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=W),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.BCEWithLogitsLoss(pos_weight=W),
    ],
)
def test_damped_measures_know_the_gradient_of_the_loss(loss: Any) -> None:
    """The gradient that damped steps are measured on is the one that autograd finds."""
    model = randomised(nn.Sequential(nn.Linear(4, 3)))
    x = normal(N, 4)
    y = zeros_and_ones(N, 3) if isinstance(loss, nn.BCEWithLogitsLoss) else indices(N)
    comparison = fl.compare(model, loss, (x, y), [fl.KFAC()], errors="all", progress=False)
    assert all(math.isfinite(row.value) for row in comparison.rows if row.value is not None)
    gradient = Source(Setup(model, loss, (x, y))).gradients()["0"]
    grads = torch.autograd.grad(loss(model(x), y), tuple(model.parameters()))
    expected = torch.cat([grads[0], grads[1][:, None]], 1)
    assert_same(gradient.abs(), expected.abs(), 1e-10)


REFUSED = [
    (nn.L1Loss(), "no curvature"),
    (nn.SmoothL1Loss(beta=0.0), "no curvature"),
    (nn.HingeEmbeddingLoss(), "HingeEmbeddingLoss"),
    (nn.BCELoss(weight=torch.ones(3)), "weight set"),
    (nn.BCEWithLogitsLoss(weight=torch.ones(3)), "weight set"),
    (nn.BCEWithLogitsLoss(pos_weight=-torch.ones(3)), "negative pos_weight"),
    (nn.CrossEntropyLoss(weight=-torch.ones(3)), "negative class weights"),
    (nn.MSELoss(reduction="none"), "reduction='none'"),
    (nn.KLDivLoss(reduction="none"), '"batchmean" or "mean" or "sum"'),
]


@pytest.mark.parametrize(("loss", "why"), REFUSED)
def test_every_refusal_of_a_loss_says_how_to_write_a_likelihood(loss: Any, why: str) -> None:
    """The sentence names the reason and the way out."""
    with pytest.raises((ValueError, TypeError), match=why) as caught:
        as_likelihood(loss)
    assert "write a Likelihood of your own" in str(caught.value)
    assert "factor, sample and log_prob" in str(caught.value)


LINEAR = nn.Linear(4, 3).double()
WRONG = [
    (LINEAR, nn.NLLLoss(), indices(N), r"end the model with LogSoftmax\(dim=1\)"),
    (LINEAR, nn.KLDivLoss(), probabilities(N, 3), r"end the model with LogSoftmax\(dim=-1\)"),
    (LINEAR, nn.BCELoss(), zeros_and_ones(N, 3), "end the model with a sigmoid"),
    (LINEAR, nn.PoissonNLLLoss(log_input=False), indices(N, 3).double(), "softplus or exp"),
    (LINEAR, nn.PoissonNLLLoss(), -indices(N, 3).double() - 1, "expected counts >= 0"),
    (LINEAR, nn.GaussianNLLLoss(), normal(N, 3), r"stack them in dimension 1"),
    (randomised(nn.Linear(4, 2)), nn.GaussianNLLLoss(), normal(N), "variances down to"),
    (LINEAR, nn.CrossEntropyLoss(ignore_index=1), torch.ones(N).long(), "keeps none of the 5"),
]


@pytest.mark.parametrize(("model", "loss", "y", "why"), WRONG)
@pytest.mark.parametrize("ask", [fl.exact_fisher, fl.compare])
def test_outputs_and_labels_that_do_not_fit_get_a_sentence(
    model: Any, loss: Any, y: Tensor, why: str, ask: Any
) -> None:
    """What the loss cannot read is refused with the cure."""
    with pytest.raises((ValueError, TypeError), match=why):
        ask(model, loss, (normal(N, 4), y))


def test_two_outputs_as_a_tuple_are_told_to_be_stacked() -> None:
    """A model that returns mean and variance is measured with output=."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.raw = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), softplus(self.raw(x)) + 0.1

    model, data = Two().double(), (normal(N, 4), normal(N, 2))
    with pytest.raises(TypeError, match=r"output=lambda z: torch\.stack\(z, 1\)"):
        fl.compare(model, nn.GaussianNLLLoss(), data)
    found = fl.compare(
        model, nn.GaussianNLLLoss(), data, [fl.KFAC()], output=lambda z: torch.stack(z, 1)
    )
    assert {"mean", "raw"} <= {row.layer for row in found.rows}


def test_classes_in_the_last_dimension_are_told_the_cure() -> None:
    """`[N, L, C]` logits with CrossEntropyLoss."""
    x, y = normal(N, 6, 4), indices(N, 6)
    with pytest.raises(ValueError, match=r"use Categorical\(\) or put classes second"):
        fl.compare(LINEAR, nn.CrossEntropyLoss(), (x, y))
    assert fl.compare(LINEAR, fl.Categorical(), (x, y), [fl.KFAC()]).rows
