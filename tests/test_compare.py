"""compare, estimate and exact_fisher: agreement of the two truths, results, files, an untouched model, bad input."""

import contextlib
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from fisher_lab.comparison import ALL, Comparison, Row

LOSSES = {
    "categorical": (fl.Categorical(), "classes"),
    "gaussian": (fl.Gaussian(0.7), "values"),
    "bernoulli": (fl.Bernoulli(), "binary"),
    "ce mean": (nn.CrossEntropyLoss(), "classes"),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "mse mean": (nn.MSELoss(), "values"),
    "mse sum": (nn.MSELoss(reduction="sum"), "values"),
    "bce mean": (nn.BCEWithLogitsLoss(), "binary"),
    "bce sum": (nn.BCEWithLogitsLoss(reduction="sum"), "binary"),
}


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 3)
        )
    return model.eval()


def labels(kind: str, n: int, c: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "classes":
        return torch.randint(c, (n,), generator=generator)
    values = torch.randn(n, c, generator=generator)
    return (values > 0).float() if kind == "binary" else values


def batch(kind: str = "classes", n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1)), labels(kind, n)


def ggn(model: nn.Module, loss: nn.Module, x: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
    """The generalised Gauss-Newton block of one layer, from autograd: J^T (Hessian of the loss in the output) J."""
    model = model.double()
    layer = model.get_submodule(name)
    z = model(x.double())
    y = y.double() if y.is_floating_point() else y
    hessian = torch.autograd.functional.hessian(lambda out: loss(out, y), z.detach()).reshape(z.numel(), z.numel())
    rows = []
    for k in range(z.numel()):
        grads = torch.autograd.grad(z.flatten()[k], list(layer.parameters()), retain_graph=True)
        parts = [grads[0]] + ([grads[1].unsqueeze(-1)] if len(grads) > 1 else [])
        rows.append(torch.cat(parts, -1).flatten())
    J = torch.stack(rows)
    return J.T @ hessian @ J


@pytest.mark.parametrize("name", [n for n in LOSSES if " " in n])
def test_the_fisher_of_a_torch_loss_is_its_gauss_newton_matrix(name: str) -> None:
    loss, kind = LOSSES[name]
    x, y = batch(kind)
    for found in (fl.exact_fisher(net(), loss, (x, y)), fl.estimate(fl.Exact(), net(), loss, (x, y))):
        for layer in ("0", "2", "4"):
            torch.testing.assert_close(found[layer].dense(), ggn(net(), loss, x, y, layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", ["true", "mc", "empirical"])
@pytest.mark.parametrize("name", LOSSES)
def test_captured_and_functional_blocks_agree(name: str, fisher: str) -> None:
    loss, kind = LOSSES[name]
    exact = fl.exact_fisher(net(), loss, batch(kind), fisher=fisher, seed=3)
    captured = fl.estimate(fl.Exact(), net(), loss, batch(kind), fisher=fisher, seed=3)
    assert list(exact) == list(captured) == ["0", "2", "4"]
    for layer in exact:
        torch.testing.assert_close(exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("approximation", fl.default_approximations(), ids=lambda a: a.label)
def test_unequal_batches_are_one_batch(approximation: fl.Approximation) -> None:
    x, y = batch(n=13)
    whole = fl.estimate(approximation, net(), fl.Categorical(), (x, y))
    parts = fl.estimate(approximation, net(), fl.Categorical(), [(x[:2], y[:2]), (x[2:9], y[2:9]), (x[9:], y[9:])])
    atol = 1e-7 if isinstance(approximation, fl.Shampoo) else 1e-12  # the root of a singular matrix: sqrt(eps)
    for layer in whole:
        torch.testing.assert_close(whole[layer].dense(), parts[layer].dense(), rtol=1e-8, atol=atol)


def test_data_may_be_a_loader_an_iterator_or_inputs_alone() -> None:
    x, y = batch()
    expected = fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC()).value("0", "KFAC", "frobenius")
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    for data in (loader, iter([(x[:7], y[:7]), (x[7:], y[7:])]), x, [x[:3], x[3:5], x[5:]], (x, None)):
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
    for loss, y in ((nn.MSELoss(), torch.randn(6, 4, 2)), (fl.Categorical(), torch.randint(2, (6, 4)))):
        exact = fl.exact_fisher(model, loss, (x, y))
        captured = fl.estimate(fl.Exact(), model, loss, (x, y))
        for layer in exact:
            torch.testing.assert_close(exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14)
        assert max(r.checked for r in fl.compare(model, loss, (x, y)).rows) < 1e-10


def test_frozen_parameters_are_left_out_and_said_so() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    exact = fl.exact_fisher(model, fl.Categorical(), batch())
    captured = fl.estimate(fl.Exact(), model, fl.Categorical(), batch())
    assert [tuple(exact[k].shape) for k in exact] == [(4, 5), (4, 4), (3, 1)]
    for layer in exact:
        torch.testing.assert_close(exact[layer].dense(), captured[layer].dense(), rtol=1e-10, atol=1e-14)
    found = fl.compare(model, fl.Categorical(), batch())
    assert set(found.settings["left_out"]) == {"0.bias", "4.weight"}
    assert "0.bias" in str(found)


def test_batch_norm_in_evaluation_mode_between_layers() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    model(torch.randn(20, 5))  # running statistics other than the initial ones
    model.eval()
    found = fl.compare(model, fl.Categorical(), batch(), fl.KFAC(), layers=["0", "3"])
    assert all(row.checked < 1e-10 for row in found.rows)


class Doubled(fl.Approximation):
    """Twice the exact block: an approximation outside the package, one class."""

    def moments(self, stats: fl.LayerStats, matrix: fl.FisherMatrix | None = None) -> dict[str, torch.Tensor]:
        return {"block": 2 * stats.dense()}

    def assemble(self, moments: dict[str, torch.Tensor], matrix: fl.FisherMatrix | None = None) -> fl.FisherMatrix:
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
    exact, kfac = (fl.estimate(a, net(), fl.Categorical(), batch()) for a in (fl.Exact(), fl.KFAC()))
    F, K = (torch.block_diag(*(m.dense() for m in ms.values())) for ms in (exact, kfac))
    assert found.value(ALL, "KFAC", "frobenius") == pytest.approx(float((F - K).norm() / F.norm()))
    assert found.value(ALL, "KFAC", "trace") == pytest.approx(float((K.trace() - F.trace()) / F.trace()))
    spectral = float(torch.linalg.matrix_norm(F - K, 2) / torch.linalg.matrix_norm(F, 2))
    assert found.value(ALL, "KFAC", "spectral") == pytest.approx(spectral)
    assert found.value(ALL, "KFAC", "cosine") == pytest.approx(float((F * K).sum() / F.norm() / K.norm()))


def test_damped_errors_against_dense_formulas() -> None:
    x, y = batch()
    found = fl.compare(net(), nn.CrossEntropyLoss(), (x, y), fl.EKFAC(), errors="all", dampings=[1e-2, 1.0])
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
        assert found.value("0", "EKFAC", "damped_cosine", damping) == pytest.approx(float(a @ b / a.norm() / b.norm()))
        assert found.value("0", "EKFAC", "damped_efficiency", damping) == pytest.approx(float(efficiency))
        assert found.value("0", "EKFAC", "damped_spectral", damping) == pytest.approx(float(spectral), rel=1e-6)
    spectra = torch.linalg.eigvalsh(F) - torch.linalg.eigvalsh(K)
    assert found.value("0", "EKFAC", "spectrum") == pytest.approx(float(spectra.norm() / F.norm()), rel=1e-6)
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


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["run.json", "deep/er/run.csv"])
def test_a_saved_comparison_loads_as_it_was(tmp_path, name: str) -> None:
    found = fl.compare(net(), nn.CrossEntropyLoss(), batch(), errors="all", dampings=[0.1], problem={"name": "toy"})
    again = fl.load_comparison(found.save(tmp_path / name))
    assert again.rows == found.rows
    assert again.costs == found.costs
    assert json.loads(json.dumps(found.settings)) == again.settings
    needed = {
        "versions",
        "seed",
        "N",
        "R",
        "output",
        "fisher",
        "dtype",
        "problem",
        "likelihood",
        "seconds",
        "peak_bytes",
    }
    assert needed <= set(again.settings)
    frame = again.to_frame()
    assert len(frame) == len(found.rows)
    assert {"layer", "approximation", "error", "value", "noise", "seconds", "bytes"} <= set(frame.columns)


def test_infinite_values_survive_the_file(tmp_path) -> None:
    found = Comparison((Row("0", "KFAC", "trace", math.inf, 0.0),), settings={"x": math.nan})
    again = fl.load_comparison(found.save(tmp_path / "a.json"))
    assert again.rows == found.rows
    assert math.isnan(again.settings["x"])


@pytest.mark.parametrize(
    "text", ["", "{", '{"rows": []}', "[1, 2]", '{"format": "fisher_lab comparison", "version": 99}', "\x00\xff"]
)
@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_truncated_and_foreign_files_are_refused(tmp_path, text: str, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected a \.json or \.csv file written by"):
        fl.load_comparison(path)
    with pytest.raises(ValueError, match="cannot be read"):
        fl.load_comparison(tmp_path / "nothing.json")


def test_every_truncation_of_a_real_file_is_refused_or_whole(tmp_path) -> None:
    path = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), layers=["0"]).save(tmp_path / "run.json")
    text = path.read_text()
    for length in range(0, len(text) - 2, 97):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match="truncated"):
            fl.load_comparison(path)


def test_saving_is_atomic(tmp_path, monkeypatch) -> None:
    found = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), layers=["0"])
    path = found.save(tmp_path / "run.json")
    before = path.read_text()

    def fails(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        Comparison(()).save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("where", ["run.txt", "run", "."])
def test_unwritable_outputs_are_refused(tmp_path, where: str) -> None:
    found = Comparison((Row("0", "KFAC", "trace", 0.0, 0.0),))
    with pytest.raises(ValueError, match="expected"):
        found.save(tmp_path / where)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be created"):
        found.save(tmp_path / "file" / "run.json")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run.json"
    whole = fl.compare(net(), fl.Categorical(), batch())
    calls = []

    def stops(self: fl.KFAC, stats: fl.LayerStats, matrix: object = None) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return moments(self, stats, matrix)

    moments = fl.Diagonal.moments
    monkeypatch.setattr(fl.Diagonal, "moments", stops)
    with pytest.raises(KeyboardInterrupt):
        fl.compare(net(), fl.Categorical(), batch(), resume=path)
    partial = fl.load_comparison(path)
    assert partial.layers == ["0", "2"]
    assert partial.settings["complete"] is False
    calls.clear()
    monkeypatch.setattr(fl.Diagonal, "moments", moments)
    built = []
    assemble = fl.KFAC.assemble
    monkeypatch.setattr(fl.KFAC, "assemble", lambda self, m, matrix=None: built.append(1) or assemble(self, m, matrix))
    again = fl.compare(net(), fl.Categorical(), batch(), resume=path)
    assert again.rows == whole.rows
    assert len(built) == 2  # the third layer only: KFAC, and the base of EKFAC
    with pytest.raises(ValueError, match="holds another comparison"):
        fl.compare(net(1), fl.Categorical(), batch(), resume=path)


# -- nothing the user owns is changed ---------------------------------------------------------------------------------
def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "dtypes": {k: p.dtype for k, p in model.named_parameters()},
        "ids": {k: id(p) for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0) if key in ("values",) else None
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


# -- bad input --------------------------------------------------------------------------------------------------------
def with_nan(x: torch.Tensor, value: float = math.nan) -> torch.Tensor:
    x = x.clone()
    x[2, 1] = value
    return x


def nan_model() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


X, Y = batch()
CE = nn.CrossEntropyLoss
BAD = {
    "empty data": (lambda: (net(), CE(), (X[:0], Y[:0])), "at least one example"),
    "no batches": (lambda: (net(), CE(), []), "no batches"),
    "NaN inputs": (lambda: (net(), CE(), (with_nan(X), Y)), "NaN or infinite inputs in 1 examples"),
    "infinite inputs": (lambda: (net(), CE(), (with_nan(X, math.inf), Y)), "NaN or infinite inputs"),
    "NaN parameters": (lambda: (nan_model(), CE(), (X, Y)), "Parameter '0.weight' has NaN"),
    "labels out of range": (lambda: (net(), CE(), (X, Y + 1)), "labels from 1 to 3, expected 0 to 2"),
    "negative labels": (lambda: (net(), fl.Categorical(), (X, Y - 1)), "expected 0 to 2"),
    "ignored labels": (lambda: (net(), CE(), (X, torch.full_like(Y, -100))), "ignore_index=-100|expected 0 to 2"),
    "wrong label shape": (lambda: (net(), CE(), (X, Y[:, None])), "labels|expected"),
    "fewer labels": (lambda: (net(), CE(), (X, Y[:-1])), "12 inputs and labels of shape"),
    "wrong input width": (lambda: (net(), CE(), (X[:, :4], Y)), "expected|shapes"),
    "class weights": (lambda: (net(), CE(weight=torch.ones(3)), (X, Y)), "weight"),
    "reduction none": (lambda: (net(), CE(reduction="none"), (X, Y)), "reduction='none'"),
    "unknown loss": (lambda: (net(), nn.L1Loss(), (X, Y)), "Got L1Loss as likelihood"),
    "likelihood class": (lambda: (net(), fl.Categorical, (X, Y)), "write Categorical"),
    "one logit": (lambda: (nn.Linear(5, 1), fl.Categorical(), (X, None)), "at least 2 classes"),
    "scalar output": (
        lambda: (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), fl.Gaussian(), (X, None)),
        r"\[N, \*output\]",
    ),
    "bernoulli labels": (lambda: (net(), fl.Bernoulli(), (X, 3 * labels("binary", 12))), r"values in \[0, 1\]"),
    "batch norm": (lambda: (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), fl.Gaussian(), X), "model.eval()"),
    "dropout": (lambda: (nn.Sequential(nn.Linear(5, 4), nn.Dropout()), fl.Gaussian(), X), "model.eval()"),
    "no parameters": (lambda: (nn.Tanh(), fl.Gaussian(), X), "no trainable parameters"),
    "not a model": (lambda: (torch.tanh, fl.Gaussian(), X), "expected a torch.nn.Module"),
    "arrays": (lambda: (net(), CE(), (X.numpy(), Y.numpy())), "expected a tensor x|torch.as_tensor"),
    "a list of two": (lambda: (net(), CE(), [X, Y]), "two batches of inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_sentence(case: str, tmp_path) -> None:
    make, message = BAD[case]
    model, likelihood, data = make()
    path = tmp_path / "run.json"
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        fl.compare(model, likelihood, data, resume=path)
    assert not path.exists()
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, TypeError), match=message):
        fl.exact_fisher(model, likelihood, data)


ARGUMENTS = {
    "unknown layer": ({"layers": ["9"]}, "Got layer '9', expected one of '0', '2', '4'"),
    "layer without parameters": ({"layers": ["1"]}, "'1'"),
    "no layers": ({"layers": []}, "expected at least one"),
    "unknown error": ({"errors": "frobnicate"}, "Got error 'frobnicate'"),
    "no errors": ({"errors": []}, "expected"),
    "unknown fisher": ({"fisher": "false"}, "fisher='false'"),
    "no dampings": ({"errors": "all", "dampings": []}, "dampings"),
    "negative damping": ({"errors": "all", "dampings": [-1.0]}, "positive"),
    "negative memory": ({"memory": -1}, "memory=-1"),
    "unknown exact": ({"exact": "magic"}, "exact='magic'"),
    "not an approximation": ({"approximations": [fl.KFAC]}, "an instance such as fl.KFAC"),
    "twice": ({"approximations": [fl.KFAC(), fl.KFAC()]}, "twice"),
    "no approximations": ({"approximations": []}, "at least one"),
    "missing ready layer": ({"approximations": {"mine": {}}}, "mine has none for layer '0'"),
    "unwritable resume": ({"resume": "/proc/nothing/run.json"}, "cannot be"),
    "wrong resume ending": ({"resume": "run.txt"}, "expected one ending in .json"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_get_one_clear_sentence(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        fl.compare(net(), CE(), (X, Y), **arguments)


def test_examples_that_interact_are_found_by_the_check() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(model, CE(), (X, Y))


def test_a_random_model_is_found_by_the_check() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand_like(x)

    model = nn.Sequential(nn.Linear(5, 4), Noisy(), nn.Linear(4, 3))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(model, CE(), (X, Y))
    assert torch.equal(state, torch.get_rng_state())


def test_a_shuffling_loader_is_refused() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        fl.compare(net(), CE(), loader)


def test_monte_carlo_labels_follow_the_seed() -> None:
    first, same, other = (fl.compare(net(), CE(), (X, Y), fl.KFAC(), fisher="mc", seed=s) for s in (1, 1, 2))
    assert [r.value for r in first.rows] == [r.value for r in same.rows]
    assert [r.value for r in first.rows] != [r.value for r in other.rows]
    assert {r.fisher for r in first.rows} == {"mc"}


# -- found by trying to break it --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher", ["true", "mc"])
def test_a_first_operation_in_place_changes_neither_data_nor_results(dtype: torch.dtype, fisher: str) -> None:
    x, y = batch()
    x, linear = x.to(dtype), nn.Linear(5, 3)
    in_place, plain = (nn.Sequential(nn.ELU(inplace=i), linear).eval() for i in (True, False))
    before = x.clone()
    for call in (fl.exact_fisher, lambda *a, **k: fl.estimate(fl.Exact(), *a, **k)):
        found, expected = (call(m, fl.Categorical(), (x, y), fisher=fisher)["1"].dense() for m in (in_place, plain))
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
    assert found.value("0", "KFAC", "frobenius") == pytest.approx(expected.value("0", "KFAC", "frobenius"))


RESUMED = {
    "another activation": (lambda: (nn.Sequential(net()[0], nn.ReLU(), *list(net())[2:]), fl.Categorical()), None),
    "another likelihood": (lambda: (net(), fl.Categorical(dim=1)), None),
    "other matrices": (lambda: (net(), fl.Categorical()), "KFAC"),
    "other options": (lambda: (net(), fl.Categorical()), {"mine": fl.TN()}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_another_run_is_refused(case: str, tmp_path) -> None:
    make, candidates = RESUMED[case]
    path, first = tmp_path / "run.json", {"mine": fl.KFAC()}
    if candidates == "KFAC":
        first, candidates = (
            {"mine": fl.estimate(a, net(), fl.Categorical(), batch())} for a in (fl.EKFAC(), fl.KFAC())
        )
    fl.compare(net(), fl.Categorical(), batch(), first, resume=path)
    model, likelihood = make()
    with pytest.raises(ValueError, match="holds another comparison"):
        fl.compare(model, likelihood, batch(), candidates or first, resume=path)


def test_resuming_with_other_layers(tmp_path) -> None:
    path = tmp_path / "run.json"
    fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), resume=path)
    with pytest.raises(ValueError, match="holds another comparison"):
        fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), layers=["0"], resume=path)


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
        found = fl.compare(net(), fl.Categorical(), batch(n=1), fl.KFAC(), errors="all", dampings=[1e-4], dtype=dtype)
        for r in found.rows:
            exact = 1.0 if r.error in ("cosine", "trace_ratio", "damped_cosine", "damped_efficiency") else 0.0
            slack = max(r.noise, 1e-12 if dtype == torch.float64 else 1e-4)
            assert abs(r.value - exact) <= slack, (dtype, r)


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_extreme_scales_are_refused(scale: float) -> None:
    x = torch.randn(6, 5, dtype=torch.float64) * scale
    with pytest.raises(ValueError, match=r"rescale the inputs|NaN or infinite"):
        fl.compare(nn.Sequential(nn.Linear(5, 3, bias=False)), fl.Gaussian(), x, fl.KFAC())


def test_func_blocks_do_not_hide_examples_that_interact() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    with pytest.raises(ValueError, match="examples interact"):
        fl.compare(nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3)), CE(), (X, Y), exact="func")


def test_a_layer_called_with_a_named_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.l(input=x)

    assert fl.compare(Named(), CE(), (X, Y), fl.KFAC()).rows[0].checked < 1e-10


class Wrong(fl.Approximation, register=False):
    """Assembles something else."""

    def __init__(self, result: object) -> None:
        self.result = result

    def moments(self, stats: fl.LayerStats, matrix: fl.FisherMatrix | None = None) -> dict[str, torch.Tensor]:
        return {}

    def assemble(self, moments: dict[str, torch.Tensor], matrix: fl.FisherMatrix | None = None) -> object:
        return self.result


def test_a_wrong_matrix_is_named() -> None:
    for result in (torch.zeros(3), fl.estimate(fl.KFAC(), net(), CE(), (X, Y))["2"]):
        with pytest.raises(
            ValueError, match=r"(?s)Wrong.* assembled .* on layer '0', expected a FisherMatrix over \(4, 6\)"
        ):
            fl.compare(net(), CE(), (X, Y), Wrong(result), layers=["0"])
