"""Outputs with positions, torch's reductions, ignored labels and class weights: right scale, or
refused.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab._passes.labels import labels_of, output_factors
from fisher_lab.likelihoods import as_likelihood
from tests.helpers import assert_same
from tests.layers.oracle import generator, naive_block, normal, randomised, weight_and_bias

N = 5


class Transposed(nn.Module):
    """`[N, L, C]` as torch's `[N, C, L]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def sequence_model(last: bool) -> nn.Module:
    """`[N, 4, 3]` -> `[N, 4, 3]`, or torch's `[N, 3, 4]`; positions are mixed on the way."""
    mixing = [Transposed(), nn.Linear(4, 4), nn.Tanh(), Transposed()]
    tail = [] if last else [Transposed()]
    return randomised(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), *mixing, nn.Linear(3, 3), *tail))


def image_model() -> nn.Module:
    """`[N, 1, 4, 3]` -> `[N, 3, 2, 3]`."""
    return randomised(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, (3, 1)))
    )


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(0, classes, shape, generator=generator(1))


CASES = {
    "CE [N, C, L]": (lambda: sequence_model(False), (4, 3), nn.CrossEntropyLoss, labels(N, 4)),
    "CE [N, C, H, W]": (image_model, (1, 4, 3), nn.CrossEntropyLoss, labels(N, 2, 3)),
    "MSE [N, L, C]": (lambda: sequence_model(True), (4, 3), nn.MSELoss, normal(N, 4, 3, seed=3)),
    "MSE [N, C, H, W]": (image_model, (1, 4, 3), nn.MSELoss, normal(N, 3, 2, 3, seed=3)),
    "BCE [N, L, C]": (
        lambda: sequence_model(True),
        (4, 3),
        nn.BCEWithLogitsLoss,
        labels(N, 4, 3, classes=2).double(),
    ),
    "BCE [N, C, H, W]": (
        image_model,
        (1, 4, 3),
        nn.BCEWithLogitsLoss,
        labels(N, 3, 2, 3, classes=2).double(),
    ),
}


def check(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module) -> None:
    """Both truths are the Gauss-Newton matrix of the loss over the whole batch, as torch reduces
    it.
    """
    for name in ("0", "2", "6"):
        if name not in dict(model.named_modules()) or not hasattr(
            model.get_submodule(name), "weight"
        ):
            continue
        module = model.get_submodule(name)
        expected = naive_block(
            model,
            dict(module.named_parameters()),
            weight_and_bias(module),
            x,
            lambda z, n: loss(z, y[n : n + 1]),
        )
        expected = expected * (len(x) if loss.reduction == "sum" else 1)
        for batches in ((x, y), list(zip(x.split([3, 2]), y.split([3, 2]), strict=True))):
            assert_same(
                fl.estimate(fl.Exact(), model, loss, batches)[name].dense(), expected, 1e-10
            )
        assert_same(fl.exact_fisher(model, loss, (x, y))[name].dense(), expected, 1e-10)
    comparison = fl.compare(model, loss, (x, y), [fl.KFAC()], errors=["trace"])
    assert all(row.checked < 1e-10 for row in comparison.rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_torch_reductions(name: str, reduction: str) -> None:
    """Per-position losses have torch's scale, mean and sum."""
    make, shape, kind, y = CASES[name]
    check(make(), normal(N, *shape), y, kind(reduction=reduction))


@pytest.mark.parametrize("name", ["CE [N, C, L]", "CE [N, C, H, W]"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_labels_under_a_sum(name: str, weighted: bool) -> None:
    """ignore_index, with class weights too, is exactly the loss: ignored positions contribute
    nothing.
    """
    make, shape, kind, y = CASES[name]
    y = torch.where(torch.rand(y.shape, generator=generator(2)) < 0.4, -100, y)
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64) if weighted else None
    check(make(), normal(N, *shape), y, kind(reduction="sum", weight=weight))
    check(
        make(),
        normal(N, *shape),
        torch.where(y == -100, 1, y),
        kind(reduction="sum", ignore_index=1),
    )


def test_class_weights_without_positions() -> None:
    """Class weights under a sum are the loss's own Gauss-Newton matrix."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    loss = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([0.5, 2.0, 1.0]).double())
    check(model, normal(N, 3), labels(N), loss)


def test_sampled_labels_stay_ignored() -> None:
    """ "mc" samples labels, but not where the data's label is ignored; both truths draw the same
    ones.
    """
    make, shape, kind, y = CASES["CE [N, C, L]"]
    model, x, loss = make(), normal(N, *shape), kind(reduction="sum")
    everything = torch.full_like(y, -100)
    zero = fl.estimate(fl.Exact(), model, loss, (x, everything), fisher="mc")["0"]
    assert float(zero.trace()) == 0
    half = y.clone()
    half[:, :2] = -100
    found = fl.estimate(fl.Exact(), model, loss, (x, half), fisher="mc", seed=1)["0"]
    assert_same(
        found.dense(),
        fl.exact_fisher(model, loss, (x, half), fisher="mc", seed=1)["0"].dense(),
        1e-10,
    )
    assert (
        0
        < float(found.trace())
        < float(fl.estimate(fl.Exact(), model, loss, (x, y), fisher="mc", seed=1)["0"].trace())
    )


def test_sampled_labels_average_to_the_closed_form_with_ignored_labels() -> None:
    """The mean over many seeds of the Monte-Carlo trace comes near the true one."""
    make, shape, kind, y = CASES["CE [N, C, L]"]
    model, x, loss = make(), normal(N, *shape), kind(reduction="sum")
    y = torch.where(torch.rand(y.shape, generator=generator(2)) < 0.4, -100, y)
    true = float(fl.estimate(fl.Exact(), model, loss, (x, y), layers=["6"])["6"].trace())
    draws = [
        float(
            fl.estimate(fl.Exact(), model, loss, (x, y), layers=["6"], fisher="mc", seed=seed)[
                "6"
            ].trace()
        )
        for seed in range(150)
    ]
    assert sum(draws) / len(draws) == pytest.approx(true, rel=0.12)


def test_empirical_with_ignored_labels_and_weights() -> None:
    """The empirical Fisher is that of the gradients of the loss itself."""
    make, shape, kind, y = CASES["CE [N, C, L]"]
    y = torch.where(torch.rand(y.shape, generator=generator(2)) < 0.4, -100, y)
    loss = kind(reduction="sum", weight=torch.tensor([0.5, 2.0, 1.0]).double())
    model, x = make(), normal(N, *shape)
    F = torch.zeros(())
    for n in range(N):
        g = torch.autograd.grad(
            loss(model(x[n : n + 1]), y[n : n + 1]), (model[0].weight, model[0].bias)
        )
        u = torch.cat([g[0], g[1][:, None]], 1).flatten()
        F = F + torch.outer(u, u)
    found = fl.estimate(fl.Exact(), model, loss, (x, y), fisher="empirical")["0"]
    assert_same(found.dense(), F, 1e-10)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.CrossEntropyLoss(reduction="sum", weight=-torch.ones(3)), "weights >= 0"),
        (lambda: nn.BCEWithLogitsLoss(weight=torch.ones(3)), "weight"),
        (lambda: nn.CrossEntropyLoss(reduction="none"), "reduction='none'"),
        (lambda: nn.NLLLoss(), "expected log-probabilities"),
    ],
)
def test_losses_that_are_refused(make, match: str) -> None:
    """What is not a likelihood per example is refused with the cure."""
    with pytest.raises((ValueError, TypeError), match=match):
        fl.compare(nn.Linear(3, 3), make(), (normal(2, 3), labels(2)))


def test_class_weights_need_the_labels() -> None:
    """Without labels nobody knows an example's weight."""
    loss = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([0.5, 2.0, 1.0]))
    for kind in ("true", "mc"):
        with pytest.raises(ValueError, match="labels tell the weight"):
            fl.estimate(fl.Exact(), nn.Linear(3, 3), loss, normal(2, 3), fisher=kind)


def test_positions_without_labels_are_refused() -> None:
    """Whether [N, A, B] has its classes in A or B is a guess, which an explicit likelihood ends."""
    model, x = sequence_model(True), normal(N, 4, 3)
    with pytest.raises(ValueError, match="guess"):
        fl.compare(model, nn.CrossEntropyLoss(), x)
    block = fl.estimate(fl.Exact(), model, fl.Categorical(dim=-1), x)["0"]
    transposed = fl.estimate(fl.Exact(), sequence_model(False), fl.Categorical(dim=1), x)["0"]
    assert_same(block.dense(), transposed.dense(), 1e-10)


def test_label_smoothing_leaves_the_true_fisher() -> None:
    """Smoothing the labels does not change the Hessian."""
    model, data = randomised(nn.Sequential(nn.Linear(3, 3))), (normal(N, 3), labels(N))
    plain, smooth = (
        fl.exact_fisher(model, nn.CrossEntropyLoss(label_smoothing=s), data)["0"]
        for s in (0.0, 0.2)
    )
    assert_same(smooth.dense(), plain.dense(), 1e-12)


@pytest.mark.parametrize("fisher", ["true", "mc", "empirical"])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_class_probabilities_that_do_not_sum_to_one(fisher: Any, shape: tuple[int, ...]) -> None:
    """The Hessian of -sum(y log p) is sum(y) (diag p - p p^T), whatever the labels sum to
    (multi-hot labels).
    """
    z = normal(3, *shape, seed=1)
    y = (normal(3, *shape, seed=2) > 0).double() + 0.25
    loss = nn.CrossEntropyLoss()
    likelihood = as_likelihood(loss)
    kind = labels_of(fisher)
    if fisher == "mc":  # the mean over many labels drawn
        many = [output_factors(likelihood, z, kind, y, generator(seed)) for seed in range(4000)]
        found = sum(outer_of(S) for S in many) / len(many)
    else:
        found = outer_of(output_factors(likelihood, z, kind, y))
    for n in range(3):
        if fisher == "empirical":
            out = z[n : n + 1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(out, y[n : n + 1]), out)
            expected = torch.outer(gradient.flatten(), gradient.flatten())
        else:
            H = torch.autograd.functional.hessian(
                lambda out, n=n: loss(out, y[n : n + 1]), z[n : n + 1]
            )
            expected = H.reshape(math.prod(shape), -1)
        assert_same(found[n], expected, 0.1 if fisher == "mc" else 1e-12)


def outer_of(S: Tensor) -> Tensor:
    """sum_r S_r S_r^T of every example `[N, K, K]` for S `[R, N, *output]`."""
    flat = S.flatten(2)
    return torch.einsum("rnk,rnl->nkl", flat, flat)
