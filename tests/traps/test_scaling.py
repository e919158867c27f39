"""What other curvature libraries were found to get wrong: scales and positions. One test per trap,
named after it.

Expected blocks come from loops over plain autograd (tests/layers/oracle.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from tests.helpers import assert_differs, assert_same
from tests.layers.oracle import normal, randomised
from tests.traps.support import SCALES, Lambda, block, expected, labels_for, mlp


@pytest.mark.parametrize("kind", SCALES)
def test_01_mean_loss_divides_by_n_once(kind: str) -> None:
    """The same examples k times over are the same Fisher; the scale is that of the mean loss."""
    loss, x = SCALES[kind](), normal(4, 4)
    y = labels_for(loss, 4, 3)
    once = block(mlp(), loss, (x, y), "0")
    assert_same(block(mlp(), loss, (x.repeat(3, 1), torch.cat([y] * 3)), "0"), once, 1e-10)
    assert_same(once, expected(mlp(), loss, x, y, "0"), 1e-10)


@pytest.mark.parametrize("kind", SCALES)
def test_02_positions_of_the_output_not_of_the_layer(kind: str) -> None:
    """In a U-Net a layer has other positions than the loss; "mean" is "sum" over N and the output's
    own terms.
    """
    model = randomised(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(3, 3, 1),
        )
    )
    x, y = normal(3, 2, 4, 4), labels_for(SCALES[kind](), 3, 3, 4, 4)
    terms = 3 * 4 * 4 * (1 if kind == "CrossEntropyLoss" else 3)
    for approximation in (fl.Exact(), fl.KFAC(), fl.KFAC("reduce")):
        mean, total = (
            fl.estimate(approximation, model, SCALES[kind](reduction=reduction), (x, y))[
                "0"
            ].dense()
            for reduction in ("mean", "sum")
        )
        assert_same(mean, total / terms, 1e-10)
    assert_same(
        block(model, SCALES[kind](), (x, y), "0"), expected(model, SCALES[kind](), x, y, "0"), 1e-10
    )


@pytest.mark.parametrize("kind", SCALES)
def test_03_and_04_sampled_fisher_has_the_scale_of_the_true_one(kind: str) -> None:
    """For mean losses with positions too, the mean over sampled labels comes near the
    closed form.
    """
    model = randomised(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1)))
    loss, x = SCALES[kind](), normal(60, 2, 4)
    y = labels_for(loss, 60, 3, 3)
    true = float(block(model, loss, (x, y), "2").trace())
    draws = [
        float(block(model, loss, (x, y), "2", fisher="mc", seed=seed).trace()) for seed in range(30)
    ]
    assert sum(draws) / len(draws) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("spatial", ["expand", "reduce"])
def test_05_linear_on_a_sequence_is_a_pointwise_convolution(spatial: str) -> None:
    """KFAC of a Linear at 5 positions equals KFAC of the 1x1 convolution with its weights."""
    linear, conv = nn.Linear(3, 4), nn.Conv1d(3, 4, 1)
    pool = Lambda(lambda x: x.tanh().square().mean(1))
    swap = Lambda(lambda x: x.transpose(1, 2))
    model = randomised(nn.Sequential(linear, pool, nn.Linear(4, 2)))
    with torch.no_grad():
        conv.double().weight.copy_(linear.weight.unsqueeze(-1))
        conv.bias.copy_(linear.bias)
    twin = nn.Sequential(nn.Sequential(swap, conv, swap), *model[1:])
    x = normal(6, 5, 3)
    one = fl.estimate(fl.KFAC(spatial), model, fl.Gaussian(), x)["0"]
    other = fl.estimate(fl.KFAC(spatial), twin, fl.Gaussian(), x)["0.1"]
    assert_same(one.dense(), other.dense(), 1e-10)


def test_06_and_07_kfc_normalisation() -> None:
    """Expand divides once by the positions; it is right where positions do not interact in a deep
    linear network.
    """
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 1)))
    x = normal(5, 2, 4, 4)
    found = fl.estimate(fl.KFAC(), model, fl.Gaussian(), x)
    truth = fl.exact_fisher(model, fl.Gaussian(), x)
    for layer in truth:
        assert_same(found[layer].dense(), truth[layer].dense(), 1e-10)


def test_08_stride_counts_in_the_positions() -> None:
    """The number of positions is that of the output."""
    from fisher_lab.layers import select
    from tests.helpers import captured

    model = randomised(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=(2, 3), padding=1), nn.Flatten(), nn.Linear(2 * 3 * 3, 2)
        )
    )
    layers = select(model).layers
    assert captured(model, layers, fl.Gaussian(), normal(2, 1, 5, 7), "true")["0"].T == 3 * 3


def test_09_factor_two_of_squared_errors() -> None:
    """Gaussian() is half the squared error; MSELoss(sum) has Hessian 2 and an empirical Fisher 4
    times as large.
    """
    x, y, model = normal(5, 4), normal(5, 3, seed=2), mlp()
    N = len(x)
    assert_same(
        block(model, nn.MSELoss(reduction="sum"), (x, y), "0"),
        2 * N * block(model, fl.Gaussian(), x, "0"),
        1e-10,
    )
    empirical = {"fisher": "empirical"}
    ours = block(model, fl.Gaussian(), (x, y), "0", **empirical)
    assert_same(
        block(model, nn.MSELoss(reduction="sum"), (x, y), "0", **empirical), 4 * N * ours, 1e-10
    )


@pytest.mark.parametrize(
    "approximation", [fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.TN()], ids=lambda a: a.label
)
def test_10_batches_count_once(approximation) -> None:
    """Unequal batches, one of a single example, give the factors of one batch."""
    x, y = normal(8, 4), torch.arange(8) % 3
    whole = fl.estimate(approximation, mlp(), nn.CrossEntropyLoss(), (x, y))
    parts = list(zip(x.split([1, 4, 3]), y.split([1, 4, 3]), strict=True))
    for layer, matrix in fl.estimate(approximation, mlp(), nn.CrossEntropyLoss(), parts).items():
        assert_same(matrix.dense(), whole[layer].dense(), 1e-9)


def test_11_n_is_what_was_seen() -> None:
    """A loader that drops its last batch is divided by the examples it gave."""
    x, y = normal(12, 4), torch.arange(12) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True)
    assert_same(
        block(mlp(), nn.CrossEntropyLoss(), loader, "0"),
        block(mlp(), nn.CrossEntropyLoss(), (x[:10], y[:10]), "0"),
        1e-10,
    )


@pytest.mark.parametrize(
    "approximation", fl.approximations.default_approximations(), ids=lambda a: a.label
)
def test_12_damping_is_not_kept(approximation) -> None:
    """Solving twice gives the same result and leaves the matrix as it was."""
    matrix = fl.estimate(approximation, mlp(), fl.Gaussian(), normal(6, 4))["0"]
    before, V = matrix.dense().clone(), normal(5, 5)
    first, second = matrix.solve(V, damping=0.1), matrix.solve(V, damping=0.1)
    assert torch.equal(first, second)
    assert torch.equal(matrix.dense(), before)


def test_13_a_module_called_twice() -> None:
    """All uses count, in the exact block and in the traces that keep it."""
    shared = nn.Linear(4, 4)
    model = randomised(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)))
    x, y, loss = normal(6, 4), torch.arange(6) % 3, nn.CrossEntropyLoss()
    truth = expected(model, loss, x, y, "0")
    assert_same(block(model, loss, (x, y), "0"), truth, 1e-10)
    for approximation in (fl.EKFAC(), fl.TN(), fl.TKFAC("full")):
        found = fl.estimate(approximation, model, loss, (x, y))["0"]
        assert float(found.trace()) == pytest.approx(float(truth.trace()), rel=1e-10)


@pytest.mark.parametrize("pooled", [True, False])
def test_14_tokens_are_not_examples(pooled: bool) -> None:
    """A sequence is one example: the sum over its tokens comes before the outer product; 3-D
    cross-entropy works.
    """
    tail = Lambda((lambda x: x.tanh().mean(1)) if pooled else (lambda x: x.tanh().cumsum(1)))
    last = Lambda((lambda x: x) if pooled else (lambda x: x.transpose(1, 2)))
    model = randomised(nn.Sequential(nn.Linear(4, 5), tail, nn.Linear(5, 3), last))
    x, loss = normal(4, 3, 4), nn.CrossEntropyLoss()
    y = labels_for(loss, 4, 3) if pooled else labels_for(loss, 4, 3, 3)
    assert_same(block(model, loss, (x, y), "0"), expected(model, loss, x, y, "0"), 1e-10)


def test_15_and_36_every_route_gives_the_same() -> None:
    """A budget so small that examples come one at a time changes nothing, for any approximation."""
    model = randomised(
        nn.Sequential(nn.Conv1d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))
    )
    x, y = normal(7, 2, 4), torch.arange(7) % 3
    assert Source(Setup(model, nn.CrossEntropyLoss(), (x, y), memory=2e-5)).chunk < 4
    for approximation in fl.approximations.default_approximations():
        whole = fl.estimate(approximation, model, nn.CrossEntropyLoss(), (x, y))
        pieces = fl.estimate(approximation, model, nn.CrossEntropyLoss(), (x, y), memory=2e-5)
        for layer in whole:
            assert_same(pieces[layer].dense(), whole[layer].dense(), 1e-7)


def test_16_eigenvalue_correction_with_positions() -> None:
    """EKFAC sums over positions before it squares: with outputs at positions too its trace is the
    exact one.
    """
    model = randomised(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1)))
    loss, x = nn.CrossEntropyLoss(), normal(5, 2, 4)
    y = labels_for(loss, 5, 3, 3)
    for approximation in (fl.EKFAC(), fl.EKFAC("reduce"), fl.TEKFAC()):
        found = fl.estimate(approximation, model, loss, (x, y))
        assert float(found["0"].trace()) == pytest.approx(
            float(expected(model, loss, x, y, "0").trace()), rel=1e-10
        )


@pytest.mark.parametrize("pooled", [True, False])
def test_17_expand_and_reduce_in_their_settings(pooled: bool) -> None:
    """In a deep linear network expand is exact for losses per position and reduce for pooled ones,
    not the other.
    """
    layers = [nn.Linear(3, 4), nn.Linear(4, 2)] + [Lambda(lambda x: x.mean(1))] * pooled
    model, x = randomised(nn.Sequential(*layers)), normal(6, 3, 3)
    truth = fl.exact_fisher(model, fl.Gaussian(), x)
    right, wrong = ("reduce", "expand") if pooled else ("expand", "reduce")
    for layer in truth:
        assert_same(
            fl.estimate(fl.KFAC(right), model, fl.Gaussian(), x)[layer].dense(),
            truth[layer].dense(),
            1e-10,
        )
        assert_differs(
            fl.estimate(fl.KFAC(wrong), model, fl.Gaussian(), x)[layer].dense(),
            truth[layer].dense(),
        )


@pytest.mark.parametrize("fisher", ["true", "mc", "empirical"])
@pytest.mark.parametrize("batched", [False, True])
def test_20_a_pass_hands_out_statistics_of_the_loss(fisher: str, batched: bool) -> None:
    """Columns of a summed loss have its scale, also in the first pass over data of unknown size:
    nothing that is built of them needs another.
    """
    model = mlp()
    loss = nn.CrossEntropyLoss(reduction="sum")
    x = normal(7, 4)
    y = torch.arange(7) % 3
    data = (x, y)
    if batched:
        data = DataLoader(TensorDataset(x, y), batch_size=3)
    source = Source(Setup(model, loss, data, fisher=fisher))
    mean = 0.0
    for stats in source.sweep():
        P = stats["0"].gradients().flatten(2)
        mean = mean + torch.einsum("rnp,rnq->pq", P, P) / len(x)
    exact = fl.exact_fisher(model, loss, data, fisher=fisher)["0"]
    assert_same(mean, exact.dense(), 1e-10)
    captured = fl.estimate(fl.Exact(), model, loss, data, fisher=fisher)["0"]
    assert_same(captured.dense(), exact.dense(), 1e-10)
