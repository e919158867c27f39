"""Standard errors by the infinitesimal jackknife: against finite differences in the weights, and a
bootstrap.
"""

import math

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import approximations, errors
from fisher_lab.approximations import Columns, Iterated, Means, build
from fisher_lab.diagnose import influence, standard_errors
from fisher_lab.matrices import Dense, DiagonalMatrix, Kronecker, LowRank
from fisher_lab.statistics import LayerStats, Sums, contractions
from tests.helpers import random_stats

ERRORS = ["trace", "frobenius", "frobenius_rescaled", "cosine", "spectral"]
CANDIDATES = [
    fl.KFAC(), fl.TKFAC(), fl.TN(), fl.Shampoo(), fl.KPSVD(), fl.Diagonal(), fl.LNGD(),
    fl.MiniBlock(), fl.MiniBlock(linear="col"), fl.MiniBlock(linear="row_avg"),
]  # fmt: skip


class Renamed(fl.KFAC, register=False):
    """KFAC whose factors go by other names, which were taken for columns."""

    def moments(self, sums):
        found = super().moments(sums)
        return {"a": found["A"], "g": found["G"]}

    def assemble(self, moments):
        return Kronecker((moments["g"], moments["a"]))


class Doubled(Means):
    """Means that mix otherwise, and are means all the same."""

    def mix(self, new, weight):
        return super().mix(new, weight)


class MixedByItself(fl.TKFAC, register=False):
    """As TKFAC."""

    def moments(self, sums):
        return Doubled({"w": sums.left(), "block": sums.right()}, sums.shape)

    def assemble(self, moments):
        return Kronecker(
            (moments["w"], moments["block"] / moments["block"].diagonal(dim1=1, dim2=2).sum())
        )


class TwoSweeps(Iterated, register=False):
    """The diagonal of F, each entry times its share of the trace, which only the second sweep
    knows.
    """

    sweeps = 2

    def moments(self, sums):
        return {"stats": sums.squares().flatten(0, 1)}

    def assemble(self, moments):
        return DiagonalMatrix(moments["stats"])

    def moments_at(self, sums, matrix):
        squares = sums.squares().flatten(0, 1)
        return {"stats": squares * matrix.values / matrix.trace()}


class OfEarlierVersions(fl.Approximation, register=False):
    """As TwoSweeps, written as every approximation once was."""

    sweeps = 2

    def moments(self, stats, matrix=None):
        squares = stats.squares().flatten(0, 1)
        return {"stats": squares if matrix is None else squares * matrix.values / matrix.trace()}

    def assemble(self, moments, matrix=None):
        return DiagonalMatrix(moments["stats"])


class KeepsColumns(fl.Approximation, register=False):
    """The diagonal of F from all examples."""

    def moments(self, sums):
        return Columns(sums.stats)

    def assemble(self, moments):
        return DiagonalMatrix(contractions.squares(moments.weighted()).flatten(0, 1))


class KeepsChosen(fl.Approximation, register=False):
    """The diagonal from some examples, in an order of its own."""

    def __init__(self, index=None, weight=None):
        self.index = index
        self.weight = weight

    def moments(self, sums):
        if sums.N == 1:
            return Columns(sums.stats)
        index = self.index
        if index is None:
            index = torch.arange(sums.N).flip(0)
        return Columns(sums.stats.examples(index), self.weight)

    def assemble(self, moments):
        return DiagonalMatrix(contractions.squares(moments.weighted()).flatten(0, 1))


class KeepsSums(KeepsChosen, register=False):
    """Columns that are no example's."""

    def moments(self, sums):
        twice = sums.stats.like(sums.a, sums.g * sums.N)
        return Columns(twice)


USERS = [
    Renamed(), MixedByItself(), TwoSweeps(), OfEarlierVersions(), KeepsColumns(), KeepsChosen(),
]  # fmt: skip


def replicated(stats: LayerStats, copies: int, extra: int) -> LayerStats:
    """Every example `copies` times, one of them once more: weights moved by 1 / (N copies + 1)
    towards it.
    """
    index = torch.cat([torch.arange(stats.N).repeat(copies), torch.tensor([extra])])
    return stats.like(stats.a[index], stats.g[:, index])


def error_values(
    stats: LayerStats, approximation: approximations.Approximation
) -> dict[str, float]:
    pair = errors.Pair(Dense(contractions.dense(stats), stats.shape), build(approximation, stats))
    return {m.name: m.formula(pair).value for m in errors.chosen(ERRORS)}


def influences(
    stats: LayerStats, approximation: approximations.Approximation
) -> dict[str, torch.Tensor]:
    sums = Sums(stats)
    exact = LowRank(sums)
    pair = errors.Pair(exact, build(approximation, stats))
    quantities = influence.of_pair(sums, pair, approximation, influence.of_exact(sums, exact), True)
    assert quantities is not None
    return {
        m.name: influence.of_error(m, pair.asked(m.needs), quantities)
        for m in errors.chosen(ERRORS)
    }


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("approximation", CANDIDATES + USERS, ids=lambda a: a.label)
def test_influences_are_derivatives_in_the_weights(
    approximation: approximations.Approximation, T: int, monkeypatch
) -> None:
    # also where eigenvalues are not far enough apart for a standard error
    monkeypatch.setattr(influence, "SEPARATION", 0.0)
    stats = random_stats(3, "relu", N=7, T=T, R=2, d_out=3, d_in=4)
    found = influences(stats, approximation)
    here = error_values(stats, approximation)
    copies = 3000
    for n in (0, 4):
        there = error_values(replicated(stats, copies, n), approximation)
        for name in ERRORS:
            if (approximation.label, name) == ("KPSVD", "trace"):
                assert found[name] is None  # products of two numbers near zero
                continue
            slope = (there[name] - here[name]) * (stats.N * copies + 1)
            tolerance = 5e-3 * (abs(slope) + float(found[name].abs().max())) + 1e-6
            assert abs(float(found[name][n]) - slope) < tolerance, (
                name,
                float(found[name][n]),
                slope,
            )


@pytest.mark.parametrize("weight", [None, [0.7, 0.3]])
def test_influences_are_of_the_examples_that_were_kept(weight) -> None:
    """Those of a subset were given to the first examples."""
    stats = random_stats(3, N=7, R=2, d_out=3, d_in=4)
    places = torch.tensor([5, 1])
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    sums = Sums(stats)
    candidate = KeepsChosen(places, w)
    pair = errors.Pair(LowRank(sums), build(candidate, stats))
    found = influence.of_pair(sums, pair, candidate, influence.of_exact(sums, pair.exact), False)
    assert found is not None
    traces = stats.gradients().square().sum((0, 2, 3, 4))[places]
    w = torch.full((2,), 0.5, dtype=torch.float64) if w is None else w
    expected = torch.zeros(7, dtype=torch.float64)
    expected[places] = 7 * w * (traces - w @ traces)
    torch.testing.assert_close(found["trace_approx"], expected)


def test_columns_that_are_no_examples_have_no_standard_error() -> None:
    stats = random_stats(3, N=7, R=2, d_out=3, d_in=4)
    sums = Sums(stats)
    pair = errors.Pair(LowRank(sums), build(KeepsSums(), stats))
    exact = influence.of_exact(sums, pair.exact)
    assert influence.of_pair(sums, pair, KeepsSums(), exact, False) is None


# without the mean over rows
@pytest.mark.parametrize("approximation", CANDIDATES[:-1], ids=lambda a: a.label)
def test_dead_units_change_no_influence(approximation: approximations.Approximation) -> None:
    """Inputs and outputs that are always zero; the roots of zero eigenvalues have no derivative."""
    stats = random_stats(3, N=7, R=2, d_out=3, d_in=4)
    dead = LayerStats(
        torch.nn.functional.pad(stats.a, (1, 1)), torch.nn.functional.pad(stats.g, (1, 0))
    )
    expected, found = influences(stats, approximation), influences(dead, approximation)
    for name in ERRORS:
        if expected[name] is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)


def spread(first: float, second: float, count: int = 40) -> LayerStats:
    """Columns along two directions of W `[2, 1]`, whose mean squares are the two numbers."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(1, count, 1, 1, 2, generator=generator, dtype=torch.float64)
    g = g * torch.tensor([first, second], dtype=torch.float64).sqrt() / g.square().mean(1).sqrt()
    g[..., 1] *= torch.sign(g[..., 0])
    return LayerStats(torch.ones(count, 1, 1, 1, dtype=torch.float64), g)


def asked(stats: LayerStats, approximation, spectral: bool = True) -> influence.Influences:
    sums = Sums(stats)
    exact = LowRank(sums)
    matrix = build(approximation, stats)
    pair = errors.Pair(exact, matrix)
    found = influence.of_pair(sums, pair, approximation, influence.of_exact(sums, exact), spectral)
    assert found is not None
    return found


@pytest.mark.parametrize(("second", "known"), [(0.01, True), (0.95, False)])
def test_a_spectral_norm_has_a_standard_error_only_where_one_eigenvalue_is_ahead(
    second: float, known: bool
) -> None:
    """Of two that are alike the larger one moves otherwise than each of them."""
    stats = spread(1.0, second)
    # uncorrelated directions: F is diagonal up to what the sample left
    assert ("top_exact" in asked(stats, fl.KFAC())) == known


def test_both_ends_of_a_spectrum_that_are_alike_give_no_standard_error() -> None:
    """F - diag(F) of two directions has the eigenvalues c and -c."""
    stats = spread(1.0, 0.5)
    found = asked(stats, fl.Diagonal())
    assert "top_difference" not in found
    assert "square_difference" in found


def test_the_largest_layer_has_a_standard_error_only_where_it_is_ahead() -> None:
    def parts(*norms):
        return [errors.Quantities(top_exact=norm) for norm in norms]

    alone = {"top_exact": torch.tensor([1.0, -1.0, 1.0, -1.0])}  # a standard error of 0.5
    other = {"top_exact": torch.zeros(4)}
    for norms, known in (((3.0, 1.0), True), ((3.0, 2.5), False), ((3.0, 3.0), False)):
        found = standard_errors._summed([alone, other], parts(*norms))
        assert ("top_exact" in found) == known
    # a small layer need not have one itself
    assert "top_exact" in standard_errors._summed([alone, {}], parts(3.0, 1.0))
    assert "top_exact" not in standard_errors._summed([{}, alone], parts(3.0, 1.0))


@pytest.mark.parametrize(("batch", "known"), [(4, False), (12, True), (20, True)])
def test_a_block_of_some_of_the_examples_has_standard_errors_of_its_traces_only(
    batch: int, known: bool
) -> None:
    """|F - F^|^2 is then a square of sampling noise, whose first order is up to twice too large."""
    stats = random_stats(3, N=12, R=2, d_out=3, d_in=4)
    found = asked(stats, fl.TENGraD(batch=batch), spectral=False)
    assert "trace_approx" in found
    for name in ("inner", "square_approx", "square_difference"):
        assert (name in found) == known


def test_the_fixed_matrix_of_a_user_moves_only_with_the_exact_block() -> None:
    stats = random_stats(5, N=6, R=2, d_out=2, d_in=3)
    sums = Sums(stats)
    exact, matrix = LowRank(sums), build(fl.KFAC(), stats)
    pair = errors.Pair(exact, matrix)
    found = influence.of_pair(sums, pair, None, influence.of_exact(sums, exact), True)
    assert found is not None
    assert not found["trace_approx"].any()
    assert not found["square_approx"].any()
    assert found["inner"].any()


def test_eigenvalue_corrected_approximations_have_no_standard_error() -> None:
    model, data = digits(30)
    rows = fl.compare(
        model, nn.CrossEntropyLoss(), data, [fl.EKFAC(), fl.KFAC()], standard_errors=True
    ).rows
    assert {row.approximation for row in rows if row.stderr is not None} == {"KFAC"}


class Largest(Means):
    """The largest numbers that any example has."""

    def mix(self, new, weight):
        return self.with_tensors({"x": torch.maximum(self["x"], new["x"])})


class NoMean(fl.Approximation, register=False):
    """Of moments that are no means over the examples."""

    def __init__(self, kind):
        self.kind = kind

    def moments(self, sums):
        P = sums.gradients().square().sum(0).flatten(1, 2)  # [N, rows, d_in]
        if self.kind == "largest":
            return Largest({"x": P.amax(0)}, sums.shape)
        return {"x": P.mean(0).sqrt()}

    def assemble(self, moments):
        return DiagonalMatrix(moments["x"])


@pytest.mark.parametrize("kind", ["largest", "root of a mean"])
def test_moments_that_are_no_means_have_no_standard_error(kind) -> None:
    """A user's own mixing was taken for a mean where it had at most two moments."""
    stats = random_stats(5, N=6, R=2, d_out=2, d_in=3)
    sums = Sums(stats)
    exact = LowRank(sums)
    candidate = NoMean(kind)
    pair = errors.Pair(exact, build(candidate, stats))
    assert influence.of_pair(sums, pair, candidate, influence.of_exact(sums, exact), True) is None


class HalfMean(fl.Approximation, register=False):
    """One of its moments is no mean over the examples."""

    def moments(self, sums):
        P = sums.gradients().square().sum(0).flatten(1, 2)  # [N, rows, d_in]
        return {"x": P.mean(0), "y": P.mean(0).sqrt()}

    def assemble(self, moments):
        return DiagonalMatrix(moments["x"] + moments["y"])


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1, 1e4, 1e9])
def test_a_small_moment_that_is_no_mean_does_not_hide_behind_a_large_one(scale: float) -> None:
    stats = random_stats(5, N=6, R=2, d_out=2, d_in=3)
    stats = stats.like(stats.a, stats.g * scale)
    sums = Sums(stats)
    exact = LowRank(sums)
    candidate = HalfMean()
    pair = errors.Pair(exact, build(candidate, stats))
    assert influence.of_pair(sums, pair, candidate, influence.of_exact(sums, exact), True) is None


def test_standard_errors_do_not_depend_on_the_names_of_moments() -> None:
    model, data = digits(60)
    found = {}
    for candidate in (fl.KFAC(), Renamed()):
        rows = fl.compare(
            model, nn.CrossEntropyLoss(), data, [candidate], errors=["trace"], standard_errors=True
        ).rows
        found[candidate.label] = [row.stderr for row in rows]
    assert None not in found["KFAC"]
    assert found["Renamed"] == pytest.approx(found["KFAC"], rel=1e-9)


def test_all_errors_with_standard_errors_on_several_layers() -> None:
    """It raised an AttributeError after everything was measured."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    comparison = fl.compare(
        model,
        nn.CrossEntropyLoss(),
        data,
        [fl.KFAC(), fl.Diagonal()],
        errors="all",
        standard_errors=True,
    )
    assert {row.layer for row in comparison.rows if row.stderr is not None} == {"0", "2", "(all)"}


def digits(examples: int = 150) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    from fisher_lab import problems

    problem = problems.load("digits_mlp", examples=examples, steps=30)
    return problem.model, problem.data


def test_standard_errors_agree_with_a_bootstrap_on_the_digits() -> None:
    model, (x, y) = digits(400)
    chosen = [fl.KFAC(), fl.TN(), fl.Shampoo(), fl.Diagonal()]
    names = ["trace_ratio", "frobenius", "cosine", "spectral"]
    comparison = fl.compare(
        model,
        nn.CrossEntropyLoss(),
        (x, y),
        chosen,
        errors=names,
        layers=["2"],
        standard_errors=True,
    )
    from fisher_lab._passes.setup import Setup
    from fisher_lab._passes.source import Source

    stats = next(iter(Source(Setup(model, nn.CrossEntropyLoss(), (x, y), layers=["2"])).sweep()))[
        "2"
    ]
    generator, draws = torch.Generator().manual_seed(0), 120
    seen: dict[tuple[str, str], list[float]] = {}
    for _ in range(draws):
        index = torch.randint(stats.N, (stats.N,), generator=generator)
        again = stats.like(stats.a[index], stats.g[:, index])
        exact = Dense(contractions.dense(again), again.shape)
        for approximation in chosen:
            pair = errors.Pair(exact, build(approximation, again))
            for m in errors.chosen(names):
                seen.setdefault((approximation.label, m.name), []).append(m.formula(pair).value)
    for row in comparison.rows:
        bootstrap = float(torch.tensor(seen[row.approximation, row.error]).std())
        if row.stderr is not None and bootstrap > 1e-9:
            assert 0.7 < row.stderr / bootstrap < 1.4, (row, bootstrap)
    missing = [row.error for row in comparison.rows if row.stderr is None]
    assert set(missing) <= {"spectral"}  # where no eigenvalue is ahead
    pairs = zip(seen["KFAC", "frobenius"], seen["TN", "frobenius"], strict=True)
    bootstrap = float(torch.tensor([a - b for a, b in pairs]).std())
    found = comparison.difference("2", "KFAC", "TN", "frobenius")
    assert 0.7 < found.stderr / bootstrap < 1.4
    assert found.value == comparison.value("2", "KFAC", "frobenius") - comparison.value(
        "2", "TN", "frobenius"
    )


def test_standard_errors_reach_files_and_all_layers_and_are_refused_for_pieces(tmp_path) -> None:
    model, (x, y) = digits(40)
    arguments = {"errors": "default", "standard_errors": True}
    comparison = fl.compare(model, nn.CrossEntropyLoss(), (x, y), [fl.KFAC(), fl.TN()], **arguments)
    for ending in (".json", ".csv"):
        again = fl.load_comparison(comparison.save(tmp_path / f"run{ending}"))
        assert again.rows == comparison.rows
        assert again.difference("(all)", "KFAC", "TN", "frobenius") == comparison.difference(
            "(all)", "KFAC", "TN", "frobenius"
        )
    total = [row for row in comparison.rows if row.layer == "(all)" and row.error == "frobenius"]
    assert all(row.stderr is not None and 0 < row.stderr < row.value for row in total)
    summed = fl.compare(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        (x, y),
        [fl.KFAC(), fl.TN()],
        errors=["frobenius"],
        standard_errors=True,
    )
    one = {(r.layer, r.approximation): r.stderr for r in comparison.rows if r.error == "frobenius"}
    for row in summed.rows:
        assert math.isclose(row.stderr, one[row.layer, row.approximation], rel_tol=1e-6)
    with pytest.raises(ValueError, match="all examples at once"):
        fl.compare(
            model, nn.CrossEntropyLoss(), [(x, y), (x, y)], [fl.KFAC()], standard_errors=True
        )
    with pytest.raises(KeyError, match="standard_errors=True"):
        fl.compare(model, nn.CrossEntropyLoss(), (x, y), [fl.KFAC(), fl.TN()]).difference(
            "2", "KFAC", "TN", "frobenius"
        )
