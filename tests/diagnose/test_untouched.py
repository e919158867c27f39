"""Nothing that the user owns is changed: model, data, hooks, random state."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from tests.diagnose.support import batch, net


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {
            k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        },
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "dtypes": {k: p.dtype for k, p in model.named_parameters()},
        "ids": {k: id(p) for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()
        },
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0) if key in (
            "values",
        ) else None
        if key == "grads":
            for name, grad in before[key].items():
                assert (grad is None) == (after[key][name] is None)
                assert grad is None or torch.equal(grad, after[key][name])
        elif key != "values":
            assert before[key] == after[key]


class Failing(nn.Module):
    """Works a few times, then raises."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise ArithmeticError("the model failed")
        return x


@pytest.mark.usefixtures("restores_global_state")
@pytest.mark.parametrize("fisher", ["true", "mc"])
def test_the_model_and_the_data_come_back_untouched(fisher: str) -> None:
    model, (x, y) = net(), batch()
    model.train()
    model[0].bias.requires_grad_(False)
    nn.functional.cross_entropy(model(x), y).backward()
    before, inputs = snapshot(model), (x.clone(), y.clone())
    fl.compare(model, nn.CrossEntropyLoss(), (x, y), fisher=fisher, errors="all", dampings=[0.1])
    fl.exact_fisher(model, nn.CrossEntropyLoss(), (x, y), fisher=fisher)
    fl.estimate(fl.TEKFAC(), model, nn.CrossEntropyLoss(), (x, y), fisher=fisher)
    assert_same(before, snapshot(model))
    assert torch.equal(x, inputs[0])
    assert torch.equal(y, inputs[1])
    assert not x.requires_grad


@pytest.mark.usefixtures("restores_global_state")
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_also_after_an_exception(after: int) -> None:
    model, (x, y) = nn.Sequential(net(), Failing(after)), batch()
    before = snapshot(model)
    for call in (fl.compare, lambda *a: fl.estimate(fl.KFAC(), *a), fl.exact_fisher):
        with contextlib.suppress(ArithmeticError):
            call(model, fl.Categorical(), (x, y))
        assert_same(before, snapshot(model))
        assert model[1].calls == 0  # only the copy ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher", ["true", "mc"])
def test_a_first_operation_in_place_changes_neither_data_nor_results(
    dtype: torch.dtype, fisher: str
) -> None:
    x, y = batch()
    x, linear = x.to(dtype), nn.Linear(5, 3)
    in_place, plain = (nn.Sequential(nn.ELU(inplace=i), linear).eval() for i in (True, False))
    before = x.clone()
    for call in (fl.exact_fisher, lambda *a, **k: fl.estimate(fl.Exact(), *a, **k)):
        found, expected = (
            call(m, fl.Categorical(), (x, y), fisher=fisher)["1"].dense() for m in (in_place, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    fl.compare(in_place, fl.Categorical(), (x, y), fl.KFAC(), fisher=fisher)
    assert torch.equal(x, before)


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(5, 4), shared, nn.Tanh(), shared, nn.Linear(4, 3)).eval()
    found = fl.compare(model, fl.Categorical(), batch(), fl.KFAC())
    assert found.layers == ["0", "1", "4"]
    assert max(r.checked for r in found.rows) < 1e-10


@pytest.mark.usefixtures("restores_global_state")
def test_a_data_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(*batch()), batch_size=5)
    fl.compare(net(), fl.Categorical(), loader, fl.KFAC())
    fl.exact_fisher(net(), fl.Categorical(), loader)
    fl.estimate(fl.KFAC(), net(), fl.Categorical(), loader)


def test_a_generator_that_reuses_its_buffer() -> None:
    x, y = batch()
    buffer, target = torch.empty(4, 5), torch.empty(4, dtype=torch.long)

    def stream():
        for start in range(0, 12, 4):
            yield buffer.copy_(x[start : start + 4]), target.copy_(y[start : start + 4])

    found = fl.compare(net(), fl.Categorical(), stream(), fl.KFAC())
    expected = fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC())
    assert found.value("0", "KFAC", "frobenius") == pytest.approx(
        expected.value("0", "KFAC", "frobenius")
    )
