"""The Fisher of the whole network against one dense matrix, by autograd alone."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.whole_network import inverse
from fisher_lab.whole_network.inverse import Dense, Gram, Krylov

DAMPINGS = (1e-4, 1e-2, 1.0)


class Attention(nn.Module):
    """One block of a transformer over tokens, and classes from the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.query = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        weights = torch.softmax(self.query(h) @ self.key(h).mT, -1)
        return self.out(self.norm(h + weights @ h).mean(1))


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolution": (convolution, lambda: torch.randn(9, 1, 4, 4, dtype=torch.float64)),
    "attention": (Attention, lambda: torch.randint(7, (9, 5))),
    "tied": (Tied, lambda: torch.randn(9, 4, dtype=torch.float64)),
}
LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    build, inputs = CASES[request.param]
    torch.manual_seed(0)
    return build().double().eval(), inputs(), torch.randint(3, (9,))


def oracle(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """F `[d, d]` and the gradient `[d]` over all parameters in their own order."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def outputs(*given: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))

    jacobians = torch.autograd.functional.jacobian(outputs, values)
    J = torch.cat([j.flatten(2) for j in jacobians], 2)  # [N, C, d]
    p = torch.softmax(model(x).detach(), -1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    F = torch.einsum("ncp,nce,neq->pq", J, H, J)
    if loss.reduction == "mean":
        F = F / len(x)
    gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    return F, torch.cat([g.flatten() for g in gradients])


# The order of parameters in W (bias as last column) is not that of the module; what the tests
# compare does not depend on it.
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [9, 4])
def test_norms_eigenvalues_and_decreases(case, loss: nn.Module, cut: int) -> None:
    model, x, y = case
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])] if cut < len(x) else (x, y)
    F, g = oracle(model, loss, x, y)
    found = fl.network(model, loss, data)
    eigenvalues = torch.linalg.eigvalsh(F)
    assert found.dim == len(g)
    assert torch.allclose(torch.linalg.eigvalsh(found.dense()), eigenvalues, atol=1e-12)
    assert float(found.trace()) == pytest.approx(float(F.trace()), rel=1e-12)
    assert float(found.frobenius_norm()) == pytest.approx(float(F.norm()), rel=1e-12)
    assert float(found.spectral_norm()) == pytest.approx(float(eigenvalues[-1]), rel=1e-10)
    values, vectors = found.eigenpairs(3)
    assert torch.allclose(values, eigenvalues.flip(0)[:3], rtol=1e-10)
    for k in range(3):
        V = {name: v[k] for name, v in vectors.items()}
        assert float(found.flatten(V).norm()) == pytest.approx(1.0)
        assert float(found.quadratic(V)) == pytest.approx(float(values[k]), rel=1e-9)
    for damping in DAMPINGS:
        H = F + damping * float(F.trace()) / len(g) * torch.eye(len(g), dtype=F.dtype)
        best = float(g @ torch.linalg.solve(H, g))
        (form,) = found.best_decreases([damping])
        assert form.value == pytest.approx(best, abs=form.noise)
        assert form.noise < 1e-6 * best
        along_gradient = float(g @ g) ** 2 / (float(g @ H @ g) * best)
        assert found.efficiency(found.gradient, damping) == pytest.approx(along_gradient, rel=1e-8)
        exact = found.solve(found.gradient, damping)
        assert found.efficiency(exact, damping) == pytest.approx(1.0, abs=1e-8)


def test_products_and_blocks_against_the_dense_matrix(case) -> None:
    model, x, y = case
    found = fl.network(model, nn.CrossEntropyLoss(), (x, y))
    F = found.dense()
    torch.manual_seed(1)
    V = {name: torch.randn(2, *shape).double() for name, shape in found.shapes.items()}
    v = found.flatten(V)
    assert torch.allclose(found.flatten(found @ V), v @ F, atol=1e-13)
    assert torch.allclose(found.quadratic(V), ((v @ F) * v).sum(-1), atol=1e-13)
    norms = found.block_norms()
    rows = []
    for i, a in enumerate(found.shapes):
        rows.append(torch.cat([found.block(a, b) for b in found.shapes], 1))
        for j, b in enumerate(found.shapes):
            assert float(norms[i, j]) == pytest.approx(float(found.block(a, b).norm()), abs=1e-10)
    assert torch.allclose(torch.cat(rows), F, atol=1e-14)
    share = fl.compare(model, nn.CrossEntropyLoss(), (x, y), [fl.KFAC()], errors=["off_block"])
    assert float(found.off_block()) == pytest.approx(share.rows[0].value, rel=1e-10)


@pytest.mark.parametrize("route", [Dense, Gram, Krylov])
def test_every_route_to_the_inverse(case, route: type[inverse.Inverse]) -> None:
    model, x, y = case
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = fl.network(model, nn.CrossEntropyLoss(), halves)
    F = found.dense()
    g = found.flatten(found.gradient)
    own = route(found)
    shifts = [found.absolute_damping(damping) for damping in DAMPINGS]
    for shift, form in zip(shifts, own.form(g, shifts), strict=True):
        x_exact = torch.linalg.solve(F + shift * torch.eye(len(g), dtype=F.dtype), g)
        assert form.value == pytest.approx(float(g @ x_exact), abs=form.noise)
        assert form.noise < 1e-5 * form.value
        assert (own.solve(g, shift) - x_exact).norm() <= 1e-6 * x_exact.norm()


def test_the_route_depends_on_the_sizes(case, monkeypatch) -> None:
    """On both sides of every switch the numbers are the same."""
    model, x, y = case
    found = {}
    for route in ("dense", "gram", "krylov"):
        monkeypatch.setattr(inverse, "DENSE_DIM", 1500 if route == "dense" else 0)
        monkeypatch.setattr(inverse, "LANCZOS_STEPS", 3000 if route == "gram" else 0)
        F = fl.network(model, nn.CrossEntropyLoss(), (x, y))
        (form,) = F.best_decreases([1e-3])
        assert F.route == route
        found[route] = form.value
    assert found["gram"] == pytest.approx(found["dense"], rel=1e-8)
    assert found["krylov"] == pytest.approx(found["dense"], rel=1e-6)


def test_columns_that_do_not_fit_are_read_anew(case) -> None:
    model, x, y = case
    kept = fl.network(model, nn.CrossEntropyLoss(), (x, y))
    budget = 6 * 9 * 8 * kept.dim / 2**30  # a few examples' worth
    streamed = fl.network(model, nn.CrossEntropyLoss(), (x, y), memory=budget)
    assert kept.kept
    assert not streamed.kept
    V = {name: torch.ones(shape).double() for name, shape in kept.shapes.items()}
    assert torch.allclose(kept.flatten(kept @ V), streamed.flatten(streamed @ V), atol=1e-14)
    assert float(streamed.trace()) == pytest.approx(float(kept.trace()))
    with pytest.raises(ValueError, match="columns of all layers at once"):
        streamed.block_norms()


# -- as rows of a comparison -----------------------------------------------------------------------
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_network_efficiency(case, loss: nn.Module) -> None:
    model, x, y = case
    methods = [fl.KFAC(), fl.TN(), fl.EKFAC(), fl.MiniBlock(), fl.TENGraD(), fl.Diagonal()]
    found = fl.compare(
        model, loss, (x, y), methods, errors=["network_efficiency"], dampings=DAMPINGS
    )
    F = fl.network(model, loss, (x, y))
    dense = F.dense()
    g = F.flatten(F.gradient)
    steps = {m.label: fl.estimate(m, model, loss, (x, y)) for m in methods}
    steps["Exact"] = fl.estimate(fl.Exact(), model, loss, (x, y))
    assert len(found.rows) == len(DAMPINGS) * (len(methods) + 2)
    for row in found.rows:
        assert row.layer == "(all)"
        assert row.damping is not None
        y_ = g
        if row.approximation != "(gradient)":
            y_ = F.flatten(F.step(steps[row.approximation], row.damping))
        H = dense + F.absolute_damping(row.damping) * torch.eye(len(g), dtype=g.dtype)
        best = float(g @ torch.linalg.solve(H, g))
        true = float(y_ @ g) ** 2 / (float(y_ @ H @ y_) * best)
        assert row.value == pytest.approx(true, abs=max(row.noise, 1e-9))
        assert row.noise < 1e-5
        named = steps.get(row.approximation)
        if named is not None:
            step = F.step(named, row.damping)
            assert fl.errors.network_efficiency(F, step, row.damping) == pytest.approx(row.value)


def test_one_layer_loses_nothing_by_its_exact_block() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    found = fl.compare(
        nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y), [fl.KFAC()], errors="network_efficiency"
    )
    for row in found.rows:
        if row.approximation == "Exact":
            assert row.value == pytest.approx(1.0, abs=1e-9)


def test_beside_other_errors_and_from_a_file(case, tmp_path) -> None:
    model, x, y = case
    path = tmp_path / "run.json"
    asked = {"errors": ["trace", "damped_efficiency", "network_efficiency", "off_block"]}
    found = fl.compare(model, nn.CrossEntropyLoss(), (x, y), resume=path, **asked)
    again = fl.compare(model, nn.CrossEntropyLoss(), (x, y), resume=path, **asked)
    assert [r.value for r in again.rows] == pytest.approx([r.value for r in found.rows])
    loaded = fl.load_comparison(path)
    assert len(loaded.rows) == len(found.rows)
    assert "network" in str(loaded)
    fl.report.write_report(loaded, tmp_path / "run.html")
    sentence = fl.report.answers(loaded)[0].sentence
    assert "the whole network's step" in sentence
    assert "Exact" not in sentence  # a yardstick, no advice


@pytest.mark.parametrize("given", [[fl.Exact(), fl.KFAC()], {"Exact": fl.Exact()}])
def test_the_exact_blocks_as_a_candidate_are_one_row_with_their_yardstick(given) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    asked = {"errors": ["network_efficiency", "off_block"], "dampings": [0.1]}
    found = fl.compare(model, nn.CrossEntropyLoss(), (x, y), given, **asked)
    plain = fl.compare(model, nn.CrossEntropyLoss(), (x, y), [fl.KFAC()], **asked)
    measured = [(row.approximation, row.error) for row in found.rows]
    assert len(set(measured)) == len(measured)
    for label in ("Exact", "(gradient)"):
        expected = plain.value("(all)", label, "network_efficiency", 0.1)
        value = found.value("(all)", label, "network_efficiency", 0.1)
        assert value == pytest.approx(expected, rel=1e-9)


# -- refusals --------------------------------------------------------------------------------------
def test_what_cannot_be_asked() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    F = fl.network(model, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ValueError, match=r"Got nothing for layer '2'"):
        F @ {"0": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=r"Got shape \(4, 5\) for layer '0'"):
        F @ {"0": torch.zeros(4, 5), "2": torch.zeros(3, 5)}
    for damping in (0, -1.0, float("nan"), float("inf"), "a"):
        with pytest.raises(ValueError, match="expected a positive number"):
            F.efficiency(F.gradient, damping)
    with pytest.raises(ValueError, match="Got k=0"):
        F.eigenpairs(0)
    with pytest.raises(ValueError, match="Got layer '1'"):
        F.block("0", "1")
    with pytest.raises(ValueError, match="Got no matrix for layer '2'"):
        F.step({"0": fl.estimate(fl.KFAC(), model, nn.CrossEntropyLoss(), (x, y))["0"]}, 1.0)
    with pytest.raises(ValueError, match="needs the columns of all layers at once"):
        fl.compare(
            model,
            nn.CrossEntropyLoss(),
            (x, y),
            [fl.KFAC()],
            errors="network_efficiency",
            memory=2e-6,
        )


def test_a_step_of_zeros_reaches_nothing() -> None:
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    F = fl.network(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y))
    assert F.efficiency({"": torch.zeros(3, 6)}, 0.1) == 0.0


@pytest.mark.parametrize(
    ("label", "error"),
    [
        ("Exact", "network_efficiency"),
        ("(gradient)", "network_efficiency"),
        ("Exact", "off_block"),
    ],
)
def test_a_candidate_under_the_name_of_a_yardstick_is_refused(label: str, error: str) -> None:
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    model = nn.Linear(5, 3)
    given = {label: fl.Diagonal()}
    with pytest.raises(ValueError, match=f"^Got an approximation named '{re.escape(label)}'"):
        fl.compare(model, nn.CrossEntropyLoss(), (x, y), given, errors=error)
    # no yardstick stands beside the others
    fl.compare(model, nn.CrossEntropyLoss(), (x, y), given, errors="trace")


class Rounding(nn.Module):
    """Computes a part of its forward pass in a precision of its own."""

    def __init__(self, inside: torch.dtype) -> None:
        super().__init__()
        self.inside = inside
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        squares = h.to(self.inside).square()
        return self.last((squares + 1).to(h.dtype))


def test_the_noise_of_efficiencies_knows_the_precision_inside() -> None:
    """In compare and in budget: the rows of a model that rounds differ by less than their noise
    from those of one that does not, which lies far below.
    """
    torch.manual_seed(0)
    rounded = Rounding(torch.float32).double()
    exact = Rounding(torch.float64).double()
    exact.load_state_dict(rounded.state_dict())
    x = torch.randn(12, 4, dtype=torch.float64)
    y = torch.randint(3, (12,))
    asked = {"errors": "network_efficiency", "dampings": [1e-2], "progress": False}
    found = {}
    for model in (rounded, exact):
        loss = nn.CrossEntropyLoss()
        rows = fl.compare(model, loss, (x, y), fl.KFAC(), **asked).rows
        stages = fl.budget(model, loss, (x, y), fl.KFAC()).stages
        found[model] = [(row.value, row.noise) for row in rows]
        found[model] += [(stage.efficiency, stage.noise) for stage in stages[1:]]
    least = 16 * torch.finfo(torch.float32).eps
    for (value, noise), (expected, own) in zip(found[rounded], found[exact], strict=True):
        assert own < 1e-10 < least < noise < 1e-2
        assert value != expected
        assert abs(value - expected) <= noise
