"""The step budget: every stage against a dense matrix and its own formula."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab import plots

DAMPING = 1e-2


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(60, 6, dtype=torch.float64), torch.randint(3, (60,))


LOSS = nn.CrossEntropyLoss()


def efficiency(model, data, step: dict[str, Tensor]) -> float:
    F = fl.network(model, LOSS, data)
    y, g = F.flatten(step), F.flatten(F.gradient)
    H = F.dense() + F.absolute_damping(DAMPING) * torch.eye(len(g), dtype=g.dtype)
    return float(y @ g) ** 2 / float((y @ H @ y) * (g @ torch.linalg.solve(H, g)))


def test_every_stage(model, data) -> None:
    found = fl.budget(model, LOSS, data, fl.KFAC(), damping=DAMPING, batch=20)
    F = fl.network(model, LOSS, data)
    stages = {stage.name: stage.efficiency for stage in found.stages}
    assert list(stages) == [
        "whole Fisher",
        "exact blocks",
        "approximation",
        "factored damping",
        "sampled labels",
        "batch",
    ]
    assert stages["whole Fisher"] == 1.0
    exact = F.step(fl.exact_fisher(model, LOSS, data), DAMPING)
    assert stages["exact blocks"] == pytest.approx(efficiency(model, data, exact))
    kfac = fl.estimate(fl.KFAC(), model, LOSS, data)
    assert stages["approximation"] == pytest.approx(efficiency(model, data, F.step(kfac, DAMPING)))
    shift = F.absolute_damping(DAMPING)
    factored = {n: kfac[n].power(F.gradient[n], -1.0, shift, "factored") for n in kfac}
    assert stages["factored damping"] == pytest.approx(efficiency(model, data, factored))
    few = (data[0][:20], data[1][:20])
    for name, some in (("sampled labels", data), ("batch", few)):
        drawn = fl.estimate(fl.KFAC(), model, LOSS, some, fisher="mc")
        steps = {n: drawn[n].power(F.gradient[n], -1.0, shift, "factored") for n in drawn}
        assert stages[name] == pytest.approx(efficiency(model, data, steps))
    assert found.gradient.efficiency == pytest.approx(efficiency(model, data, F.gradient))


def test_a_loss_that_is_a_sum_has_the_same_budget(model, data) -> None:
    """F and everything that approximates it are N times as large."""
    mean = fl.budget(model, LOSS, data, fl.KFAC(), damping=DAMPING, batch=20)
    summed = nn.CrossEntropyLoss(reduction="sum")
    found = fl.budget(model, summed, data, fl.KFAC(), damping=DAMPING, batch=20)
    for one, other in zip(mean.stages, found.stages, strict=True):
        assert other.efficiency == pytest.approx(one.efficiency, rel=1e-9)


def test_what_has_no_stage_is_left_out(model, data) -> None:
    found = fl.budget(model, LOSS, data, fl.EKFAC(), fisher="empirical")
    assert [s.name for s in found.stages] == ["whole Fisher", "exact blocks", "approximation"]


def test_one_layer_and_the_exact_block_lose_nothing(data) -> None:
    torch.manual_seed(0)
    found = fl.budget(nn.Linear(6, 3), LOSS, data, fl.Exact(), fisher="empirical")
    assert [s.efficiency for s in found.stages] == pytest.approx([1.0, 1.0, 1.0])


def test_it_says_what_to_mend_first(model, data) -> None:
    found = fl.budget(model, LOSS, data, fl.KFAC(), damping=DAMPING)
    text = str(found)
    assert f"Mend first: {found.largest_loss.name}." in text
    for stage in found.stages:
        assert f"{stage.efficiency:.4f}" in text
    shares = [share for _, share in found.losses()]
    assert max(shares) == dict(found.losses())[found.largest_loss]


def test_the_figure(model, data) -> None:
    found = fl.budget(model, LOSS, data, fl.KFAC(), damping=DAMPING, batch=20)
    figure = plots.waterfall(found)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [stage.name for stage in (*found.stages, found.gradient)]
    values = [text.get_text() for text in axes.texts]
    assert values == [f"{s.efficiency:.3f}" for s in (*found.stages, found.gradient)]
    with pytest.raises(TypeError, match=r"Got list, expected a StepBudget; call fl\.budget"):
        plots.waterfall([])  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, 61])
def test_a_batch_that_cannot_be(model, data, batch) -> None:
    with pytest.raises(ValueError, match=f"Got batch={batch}"):
        fl.budget(model, LOSS, data, fl.KFAC(), batch=batch)


def test_nothing_of_the_user_is_changed(model, data) -> None:
    before = torch.get_rng_state()
    fl.budget(model, LOSS, data, fl.KFAC(), batch=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
