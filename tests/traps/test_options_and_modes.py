"""What other curvature libraries were found to get wrong: options silently ignored, modes, hooks,
precision.

One test per trap, named after it. Expected blocks come from loops over plain autograd
(tests/layers/oracle.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from tests.helpers import assert_differs, assert_psd, assert_same
from tests.layers.cases import CASES, Case
from tests.layers.oracle import naive_block, normal, randomised
from tests.traps.support import Lambda, block, mlp


def check_case(name: str) -> Case:
    """The captured block of a case is the oracle's, and EKFAC has its trace."""
    case, loss = CASES[name](), nn.CrossEntropyLoss()
    y = torch.arange(len(case.x)) % 3
    truth = naive_block(
        case.model, case.parameters(), case.packed(), case.x, lambda z, n: loss(z, y[n : n + 1])
    )
    assert_same(block(case.model, loss, (case.x, y), case.layer), truth, 1e-10)
    found = fl.estimate(fl.EKFAC(), case.model, loss, (case.x, y), layers=[case.layer])[case.layer]
    assert float(found.trace()) == pytest.approx(float(truth.trace()), rel=1e-9)
    return case


@pytest.mark.parametrize(
    "name", [name for name in CASES if "groups" in name or "depthwise" in name]
)
def test_18_groups(name: str) -> None:
    """Grouped convolutions have one pair of factors per group and the right block."""
    case = check_case(name)
    comparison = fl.compare(
        case.model, fl.Categorical(), case.x, [fl.KFAC()], layers=[case.layer], errors=["trace"]
    )
    assert comparison.settings["layers"][case.layer]["groups"] == case.module.groups


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.split()[-1] in ("reflect", "replicate", "circular")]
)
def test_19_padding_modes(name: str) -> None:
    """Every padding mode is the convolution's own."""
    check_case(name)


def test_20_class_weights_and_ignored_labels() -> None:
    """They follow the loss, in KFAC's factors too; a mean is over the labels that are kept."""
    model, x, y = mlp(), normal(6, 4), torch.tensor([0, 1, -100, 2, -100, 1])
    loss = nn.CrossEntropyLoss(reduction="sum")
    kept = y >= 0
    for approximation in (fl.Exact(), fl.EKFAC(), fl.TN()):
        ours = fl.estimate(approximation, model, loss, (x, y))["0"].dense()
        if approximation.label != "EKFAC":
            rows = fl.estimate(approximation, model, loss, (x[kept], y[kept]))["0"].dense()
            assert_same(ours, rows, 1e-9)
        assert float(ours.trace()) == pytest.approx(
            float(block(model, loss, (x[kept], y[kept]), "0").trace()), rel=1e-9
        )
    mean = block(model, nn.CrossEntropyLoss(), (x[kept], y[kept]), "0")
    for weight in (None, torch.full((3,), 2.0)):
        found = block(model, nn.CrossEntropyLoss(weight=weight), (x, y), "0")
        assert_same(found, mean, 1e-9)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_21_attention_output_projection() -> None:
    """out_proj, whose forward is never called, and in_proj are both blocks, and right."""
    model, x = randomised(nn.Sequential(SelfAttention())), normal(3, 3, 4)
    comparison = fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["frobenius"])
    assert list(comparison.settings["layers"]) == ["0.attention", "0.attention.out_proj"]
    assert all(row.checked < 1e-10 for row in comparison.rows)


def test_21_the_fast_path_of_attention_is_off() -> None:
    """nn.TransformerEncoderLayer in evaluation mode would bypass its modules."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model, x = randomised(nn.Sequential(layer)), normal(3, 3, 4)
    with torch.no_grad():
        fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["trace"])
        comparison = fl.compare(
            model.requires_grad_(True), fl.Gaussian(), x, [fl.KFAC()], errors=["trace"]
        )
    assert {"0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.norm2"} <= set(
        comparison.settings["layers"]
    )


def test_22_subclasses_are_not_matched_by_name_or_isinstance() -> None:
    """A class called Linear that is none, and a subclass of Linear with another forward, are not
    taken for Linear.
    """

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    for layer in (Linear(), Other(4, 4)):
        model, x = randomised(nn.Sequential(layer, nn.Linear(4, 2))), normal(3, 4)
        found = fl.estimate(fl.Exact(), model, fl.Gaussian(), x)["0"]
        count = sum(p.numel() for p in layer.parameters())
        assert tuple(found.shape) == (count, 1)
        assert_same(found.dense(), fl.exact_fisher(model, fl.Gaussian(), x)["0"].dense(), 1e-10)


def test_23_modes_in_which_examples_interact_or_are_random() -> None:
    """BatchNorm, dropout and modules with changing buffers are refused in training mode, with name
    and cure.
    """
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    running = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    for layer in (
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.MultiheadAttention(4, 1, dropout=0.1),
        spectral,
        running,
    ):
        model = nn.Sequential(nn.Linear(4, 4), layer)
        for measure in (fl.compare, fl.exact_fisher):
            with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
                measure(model, fl.Gaussian(), normal(3, 4))
    with pytest.raises(ValueError, match="batch statistics"):
        fl.compare(
            nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
            fl.Gaussian(),
            normal(3, 4),
        )


def test_24_in_place_activations() -> None:
    """In-place activations behind a layer change nothing."""
    model, twin = (
        randomised(nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=flag), nn.Linear(5, 3)))
        for flag in (False, True)
    )
    assert_same(
        block(twin, fl.Gaussian(), normal(5, 4), "0"),
        block(model, fl.Gaussian(), normal(5, 4), "0"),
        1e-12,
    )


def test_25_parameters_are_known_by_name() -> None:
    """Tied weights are still tied after the copy into another precision."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    twin = nn.Sequential(first, nn.Tanh(), first)  # the same function with one module
    x = normal(5, 4).float()
    assert_same(block(model, fl.Gaussian(), x, "0"), block(twin, fl.Gaussian(), x, "0"), 1e-12)


def test_26_no_side_effects(restores_global_state) -> None:
    """Gradients, flags, hooks, modes, the user's batch and global random state stay, after an
    exception too.
    """
    with torch.random.fork_rng():  # constructing layers draws
        model, x = mlp(), normal(5, 4)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].bias.requires_grad_(False)
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    fl.compare(model, fl.Categorical(), x, [fl.KFAC()], fisher="mc", errors=["trace"])
    with pytest.raises(ValueError, match="failed on one example"):
        fl.compare(model, fl.Categorical(), normal(5, 3), [fl.KFAC()])
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert bool((model[0].weight.grad == 1).all())
    assert model[2].weight.grad is None
    assert not model[2].bias.requires_grad
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_27_memory_formats() -> None:
    """Channels-last inputs and weights, whose gradients are not contiguous, change nothing."""
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten())
    )
    x = normal(3, 3, 4, 4)
    plain = block(model, fl.Gaussian(), x, "0")
    last = block(
        model.to(memory_format=torch.channels_last),
        fl.Gaussian(),
        x.to(memory_format=torch.channels_last),
        "0",
    )
    assert_same(last, plain, 1e-12)


@pytest.mark.parametrize("N", [1, 3])
def test_27_instance_norm_of_one_example(N: int) -> None:
    """Torch's own backward is wrong for one example whose gradient has channels last; here it is
    right.
    """
    tail = [nn.Tanh(), Lambda(lambda x: x.movedim(1, -1).square().mean((1, 2))), nn.Linear(4, 3)]
    model = randomised(nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), *tail))
    x = normal(N, 2, 6, 6)
    exact = fl.exact_fisher(model, fl.Gaussian(), x)
    for layer, found in fl.estimate(fl.Exact(), model, fl.Gaussian(), x).items():
        assert_same(found.dense(), exact[layer].dense(), 1e-10)
    assert all(
        row.checked < 1e-10
        for row in fl.compare(model, fl.Gaussian(), x, [fl.KFAC()], errors=["trace"]).rows
    )


def test_27_compiled_and_wrapped_models() -> None:
    """A compiled model is measured as what it compiles; a parallel wrapper and inference mode are
    refused.
    """
    model, x = mlp(), normal(5, 4)
    plain = block(model, fl.Gaussian(), x, "0")
    assert_same(block(torch.compile(model, backend="eager"), fl.Gaussian(), x, "0"), plain, 1e-12)
    with pytest.raises(ValueError, match=r"pass model\.module"):
        fl.compare(nn.DataParallel(model), fl.Gaussian(), x)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        fl.compare(model, fl.Gaussian(), x)


@pytest.mark.parametrize(
    "approximation", fl.approximations.default_approximations(), ids=lambda a: a.label
)
def test_28_precision_does_not_drift(approximation) -> None:
    """A float32 model is measured in float64 by default, and every matrix and its dense form stay
    float64.
    """
    matrix = fl.estimate(approximation, mlp().float(), fl.Gaussian(), normal(4, 4).float())["0"]
    assert matrix.dtype == matrix.dense().dtype == matrix.trace().dtype == torch.float64


@pytest.mark.parametrize(
    "approximation", fl.approximations.default_approximations(), ids=lambda a: a.label
)
def test_29_ill_conditioned_single_precision(approximation) -> None:
    """Factors of rank one in float32 give finite damped steps."""
    x = normal(1, 4).expand(6, 4) * torch.logspace(-4, 4, 6, dtype=torch.float64)[:, None]
    matrix = fl.estimate(approximation, mlp(), fl.Categorical(), x, dtype=torch.float32)["0"]
    assert bool(torch.isfinite(matrix.solve(torch.ones(5, 5), damping=1e-6)).all())


def test_30_nearest_kronecker_factors_are_psd() -> None:
    """KPSVD's factors come symmetric and positive, not with a common minus sign."""
    matrix = fl.estimate(fl.KPSVD(), mlp(), fl.Categorical(), normal(6, 4))["0"]
    for factor in matrix.factors:
        assert_psd(factor[0])


def test_31_the_kind_of_fisher_is_said() -> None:
    """The result names the Fisher it is about, and empirical is never taken for true."""
    data = (normal(6, 4), torch.arange(6) % 3)
    for kind in ("true", "mc", "empirical"):
        comparison = fl.compare(
            mlp(), fl.Categorical(), data, [fl.KFAC()], fisher=kind, errors=["trace"]
        )
        assert comparison.settings["fisher"] == kind
    assert_differs(
        block(mlp(), fl.Categorical(), data, "0", fisher="empirical"),
        block(mlp(), fl.Categorical(), data, "0"),
    )


def test_32_exactness_for_one_example_and_not_for_three() -> None:
    """KFAC is exact for one example without sharing; the same test with three must fail."""
    for N, same in ((1, True), (3, False)):
        x = normal(N, 4)
        found = fl.estimate(fl.KFAC(), mlp(), fl.Categorical(), x)["0"].dense()
        (assert_same if same else assert_differs)(
            found, fl.exact_fisher(mlp(), fl.Categorical(), x)["0"].dense()
        )


def test_33_soft_binary_labels() -> None:
    """Grey levels are labels of BCE; the true Fisher does not depend on them."""
    x, loss = normal(5, 4), nn.BCEWithLogitsLoss()
    hard, soft = (normal(5, 3, seed=4) > 0).double(), normal(5, 3, seed=4).sigmoid()
    assert_same(block(mlp(), loss, (x, soft), "0"), block(mlp(), loss, (x, hard), "0"), 1e-14)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        block(mlp(), loss, (x, 2 * soft), "0")


def test_34_vocabularies_are_refused_above_the_budget() -> None:
    """Outputs with so many directions that one example does not fit are refused with the cure,
    which works.
    """
    model = nn.Sequential(nn.Linear(4, 3000))
    with pytest.raises(ValueError, match=r'R = 2999 directions need .*use fisher="mc"'):
        fl.estimate(fl.Diagonal(), model, fl.Categorical(), normal(2, 4), memory=0.02)
    fl.estimate(fl.Diagonal(), model, fl.Categorical(), normal(2, 4), memory=0.02, fisher="mc")


def test_35_the_oracle_is_not_a_finite_difference() -> None:
    """The two truths agree to rounding, far below what finite differences reach."""
    comparison = fl.compare(mlp(), fl.Categorical(), normal(6, 4), [fl.KFAC()], errors=["trace"])
    assert all(row.checked < 1e-13 for row in comparison.rows)
