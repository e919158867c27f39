"""compare, estimate and exact_fisher: agreement of the two truths, and what the results say."""

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from fisher_lab.results import ALL
from tests.diagnose.support import LOSSES, TORCH_LOSSES, batch, net


def ggn(
    model: nn.Module, loss: nn.Module, x: torch.Tensor, y: torch.Tensor, name: str
) -> torch.Tensor:
    """The generalised Gauss-Newton block of one layer, from autograd: J^T (Hessian of the loss in
    the output) J.
    """
    model = model.double()
    layer = model.get_submodule(name)
    z = model(x.double())
    y = y.double() if y.is_floating_point() else y
    hessian = torch.autograd.functional.hessian(lambda out: loss(out, y), z.detach()).reshape(
        z.numel(), z.numel()
    )
    rows = []
    for k in range(z.numel()):
        grads = torch.autograd.grad(z.flatten()[k], list(layer.parameters()), retain_graph=True)
        parts = [grads[0]] + ([grads[1].unsqueeze(-1)] if len(grads) > 1 else [])
        rows.append(torch.cat(parts, -1).flatten())
    J = torch.stack(rows)
    return J.T @ hessian @ J


@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_the_fisher_of_a_torch_loss_is_its_gauss_newton_matrix(name: str) -> None:
    loss, kind = LOSSES[name]
    x, y = batch(kind)
    for found in (
        fl.exact_fisher(net(), loss, (x, y)),
        fl.estimate(fl.Exact(), net(), loss, (x, y)),
    ):
        for layer in ("0", "2", "4"):
            torch.testing.assert_close(
                found[layer].dense(), ggn(net(), loss, x, y, layer), rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("fisher", ["true", "mc", "empirical"])
@pytest.mark.parametrize("name", LOSSES)
def test_captured_and_functional_blocks_agree(name: str, fisher: str) -> None:
    loss, kind = LOSSES[name]
    exact = fl.exact_fisher(net(), loss, batch(kind), fisher=fisher, seed=3)
    captured = fl.estimate(fl.Exact(), net(), loss, batch(kind), fisher=fisher, seed=3)
    assert list(exact) == list(captured) == ["0", "2", "4"]
    for layer in exact:
        torch.testing.assert_close(
            exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("approximation", fl.default_approximations(), ids=lambda a: a.label)
def test_unequal_batches_are_one_batch(approximation: fl.Approximation) -> None:
    x, y = batch(n=13)
    whole = fl.estimate(approximation, net(), fl.Categorical(), (x, y))
    parts = fl.estimate(
        approximation, net(), fl.Categorical(), [(x[:2], y[:2]), (x[2:9], y[2:9]), (x[9:], y[9:])]
    )
    # the root of a singular matrix: sqrt(eps)
    atol = 1e-7 if isinstance(approximation, fl.Shampoo) else 1e-12
    for layer in whole:
        torch.testing.assert_close(whole[layer].dense(), parts[layer].dense(), rtol=1e-8, atol=atol)


def test_data_may_be_a_loader_an_iterator_or_inputs_alone() -> None:
    x, y = batch()
    expected = fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC()).value(
        "0", "KFAC", "frobenius"
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    for data in (
        loader,
        iter([(x[:7], y[:7]), (x[7:], y[7:])]),
        x,
        [x[:3], x[3:5], x[5:]],
        (x, None),
    ):
        found = fl.compare(net(), fl.Categorical(), data, fl.KFAC())
        assert found.value("0", "KFAC", "frobenius") == pytest.approx(expected, rel=1e-9)
        assert found.settings["N"] == 12


def test_a_small_memory_budget_gives_the_same_result() -> None:
    x, y = batch(n=40)
    whole = fl.compare(net(), fl.Categorical(), (x, y))
    pieces = fl.compare(net(), fl.Categorical(), (x, y), memory=2e-5)
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9), (a, b)


def test_positions_are_summed_per_example() -> None:
    x = torch.randn(6, 4, 5)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    for loss, y in (
        (nn.MSELoss(), torch.randn(6, 4, 2)),
        (fl.Categorical(), torch.randint(2, (6, 4))),
    ):
        exact = fl.exact_fisher(model, loss, (x, y))
        captured = fl.estimate(fl.Exact(), model, loss, (x, y))
        for layer in exact:
            torch.testing.assert_close(
                exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14
            )
        assert max(r.checked for r in fl.compare(model, loss, (x, y)).rows) < 1e-10


def test_frozen_parameters_are_left_out_and_said_so() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    exact = fl.exact_fisher(model, fl.Categorical(), batch())
    captured = fl.estimate(fl.Exact(), model, fl.Categorical(), batch())
    assert [tuple(exact[k].shape) for k in exact] == [(4, 5), (4, 4), (3, 1)]
    for layer in exact:
        torch.testing.assert_close(
            exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14
        )
    found = fl.compare(model, fl.Categorical(), batch())
    assert set(found.settings["left_out"]) == {"0.bias", "4.weight"}
    assert "0.bias" in str(found)


def test_batch_norm_in_evaluation_mode_between_layers() -> None:
    model = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)
    )
    model(torch.randn(20, 5))  # running statistics other than the initial ones
    model.eval()
    found = fl.compare(model, fl.Categorical(), batch(), fl.KFAC(), layers=["0", "3"])
    assert all(row.checked < 1e-10 for row in found.rows)


class Doubled(fl.Approximation):
    """Twice the exact block: an approximation outside the package, one class."""

    def moments(
        self, stats: fl.LayerStats, matrix: fl.FisherMatrix | None = None
    ) -> dict[str, torch.Tensor]:
        return {"block": 2 * stats.dense()}

    def assemble(
        self, moments: dict[str, torch.Tensor], matrix: fl.FisherMatrix | None = None
    ) -> fl.FisherMatrix:
        from fisher_lab.matrices import Dense

        d = len(moments["block"])
        return Dense(moments["block"], (d, 1)) if d != 24 else Dense(moments["block"], (4, 6))


@pytest.fixture
def forget_doubled():
    yield
    fl.Approximation._registry.pop("Doubled", None)


def test_a_user_written_approximation_appears_by_itself(forget_doubled: None) -> None:
    fl.Approximation._registry["Doubled"] = Doubled
    found = fl.compare(net(), fl.Categorical(), batch(), layers=["0"])
    assert found.value("0", "Doubled", "trace") == pytest.approx(1.0)
    assert found.value("0", "Doubled", "frobenius_rescaled") == pytest.approx(0.0, abs=1e-7)
    assert found.value("0", "Doubled", "cosine") == pytest.approx(1.0)


fl.Approximation._registry.pop("Doubled")  # only in the tests that ask for it


def test_all_layers_are_the_block_diagonal_matrix() -> None:
    found = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC())
    exact, kfac = (
        fl.estimate(a, net(), fl.Categorical(), batch()) for a in (fl.Exact(), fl.KFAC())
    )
    F, K = (torch.block_diag(*(m.dense() for m in ms.values())) for ms in (exact, kfac))
    assert found.value(ALL, "KFAC", "frobenius") == pytest.approx(float((F - K).norm() / F.norm()))
    assert found.value(ALL, "KFAC", "trace") == pytest.approx(
        float((K.trace() - F.trace()) / F.trace())
    )
    spectral = float(torch.linalg.matrix_norm(F - K, 2) / torch.linalg.matrix_norm(F, 2))
    assert found.value(ALL, "KFAC", "spectral") == pytest.approx(spectral)
    assert found.value(ALL, "KFAC", "cosine") == pytest.approx(
        float((F * K).sum() / F.norm() / K.norm())
    )


def test_damped_errors_against_dense_formulas() -> None:
    x, y = batch()
    found = fl.compare(
        net(), nn.CrossEntropyLoss(), (x, y), fl.EKFAC(), errors="all", dampings=[1e-2, 1.0]
    )
    model = net().double()
    nn.functional.cross_entropy(model(x.double()), y).backward()
    F = fl.exact_fisher(net(), nn.CrossEntropyLoss(), (x, y))["0"].dense()
    K = fl.estimate(fl.EKFAC(), net(), nn.CrossEntropyLoss(), (x, y))["0"].dense()
    g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).flatten()
    for damping in (1e-2, 1.0):
        shift = damping * F.trace() / len(F)
        H, M = F + shift * torch.eye(len(F)), K + shift * torch.eye(len(F))
        a, b = torch.linalg.solve(H, g), torch.linalg.solve(M, g)
        efficiency = (b @ g) ** 2 / ((b @ H @ b) * (g @ a))
        spectral = shift * torch.linalg.matrix_norm(H.inverse() - M.inverse(), 2)
        assert found.value("0", "EKFAC", "damped_cosine", damping) == pytest.approx(
            float(a @ b / a.norm() / b.norm())
        )
        assert found.value("0", "EKFAC", "damped_efficiency", damping) == pytest.approx(
            float(efficiency)
        )
        assert found.value("0", "EKFAC", "damped_spectral", damping) == pytest.approx(
            float(spectral), rel=1e-6
        )
    spectra = torch.linalg.eigvalsh(F) - torch.linalg.eigvalsh(K)
    assert found.value("0", "EKFAC", "spectrum") == pytest.approx(
        float(spectra.norm() / F.norm()), rel=1e-6
    )
    undamped = [(r.layer, r.approximation, r.error) for r in found.rows if r.damping is None]
    assert len(undamped) == len(set(undamped))


def test_ready_matrices_are_compared_like_approximations() -> None:
    ready = fl.estimate(fl.KFAC(), net(), fl.Categorical(), batch())
    found = fl.compare(net(), fl.Categorical(), batch(), {"mine": ready, "KFAC": fl.KFAC()})
    for layer in ready:
        assert found.value(layer, "mine", "frobenius") == found.value(layer, "KFAC", "frobenius")


def test_exact_func_gives_the_same_errors() -> None:
    for loss in (fl.Categorical(), nn.CrossEntropyLoss(reduction="sum")):
        captured = fl.compare(net(), loss, batch())
        func = fl.compare(net(), loss, batch(), exact="func")
        for a, b in zip(captured.rows, func.rows, strict=True):
            assert a.value == pytest.approx(b.value, rel=1e-7, abs=1e-10)
            assert b.checked < 1e-10


def test_a_dead_layer_has_no_damped_errors_and_says_so() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()  # nothing behind layer 2 depends on it
    found = fl.compare(model, fl.Categorical(), batch(), fl.KFAC(), errors="all", dampings=[0.1])
    assert {r.layer for r in found.rows if r.damping is not None} == {"4", ALL}
    assert "F = 0" in found.settings["layers"]["0"]["damped"]
    assert found.value("0", "KFAC", "cosine") == 1.0
    assert found.value("0", "KFAC", "frobenius") == 0.0


def test_damped_floors_hold_where_the_approximation_is_exact() -> None:
    for dtype in (torch.float64, torch.float32):
        found = fl.compare(
            net(),
            fl.Categorical(),
            batch(n=1),
            fl.KFAC(),
            errors="all",
            dampings=[1e-4],
            dtype=dtype,
        )
        for r in found.rows:
            exact = (
                1.0
                if r.error in ("cosine", "trace_ratio", "damped_cosine", "damped_efficiency")
                else 0.0
            )
            slack = max(r.noise, 1e-12 if dtype == torch.float64 else 1e-4)
            assert abs(r.value - exact) <= slack, (dtype, r)


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_extreme_scales_are_refused(scale: float) -> None:
    x = torch.randn(6, 5, dtype=torch.float64) * scale
    with pytest.raises(ValueError, match=r"rescale the inputs|NaN or infinite"):
        fl.compare(nn.Sequential(nn.Linear(5, 3, bias=False)), fl.Gaussian(), x, fl.KFAC())


def test_a_candidate_may_be_called_anything() -> None:
    """Names of candidates are names, also "exact"."""
    found = fl.compare(net(), fl.Categorical(), batch(), {"exact": fl.KFAC(), "": fl.TN()})
    again = fl.compare(net(), fl.Categorical(), batch(), {"KFAC": fl.KFAC(), "TN": fl.TN()})
    assert [row.value for row in found.rows] == [row.value for row in again.rows]
    assert found.approximations == ["exact", ""]


def test_all_errors_have_the_standard_errors_that_exist() -> None:
    """The spectrum has no value over all layers and no influence; everything else is there."""
    found = fl.compare(
        net(),
        fl.Categorical(),
        batch(),
        [fl.KFAC(), fl.Diagonal()],
        errors="all",
        standard_errors=True,
        dampings=[0.1],
    )
    known = {row.error for row in found.rows if row.stderr is not None}
    assert {"trace", "frobenius", "cosine", "spectral"} <= known
    assert "spectrum" not in known
    assert any(row.layer == ALL and row.stderr is not None for row in found.rows)


def test_settings_are_a_table_and_attributes() -> None:
    settings = fl.compare(net(), fl.Categorical(), batch(), [fl.KFAC()], errors=["trace"]).settings
    assert settings["N"] == settings.N == 12
    assert settings["layers"]["0"]["route"] == settings.about("0").route == "dense"
    assert settings.about("nothing").shape is None
    with pytest.raises(AttributeError, match="no entry 'colour'"):
        _ = settings.colour


@pytest.mark.parametrize("value", [torch.ones(3), object(), {"a": {1, 2}}])
def test_what_no_file_can_hold_is_refused_before_measuring(value) -> None:
    with pytest.raises(
        TypeError, match=r"Got problem\['note'\].* of type .*expected text, numbers"
    ):
        fl.compare(net(), fl.Categorical(), batch(), problem={"note": value})


def test_numbers_of_other_libraries_become_numbers(tmp_path) -> None:
    about = {
        "lr": numpy.float32(0.5),
        "steps": numpy.int64(3),
        "loss": torch.tensor(0.25),
        "note": "float:abc",
    }
    found = fl.compare(
        net(), fl.Categorical(), batch(), [fl.KFAC()], errors=["trace"], problem=about
    )
    again = fl.load_comparison(found.save(tmp_path / "run.json"))
    assert again.settings["problem"] == {"lr": 0.5, "steps": 3, "loss": 0.25, "note": "float:abc"}
