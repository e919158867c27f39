"""For every layer type, its options and every likelihood: captured block = torch.func block = naive
autograd block.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.layers import select
from tests.helpers import assert_same, captured, dense
from tests.layers.cases import CASES, FACTOR_FORM, GRADIENT_FORM, Case, N
from tests.layers.oracle import generator, naive_block, normal
from tests.naive import (
    naive_diagonal,
    naive_ekfac,
    naive_kfac,
    naive_kpsvd,
    naive_lngd,
    naive_mini_block,
    naive_shampoo,
    naive_tekfac,
    naive_tengrad,
    naive_tkfac,
    naive_tn,
)

# torch's note on its speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), torch.arange(N) % 3),
    "MSELoss": (nn.MSELoss(), normal(N, 3, seed=5)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), (normal(N, 3, seed=6) > 0).double()),
}


@pytest.fixture(scope="module")
def blocks() -> dict:
    """Cases by name, built once."""
    return {}


def case_of(name: str, blocks: dict) -> Case:
    if name not in blocks:
        blocks[name] = CASES[name]()
    return blocks[name]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_three_truths(name: str, loss: str, blocks: dict) -> None:
    """Hooks, torch.func and loops over plain autograd with the loss's own Hessian give the same
    block.
    """
    case, (module, y) = case_of(name, blocks), LOSSES[loss]
    captured = fl.estimate(fl.Exact(), case.model, module, (case.x, y), layers=[case.layer])[
        case.layer
    ]
    functional = fl.exact_fisher(case.model, module, (case.x, y), layers=[case.layer])[case.layer]
    expected = naive_block(
        case.model, case.parameters(), case.packed(), case.x, lambda z, n: module(z, y[n : n + 1])
    )
    assert expected.norm() > 1e-8, "the case says nothing: its block is zero"
    assert_same(captured.dense(), expected, 1e-10)
    assert_same(functional.dense(), expected, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_empirical_and_sampled(name: str, blocks: dict) -> None:
    """The two truths agree for the other kinds of Fisher, from the same seed."""
    case, (module, y) = case_of(name, blocks), LOSSES["CrossEntropyLoss"]
    for kind in ("mc", "empirical"):
        options = {"fisher": kind, "layers": [case.layer], "seed": 3}
        captured = fl.estimate(fl.Exact(), case.model, module, (case.x, y), **options)[case.layer]
        functional = fl.exact_fisher(case.model, module, (case.x, y), **options)[case.layer]
        assert_same(captured.dense(), functional.dense(), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_names_agree(name: str, blocks: dict) -> None:
    """compare, estimate and exact_fisher know the same layers with the same shapes, and compare's
    check holds.
    """
    case, (module, y) = case_of(name, blocks), LOSSES["MSELoss"]
    comparison = fl.compare(case.model, module, (case.x, y), [fl.KFAC()], errors=["trace"])
    exact = fl.exact_fisher(case.model, module, (case.x, y))
    layers = comparison.settings["layers"]
    assert list(exact) == list(layers)
    assert all(tuple(exact[layer].shape) == tuple(layers[layer]["shape"]) for layer in exact)
    assert all(row.checked <= 1e-10 for row in comparison.rows)
    assert layers[case.layer].get("form", "factors") == (
        "gradient" if name in GRADIENT_FORM else "factors"
    )


@pytest.mark.parametrize("name", CASES)
def test_pack_is_the_inverse_of_unpack(name: str, blocks: dict) -> None:
    """W -> named parameters -> W is the identity, also with leading dimensions; the names are the
    model's.
    """
    case = case_of(name, blocks)
    layer = select(case.model, [case.layer]).layers[case.layer]
    named = dict(case.model.named_parameters())
    for leading in ((), (2,), (2, 3)):
        W = normal(*leading, *layer.shape, seed=1)
        tensors = layer.unpack(W)
        assert list(tensors) == list(layer.parameters)
        for key, tensor in tensors.items():
            assert tensor.shape == (*leading, *named[layer.full_name(key)].shape)
        assert torch.equal(layer.pack(tensors), W)


NAIVE: list[tuple[str, dict, Callable[..., Tensor]]] = [
    ("KFAC", {}, naive_kfac),
    ("KFAC", {"spatial": "reduce"}, naive_kfac),
    ("EKFAC", {}, naive_ekfac),
    ("EKFAC", {"spatial": "reduce"}, naive_ekfac),
    ("TKFAC", {}, naive_tkfac),
    ("TKFAC", {"spatial": "full"}, naive_tkfac),
    ("TEKFAC", {}, naive_tekfac),
    ("TEKFAC", {"spatial": "full"}, naive_tekfac),
    ("TN", {}, naive_tn),
    ("TN", {"modes": 2}, naive_tn),
    ("TN", {"modes": 4}, naive_tn),
    ("MiniBlock", {}, naive_mini_block),
    ("MiniBlock", {"conv": "filter"}, naive_mini_block),
    ("TENGraD", {"batch": 3}, naive_tengrad),
    ("TENGraD", {"spatial": "reduce_sum"}, naive_tengrad),
    ("TENGraD", {"spatial": "reduce_mean"}, naive_tengrad),
    ("Shampoo", {}, naive_shampoo),
    ("KPSVD", {}, naive_kpsvd),
    ("Diagonal", {}, naive_diagonal),
    ("LNGD", {}, naive_lngd),
]
SHARED = [
    "Linear at positions",
    "Conv1d same",
    "Conv2d",
    "Conv2d groups and bias",
    "Conv2d depthwise",
    "Embedding",
]


@pytest.mark.parametrize(
    ("approximation", "options", "naive"),
    NAIVE,
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", SHARED)
def test_approximations_of_shared_weights(
    name: str, approximation: str, options: dict, naive: Callable[..., Tensor], blocks: dict
) -> None:
    """On captured layers with shared weights, groups included, every approximation is its naive
    dense transcription.
    """
    case = case_of(name, blocks)
    layers = select(case.model, [case.layer]).layers
    # enough examples that the factors have full rank: in a null space eigenvectors are arbitrary
    x = (
        torch.randint(0, 5, (40, 3), generator=generator())
        if name == "Embedding"
        else normal(40, *case.x.shape[1:])
    )
    stats = captured(case.model, layers, fl.Categorical(), x, "true")[case.layer]
    # roots of eigenvalues that are rounding noise
    rel = 1e-4 if approximation == "Shampoo" else 1e-7
    assert_same(dense(approximation, stats, **options), naive(stats, **options), rel)


@pytest.mark.parametrize("name", GRADIENT_FORM)
def test_gradient_form_is_exact_for_kronecker_products(name: str, blocks: dict) -> None:
    """In the gradient form every Kronecker product is the full block."""
    case, (module, y) = case_of(name, blocks), LOSSES["CrossEntropyLoss"]
    exact = fl.exact_fisher(case.model, module, (case.x, y), layers=[case.layer])[
        case.layer
    ].dense()
    for approximation in (fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.TEKFAC(), fl.TN(), fl.KPSVD()):
        found = fl.estimate(approximation, case.model, module, (case.x, y), layers=[case.layer])[
            case.layer
        ]
        assert_same(found.dense(), exact, 1e-8)


def test_every_registered_type_has_a_case() -> None:
    """No layer type is registered that these tests do not see."""
    from fisher_lab.layers import registry

    seen = {type(module) for make in CASES.values() for module in make().model.modules()}
    named = {nn.ParameterList, nn.ParameterDict}  # in test_selection
    missing = {kind for kind in registry() if kind.__module__.startswith("torch.")} - seen - named
    assert not missing, missing


def test_groups_are_said() -> None:
    """The result says that factors are per group and the cross-group part counts as error."""
    case = FACTOR_FORM["Conv2d groups and bias"]()
    comparison = fl.compare(
        case.model, LOSSES["MSELoss"][0], (case.x, LOSSES["MSELoss"][1]), [fl.Exact(), fl.TENGraD()]
    )
    assert comparison.settings["layers"]["layer"]["groups"] == 2
    assert "error" in comparison.settings["layers"]["layer"]["cross_group"]
    assert comparison.value("layer", "TENGraD", "frobenius") < 1e-7
