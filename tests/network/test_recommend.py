"""What to use: the rule, what is as good by chance, and that a file gives the same answer."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab.optim.methods import DEFAULTS
from fisher_lab.results import ALL, Comparison, Cost, Recommendation, Row

LOSS = nn.CrossEntropyLoss()
METHODS = [fl.KFAC(), fl.TKFAC(), fl.EKFAC(), fl.TENGraD(batch=1000), fl.Diagonal()]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(200, 6, dtype=torch.float64), torch.randint(3, (200,))


@pytest.fixture(scope="module")
def found(model, data) -> Comparison:
    errors = ["default", "network_efficiency"]
    return fl.compare(model, LOSS, data, METHODS, errors=errors, dampings=[0.1, 0.01])


def rows(values: dict[str, float], layer: str = "0", damping: float = 0.01) -> tuple[Row, ...]:
    named = values.items()
    return tuple(Row(layer, k, "damped_efficiency", v, 1e-9, damping) for k, v in named)


def test_the_network_leads_and_what_is_exact_by_its_making_is_left_aside(found) -> None:
    answer = found.recommend()
    assert isinstance(answer, Recommendation)
    assert [choice.layer for choice in answer.choices] == [ALL, "0", "2"]
    assert answer.choices[0].measure == "network_efficiency"
    assert answer.own == ("TENGraD(batch=1000)",)
    for choice in answer.choices:
        values = {}
        for row in found.rows:
            key = (row.layer, row.error, row.damping)
            if key == (choice.layer, choice.measure, 0.01):
                values[row.approximation] = row.value
        known = {"KFAC", "TKFAC", "EKFAC", "Diagonal"}
        best = max(values[label] for label in known)
        assert choice.efficiency == values[choice.approximation] >= 0.98 * best
        assert choice.approximation not in choice.alike
        assert set(choice.alike) <= known


def test_dampings_and_costs(found, model, data) -> None:
    F = fl.network(model, LOSS, data)
    for damping in (0.1, 0.01):
        first, second, _ = found.recommend(damping).choices
        assert first.absolute_damping == pytest.approx(F.absolute_damping(damping))
        block = fl.exact_fisher(model, LOSS, data)["0"]
        assert second.absolute_damping == pytest.approx(fl.errors.absolute_damping(block, damping))
        costs = [cost for cost in found.costs if cost.approximation == first.approximation]
        assert len(costs) == 2
        assert first.bytes == sum(cost.bytes for cost in costs)
        assert first.refresh == pytest.approx(sum(cost.seconds + cost.inverse for cost in costs))
        assert first.step == pytest.approx(sum(cost.step for cost in costs))
        assert 0 < first.step < 1


def test_a_file_gives_the_same_answer(found, tmp_path) -> None:
    for name in ("run.json", "run.csv"):
        again = fl.load_comparison(found.save(tmp_path / name))
        assert str(again.recommend()) == str(found.recommend())
        assert again.recommend() == found.recommend()


def test_the_line_trains(found, model, data) -> None:
    line = found.recommend().optimizer
    assert line is not None
    opt = eval(line, {"fl": fl, "model": model, "likelihood": LOSS})
    group = opt.param_groups[0]
    assert group["lr"] == DEFAULTS["lr"]
    assert opt.kl_clip == DEFAULTS["kl_clip"]
    assert opt.observe_every == DEFAULTS["observe_every"]
    assert opt.refresh_every == DEFAULTS["refresh_every"]
    expected = found.recommend().choices[0].absolute_damping
    assert group["damping"] == pytest.approx(expected, rel=0.05)


def test_of_those_that_keep_nearly_as_much_the_smallest_is_taken() -> None:
    costs = (Cost("0", "A", 1, 100), Cost("0", "B", 1, 50), Cost("0", "C", 1, 10))
    measured = Comparison(rows({"A": 0.5, "B": 0.495, "C": 0.4}), costs)
    (choice,) = measured.recommend().choices
    assert choice.approximation == "B"
    assert choice.alike == ("A",)  # the best, which is hardly better
    assert choice.refresh is None


def test_chance_names_others() -> None:
    matrix = [[4e-4, 0.0, 0.0], [0.0, 4e-4, 0.0], [0.0, 0.0, 4e-4]]
    table = {
        "layer": "0",
        "error": "damped_efficiency",
        "damping": 0.01,
        "approximations": ["A", "B", "C"],
        "matrix": matrix,
    }
    # the difference of two has the standard error 0.0283
    measured = Comparison(rows({"A": 0.5, "B": 0.45, "C": 0.44}), covariances=(table,))
    (choice,) = measured.recommend().choices
    assert (choice.approximation, choice.alike) == ("A", ("B",))
    difference = measured.difference("0", "A", "B", "damped_efficiency", 0.01)
    assert difference.value == pytest.approx(0.05)
    assert difference.stderr == pytest.approx(math.sqrt(8e-4))


def test_the_chance_of_a_difference_is_that_of_other_examples(model) -> None:
    """Against 60 data sets: the steps of the first one, judged by each of the others."""
    torch.manual_seed(2)
    N = 400

    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(N, 6, dtype=torch.float64)
        # another rule than the model's: a gradient that is no chance itself
        p = torch.softmax(3 * x[:, :3], -1)
        return x, torch.multinomial(p, 1).squeeze(1)

    first = drawn()
    errors = ["network_efficiency"]
    methods = [fl.KFAC(), fl.Diagonal()]
    found = fl.compare(model, LOSS, first, methods, errors=errors, dampings=[0.1])
    expected = found.difference(ALL, "KFAC", "Diagonal", "network_efficiency", 0.1).stderr
    F = fl.network(model, LOSS, first)
    (best,) = F.best_decreases([0.1])
    steps = [F.step(fl.estimate(method, model, LOSS, first), 0.1) for method in methods]
    gaps = []
    for _ in range(60):
        other = fl.network(model, LOSS, drawn())
        shares = []
        for step in steps:
            y = other.flatten(step)
            slope = float(y @ other.flatten(other.gradient))
            curvature = float(other.quadratic(step)) + F.absolute_damping(0.1) * float(y @ y)
            shares.append(slope**2 / curvature / best.value)
        gaps.append(shares[0] - shares[1])
    spread = float(torch.tensor(gaps).std())
    assert 0.7 * spread < expected < 1.4 * spread


def test_what_cannot_be_answered_is_told(found, model, data) -> None:
    plain = fl.compare(model, LOSS, data, [fl.KFAC()], errors="frobenius")
    with pytest.raises(ValueError, match=r"Got no damped_efficiency and no network_efficiency"):
        plain.recommend()
    assert "What to use" not in str(plain)
    with pytest.raises(
        ValueError, match=r"Got damping=0\.5, expected one of those measured: 0\.01"
    ):
        found.recommend(0.5)


def test_without_coupling_it_says_so(model, data) -> None:
    blocks = fl.compare(model, LOSS, data, [fl.KFAC(), fl.Shampoo()])
    assert blocks.settings.dampings == [0.01]
    text = str(blocks.recommend())
    assert "What couples layers is left out" in text
    assert "all layers" in text
    assert str(blocks).startswith("What to use")
    # an optimizer applies the root of Shampoo's inverse, another step than the one judged
    assert set(blocks.settings.code or {}) == {"KFAC"}


def test_matrices_of_ones_own_have_no_optimizer(model, data) -> None:
    kfac = fl.estimate(fl.KFAC(), model, LOSS, data)
    mine = fl.compare(model, LOSS, data, {"mine": kfac})
    assert mine.recommend().optimizer is None
    assert "opt =" not in str(mine.recommend())


def test_files_of_before_have_no_times_of_steps(found) -> None:
    bare = [Cost(cost.layer, cost.approximation, cost.seconds, cost.bytes) for cost in found.costs]
    older = replace(found, costs=tuple(bare))
    (first, *_) = older.recommend().choices
    assert first.refresh is None
    assert first.step is None
    assert " - " in str(older.recommend())
