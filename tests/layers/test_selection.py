"""Which modules are layers: names, unknown classes, subclasses, frozen, shared and lazy
parameters.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fisher_lab as fl
from fisher_lab.layers import (
    ConvLayer,
    EmbeddingBagLayer,
    EmbeddingLayer,
    GradientForm,
    LinearLayer,
    registry,
    select,
)
from tests.helpers import assert_same
from tests.layers.cases import Bare
from tests.layers.oracle import flattened, naive_block, normal, randomised


class Doubled(nn.Linear):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shouting(nn.Conv1d):
    """A subclass whose forward is inherited but calls what is not."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class Plain(nn.Linear):
    """A subclass that only constructs differently."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class Scale(nn.Module):
    """A leaf of a class that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def with_inside(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Linear(4, 2))


@pytest.mark.parametrize("layer", [Doubled(4, 4), Scale(4)], ids=lambda m: type(m).__name__)
def test_small_modules_of_unknown_types_are_measured_over_their_parameters(
    layer: nn.Module,
) -> None:
    """The gradient form needs no knowledge of the module; the result says that there was no
    adapter.
    """
    model, x = randomised(with_inside(layer)), normal(5, 3)
    comparison = fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["frobenius"])
    about = comparison.settings["layers"]["2"]
    assert about["form"] == "gradient"
    assert type(layer).__name__ in about["unknown"]
    assert comparison.value("2", "KFAC", "frobenius") < 1e-7
    expected = naive_block(
        model, dict(model[2].named_parameters()), flattened, x, lambda z, n: 0.5 * z.square().sum()
    )
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["2"].dense(), expected, 1e-10)


def test_large_modules_of_unknown_types_are_refused() -> None:
    """The error names the one module, its size and the cure, in one line."""
    with pytest.raises(
        ValueError, match=r"Layer '0' \(.*Scale\) has 5,000 parameters and no adapter"
    ) as e:
        select(nn.Sequential(Scale(5000), nn.Linear(5000, 2)))
    assert "layers=[...]" in str(e.value)
    assert 'on_unknown="skip"' in str(e.value)
    assert "types = (Scale,)" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "layer", [Shouting(4, 4, 1), Doubled(4, 4)], ids=lambda m: type(m).__name__
)
def test_subclasses_that_behave_otherwise_are_unknown(layer: nn.Module) -> None:
    """Overriding forward, or what forward calls, makes a class unknown."""
    found = select(nn.Sequential(layer)).layers["0"]
    assert isinstance(found, GradientForm)
    assert found.unknown


def test_subclasses_that_only_construct_differently_are_known() -> None:
    """A subclass with the behaviour of a known type is that type."""
    assert isinstance(select(Plain(3)).layers[""], LinearLayer)


def test_a_forward_replaced_on_the_instance_is_unknown() -> None:
    """`module.forward = ...` is another forward too."""
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a forward of its own"):
        select(nn.Sequential(layer))


def test_skip_leaves_out_and_says_so() -> None:
    """on_unknown="skip" measures the others, and the Comparison says what was left out and why."""
    x = normal(5, 3)
    comparison = fl.compare(
        with_inside(Scale(4)), fl.Gaussian(), x, [fl.KFAC()], on_unknown="skip", errors=["trace"]
    )
    assert list(comparison.settings["layers"]) == ["0", "3"]
    assert "Scale" in comparison.settings["left_out"]["2"]
    with pytest.raises(ValueError, match="on_unknown"):
        select(nn.Linear(2, 2), on_unknown="ignore")  # type: ignore[arg-type]


def test_a_layer_type_of_ones_own_in_one_line() -> None:
    """The cure that the error names works: a subclass of GradientForm with the type,
    nothing else.
    """
    from fisher_lab.layers.base import Layer

    try:
        type("ScaleLayer", (GradientForm,), {"types": (Scale,)})
        model, x = randomised(with_inside(Scale(4))), normal(5, 3)
        found = fl.estimate(fl.KFAC(), model, fl.Gaussian(), x)["2"]
        assert_same(
            found.dense(),
            fl.exact_fisher(model, fl.Gaussian(), x, layers=["2"])["2"].dense(),
            1e-10,
        )
        assert Scale in registry()
    finally:
        Layer._registry.pop(Scale, None)


def test_exact_fisher_takes_any_module() -> None:
    """The torch.func truth needs no adapter: an unknown module's block is over its flattened
    parameters.
    """
    model, x = randomised(with_inside(Doubled(4, 4))), normal(4, 3)
    exact = fl.exact_fisher(model, fl.Gaussian(), x)
    assert tuple(exact["2"].shape) == (20, 1)
    expected = naive_block(
        model, dict(model[2].named_parameters()), flattened, x, lambda z, n: 0.5 * z.square().sum()
    )
    assert_same(exact["2"].dense(), expected, 1e-10)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 2), nn.LazyBatchNorm1d()])
def test_lazy_modules_are_recognised(lazy: nn.Module) -> None:
    """Uninitialised parameters are refused with the cure, whatever on_unknown is for other
    reasons.
    """
    with pytest.raises(ValueError, match=r"uninitialised parameters.*run one batch"):
        select(nn.Sequential(lazy))
    with pytest.raises(ValueError, match="uninitialised"):
        select(nn.Sequential(lazy), on_unknown="flatten")


def test_a_lazy_module_after_its_first_batch_is_known() -> None:
    """It has become its ordinary class."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyConv1d(2, 1))
    model(torch.zeros(2, 5, 4))
    assert [type(layer) for layer in select(model).layers.values()] == [LinearLayer, ConvLayer]


def test_frozen_parameters_are_left_out_and_listed() -> None:
    """A frozen weight or bias leaves the block, a frozen module has none; the result says so."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    selection = select(model)
    assert {name: layer.shape for name, layer in selection.layers.items()} == {
        "0": (4, 1),
        "4": (2, 4),
    }
    assert "0.weight" in selection.left_out
    comparison = fl.compare(
        model, fl.Gaussian(), normal(4, 3), [fl.KFAC(), fl.TN()], errors=["trace"]
    )
    assert "frozen" in comparison.settings["left_out"]["0.weight"]
    assert "frozen" in comparison.settings["left_out"]["2.weight"]


def test_nothing_trainable_is_refused() -> None:
    """A frozen model and unknown layer names are refused."""
    with pytest.raises(ValueError, match="no trainable parameters"):
        select(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="expected one of '0'"):
        select(nn.Sequential(nn.Linear(2, 2)), ["1"])


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_are_refused(options: dict) -> None:
    """An option under which an example has no gradient of its own is refused with the option in the
    sentence.
    """
    with pytest.raises(ValueError, match=next(iter(options))):
        select(nn.Sequential(nn.Embedding(4, 3, **options)))


@pytest.mark.parametrize(
    "model", [nn.Embedding(20_000, 2), nn.Sequential(nn.ConvTranspose1d(100, 100, 3))]
)
def test_too_large_for_the_budget(model: nn.Module) -> None:
    """A vocabulary or a gradient-form block above the memory budget is refused with its size and
    the cure.
    """
    x = (
        torch.zeros(1, 3, dtype=torch.long)
        if isinstance(model, nn.Embedding)
        else torch.zeros(1, 100, 2)
    )
    with pytest.raises(
        ValueError, match=r"needs .* GB, expected at most .*layers=\[\.\.\.\] or raise memory="
    ):
        fl.compare(model, fl.Gaussian(), x, memory=0.5)


def test_parametrised_unknown_classes_stay_unknown() -> None:
    """A parametrisation of a class nobody knows is not taken for its base."""
    layer = parametrizations.weight_norm(Doubled(3, 3))
    assert select(nn.Sequential(layer)).layers["0"].unknown
    assert (
        "Doubled" in select(nn.Sequential(layer, nn.Linear(3, 2)), on_unknown="skip").left_out["0"]
    )


def test_parametrised_modules_are_one_block() -> None:
    """All parameters behind a module's parametrisations, a parametrisation's own too, belong to its
    block.
    """

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)

        def forward(self, W: Tensor) -> Tensor:
            return W + self.inner.weight

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Shift())
    model = randomised(nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2)))
    selection = select(model)
    assert {name: found.shape for name, found in selection.layers.items()} == {
        "0": (21, 1),
        "2": (2, 4),
    }
    x = normal(5, 3)
    expected = naive_block(
        model, dict(model[0].named_parameters()), flattened, x, lambda z, n: 0.5 * z.square().sum()
    )
    assert_same(fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["0"].dense(), expected, 1e-10)


def test_parameter_lists() -> None:
    """A ParameterList or ParameterDict is a container of bare parameters."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(3), torch.ones(())])
            self.named = nn.ParameterDict({"shift": torch.ones(3)})
            self.out = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x * self.scales[0] + self.named["shift"]).tanh()) * self.scales[1]

    model, x = randomised(Model()), normal(5, 3)
    comparison = fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["frobenius"])
    assert comparison.settings["layers"]["scales"]["parameters"] == ["scales.0", "scales.1"]
    assert comparison.value("named", "KFAC", "frobenius") < 1e-7


def test_adapters_by_type() -> None:
    """The registry names an adapter for every type promised."""
    known = registry()
    assert known[nn.Linear] is LinearLayer
    assert known[nn.Embedding] is EmbeddingLayer
    assert {known[kind] for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)} == {ConvLayer}
    assert known[nn.EmbeddingBag] is EmbeddingBagLayer
    assert known[nn.LSTMCell] is GradientForm
    assert (
        known[nn.LayerNorm]
        is known[nn.MultiheadAttention]
        is known[nn.ConvTranspose2d]
        is GradientForm
    )


def test_the_model_is_not_changed() -> None:
    """Nothing measured here leaves a trace: parameters, flags, hooks, modes, global switches."""
    model = randomised(nn.Sequential(Bare(), nn.Linear(3, 4), nn.LayerNorm(4)))
    before = copy.deepcopy(model.state_dict())
    fast = torch.backends.mha.get_fastpath_enabled()
    fl.compare(model, fl.Gaussian(), normal(3, 3), [fl.KFAC()], errors=["trace"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast
