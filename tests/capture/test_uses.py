"""Modules used several times and tied weights: one block that sums over all uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.layers import select
from tests.helpers import assert_same, dense_fisher
from tests.layers.oracle import flattened, naive_block, normal, randomised, weight_and_bias


def half_square(z: Tensor, n: int) -> Tensor:
    return 0.5 * z.square().sum()


class Reused(nn.Module):
    """One Linear at 4 positions and again at the single one of their mean; one convolution at two
    resolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(3, 3), nn.Conv1d(1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.linear(x).tanh().mean(1)).tanh()  # [N, 3]
        return self.conv(self.conv(hidden.unsqueeze(1)).sin()).flatten(1) + hidden[:, :1]


class TiedLinears(nn.Module):
    """Two modules with one weight, and biases of their own if asked for."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=bias), nn.Linear(3, 3, bias=bias)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh().mean(1)).tanh())


class TiedConvolutions(nn.Module):
    """One weight with two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, stride=2)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).flatten(1)


class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(x)).tanh())


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_module_used_twice(layer: str) -> None:
    """Uses at different numbers of positions are so many more positions; the block is right."""
    model, x = randomised(Reused()), normal(5, 4, 3)
    module = model.get_submodule(layer)
    expected = naive_block(
        model, dict(module.named_parameters()), weight_and_bias(module), x, half_square
    )
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)[layer].dense(), expected, 1e-10)
    assert_same(fl.exact_fisher(model, fl.Gaussian(), x)[layer].dense(), expected, 1e-10)
    comparison = fl.compare(model, fl.Gaussian(), x)
    assert all(row.checked < 1e-10 for row in comparison.rows)


def test_alike_tied_layers_are_positions_of_one() -> None:
    """Two Linears with one weight and no bias: one block in factor form, under the first name, said
    in the result.
    """
    model, x = randomised(TiedLinears(bias=False)), normal(5, 4, 3)
    comparison = fl.compare(model, fl.Gaussian(), x)
    assert list(comparison.settings["layers"]) == ["first", "out"]
    assert comparison.settings["layers"]["first"]["tied"] == ["first", "second"]
    assert comparison.settings["layers"]["first"]["shape"] == [3, 3]
    expected = naive_block(
        model, {"weight": model.first.weight}, weight_and_bias(model.first), x, half_square
    )
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["first"].dense(), expected, 1e-10)
    assert_same(fl.exact_fisher(model, fl.Gaussian(), x)["first"].dense(), expected, 1e-10)


def test_tied_convolutions_of_different_stride() -> None:
    """Each use is unrolled by its own module."""
    model, x = randomised(TiedConvolutions()), normal(4, 2, 7)
    expected = naive_block(
        model, dict(model.first.named_parameters()), weight_and_bias(model.first), x, half_square
    )
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["first"].dense(), expected, 1e-10)
    assert select(model).layers["first"].tied == ("first", "second")


@pytest.mark.parametrize(
    "make", [TiedEmbedding, lambda: TiedLinears(bias=True)], ids=["embedding", "own biases"]
)
def test_tied_weights_of_unlike_use(make) -> None:
    """An Embedding tied to the output layer: one block in gradient form over all their parameters,
    and right.
    """
    model = randomised(make())
    x = torch.arange(12).reshape(4, 3) % 5 if isinstance(model, TiedEmbedding) else normal(4, 2, 3)
    (name, layer), *_ = select(model).layers.items()
    parameters = {
        key: p
        for key, p in model.named_parameters()
        if key in {layer.full_name(k) for k in layer.parameters}
    }
    assert set(parameters) == (
        {"embedding.weight", "head.bias"}
        if name == "embedding"
        else {"first.weight", "first.bias", "second.bias"}
    )
    ordered = {layer.full_name(key): parameters[layer.full_name(key)] for key in layer.parameters}
    expected = naive_block(model, ordered, flattened, x, half_square)
    for found in (
        fl.estimate(fl.Exact(), model, fl.Gaussian(), x),
        fl.exact_fisher(model, fl.Gaussian(), x),
    ):
        assert_same(found[name].dense(), expected, 1e-10)
    comparison = fl.compare(model, fl.Gaussian(), x, [fl.KFAC(), fl.TN()], errors=["frobenius"])
    assert len(comparison.settings["layers"][name]["tied"]) == 2
    assert comparison.value(name, "KFAC", "frobenius") < 1e-7


def test_naming_the_second_of_tied_layers_is_refused() -> None:
    """The block covers all uses and has the first name; the error says so."""
    with pytest.raises(ValueError, match=r"write layers=\['embedding'\]"):
        select(TiedEmbedding(), ["head"])


def test_the_second_name_of_a_module_is_refused() -> None:
    """A module used twice has its first name."""
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'2' is the module '0' used again.*layers=\['0'\]"):
        select(nn.Sequential(shared, nn.Tanh(), shared), ["2"])


def test_in_place_activations() -> None:
    """The output gradient is taken where the layer returned its output, before an in-place
    activation.
    """
    kinds = [nn.ReLU(inplace=flag) for flag in (False, True)]
    torch.manual_seed(0)
    first, last, x = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), normal(5, 3)
    blocks = [
        fl.estimate(fl.Exact(), nn.Sequential(first, kind, last), fl.Gaussian(), x)["0"]
        for kind in kinds
    ]
    assert_same(blocks[1].dense(), blocks[0].dense(), 1e-12)


def test_user_hooks_do_not_mislead() -> None:
    """A user's forward hook that changes the output comes after ours."""
    model, x = randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), normal(5, 3)
    model[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    comparison = fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["trace"])
    assert all(row.checked < 1e-10 for row in comparison.rows)


def test_hooks_are_gone_after_an_exception() -> None:
    """An error in the model leaves no hook behind."""
    from fisher_lab._passes.capture import recording

    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RuntimeError), recording(select(model).layers):
        model(torch.zeros(2, 5))
    assert not model[0]._forward_hooks


def test_unused_layers_are_refused() -> None:
    """A layer outside of the forward pass has no block."""
    model = nn.Sequential(nn.Linear(3, 2))
    model.unused = nn.Identity()
    model.unused.inner = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'unused\.inner'.*not called"):
        fl.estimate(fl.Exact(), model, fl.Gaussian(), normal(4, 3))


@pytest.mark.parametrize("sizes", [[4, 2], [1, 1, 4]])
def test_unequal_batches(sizes: list[int]) -> None:
    """Unequal batches are one batch, also in gradient form."""
    model, x = (
        randomised(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))),
        normal(6, 2, 3),
    )
    whole = fl.estimate(fl.Exact(), model, fl.Gaussian(), x)
    parts = fl.estimate(fl.Exact(), model, fl.Gaussian(), [(part, None) for part in x.split(sizes)])
    for name in whole:
        assert_same(parts[name].dense(), whole[name].dense(), 1e-10)


@pytest.mark.parametrize(
    "approximation", [fl.Exact(), fl.TENGraD(), fl.KPSVD(), fl.TN(), fl.EKFAC()], ids=str
)
def test_batches_of_sequences_of_different_length(approximation) -> None:
    """Batches whose sequences have different lengths give the mean of their blocks."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().mean(1)

    model = randomised(nn.Sequential(nn.Linear(30, 20), Last(), nn.Linear(20, 2)))
    long, short = normal(4, 5, 30), normal(2, 3, 30, seed=1)
    found = fl.estimate(approximation, model, fl.Gaussian(), [(short, None), (long, None)])["0"]
    blocks = [fl.exact_fisher(model, fl.Gaussian(), x)["0"].dense() for x in (short, long)]
    exact = (2 * blocks[0] + 4 * blocks[1]) / 6
    if approximation.label in ("Exact", "TENGraD"):
        assert_same(found.dense(), exact, 1e-10)
    elif approximation.label != "KPSVD":
        assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=1e-10)


def test_a_shared_dimension_of_the_same_size_as_the_batch() -> None:
    """Positions that all examples share are not taken for the examples, even where there are as
    many.
    """

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.out = nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x + self.position(torch.arange(4))).tanh())

    model, x = randomised(Shared()), normal(4, 4, 3)
    block = fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["position"]
    parameters = dict(model.position.named_parameters())
    expected = naive_block(model, parameters, flattened, x, lambda z, n: 0.5 * z.square().sum())
    assert_same(block.dense(), expected, 1e-10)


class Behind(nn.Module):
    """Uses the weight of a layer without calling the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.linear(self.linear(x).tanh(), self.linear.weight).tanh())


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-4 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Behind(), "'linear' deviate .* in a way hooks do not see"),
        (nn.Sequential(nn.Linear(3, 3), Centred(), nn.Linear(3, 2)), "examples interact"),
        (nn.Sequential(nn.Linear(3, 3), Noisy(), nn.Linear(3, 2)), "the model is random"),
    ],
)
@pytest.mark.parametrize("measure", [fl.compare, lambda *args: fl.estimate(fl.KFAC(), *args)])
def test_what_hooks_cannot_see_is_refused(model: nn.Module, match: str, measure) -> None:
    """A weight used behind the layer's back, and models that do not act per example, are refused by
    estimate too.
    """
    for batches in (normal(5, 3), [(normal(2, 3), None), (normal(3, 3), None)]):
        with pytest.raises(ValueError, match=match):
            measure(randomised(model), fl.Gaussian(), batches)


def test_gradients_that_cancel_are_not_refused() -> None:
    """The mean of what a norm layer returns is a constant: all that arrives below is rounding."""
    tail = [nn.GroupNorm(1, 1), nn.Flatten(), nn.AvgPool1d(12), nn.Linear(1, 2)]
    for seed in range(20):
        model = randomised(nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.Tanh(), *tail), seed)
        with torch.no_grad():
            model[0].weight.mul_(0.01)  # so that the norm layer magnifies
        fl.compare(
            model, fl.Categorical(), normal(4, 1, 4, 5, seed=seed), [fl.KFAC()], errors=["trace"]
        )


def test_stats_are_those_of_the_oracle() -> None:
    """Captured statistics give the block by the naive sums too."""
    from tests.helpers import captured

    model, x = randomised(Reused()), normal(3, 4, 3)
    found = captured(model, select(model).layers, fl.Gaussian(), x, "true")
    exact = fl.exact_fisher(model, fl.Gaussian(), x)
    for name, stats in found.items():
        assert_same(dense_fisher(stats), exact[name].dense(), 1e-10)
