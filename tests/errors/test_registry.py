"""One row of the registry says all about a measure: figures and the report read it, under whatever
name it stands.
"""

import dataclasses

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import errors, plots
from fisher_lab.errors import (
    MEASURES,
    DampedQuantities,
    Measured,
    NetworkQuantities,
    Quantities,
    measure,
)
from fisher_lab.plots.scale import Scale
from fisher_lab.report import answers
from fisher_lab.results import Comparison
from tests.helpers import random_stats


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone after it."""
    before = dict(MEASURES)
    yield
    MEASURES.clear()
    MEASURES.update(before)


def compared(error: str) -> Comparison:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(20, 5, dtype=torch.float64)
    methods = [fl.Diagonal(), fl.KFAC(), fl.KPSVD()]
    return fl.compare(model.double(), fl.Categorical(), x, methods, layers=["0"], errors=[error])


def test_a_cosine_under_another_name_is_recommended_and_drawn_at_one() -> None:
    formula = MEASURES["cosine"].formula

    def alignment(q):
        return formula(q)

    measure(exact=1.0)(alignment)
    found = compared("alignment")
    assert found.value("0", "KPSVD", "alignment") > found.value("0", "Diagonal", "alignment")
    assert answers(found)[0].sentence.startswith("Best by alignment: KPSVD")
    (line,) = [
        line
        for line in plots.errors(found, "alignment").axes[0].lines
        if line.get_label() == "_exact"
    ]
    assert line.get_ydata()[0] == 1.0


def test_without_a_value_at_the_exact_block_nothing_is_recommended_and_nothing_guessed() -> None:
    formula = MEASURES["cosine"].formula

    def alignment(q):
        return formula(q)

    measure()(alignment)
    found = compared("alignment")
    assert "KPSVD" not in answers(found)[0].sentence
    assert "Diagonal" not in answers(found)[0].sentence
    for figure in (
        plots.errors(found, "alignment"),
        plots.heatmap(found, "alignment"),
        plots.figures(found)["cost"],
    ):
        assert "exact" not in [text.get_text() for axes in figure.axes for text in axes.texts]
    assert Scale.of("alignment", [0.0, 0.5]).base is None
    # no front without a best value
    assert not plots.figures(found)["cost"].axes[0].lines[-1].get_xdata().size


@pytest.mark.parametrize("name", [m.name for m in MEASURES.values() if m.exact is not None])
def test_the_value_at_the_exact_block_is_what_the_row_says(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    exact = fl.exact_fisher(model, fl.Categorical(), x)[""]
    arguments: tuple[object, ...] = (exact, exact)
    if MEASURES[name].damped:
        arguments = (exact, exact, torch.ones(exact.shape, dtype=exact.dtype))
    if MEASURES[name].network:  # of one layer, whose block is the whole
        network = fl.network(model, fl.Categorical(), x)
        arguments = (network, network.step({"": exact}, 0.1), 0.1)
    assert getattr(errors, name)(*arguments) == pytest.approx(MEASURES[name].exact, abs=1e-6)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_row_names_every_quantity_that_its_formula_reads(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    exact = fl.exact_fisher(model, fl.Categorical(), x)[""]
    approx = fl.estimate(fl.KFAC(), model, fl.Categorical(), x)[""]
    if MEASURES[name].network and MEASURES[name].damped:
        network = fl.network(model, fl.Categorical(), x)
        pair = network.quantities(network.gradient, 0.1)
    elif MEASURES[name].network:
        pair = errors.Network([{"0": random_stats(0, N=4), "2": random_stats(1, N=4)}])
    elif MEASURES[name].damped:
        pair = errors.DampedPair(exact, approx, torch.ones(exact.shape, dtype=exact.dtype), 0.1)
    else:
        pair = errors.Pair(exact, approx)
    unsaid = dataclasses.replace(MEASURES[name], needs=None)
    assert set(unsaid.read(pair)) == set(MEASURES[name].needs)
    numbers = pair if isinstance(pair, errors.DampedQuantities) else pair.asked()
    assert set(numbers.known()) >= set(MEASURES[name].needs)


def test_a_measure_of_ones_own_of_the_whole_network() -> None:
    """What reads the network's quantities is one row, by name, with or without errors of layers
    beside it.
    """

    def inside(q: NetworkQuantities) -> Measured:
        return Measured(1 - q.square_outside / q.square_network, 0.0)

    measure(network=True, needs=["square_outside", "square_network"])(inside)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    found = fl.compare(model, fl.Categorical(), x, [fl.KFAC()], errors=["inside", "off_block"])
    inside, outside = (found.value("(all)", "Exact", name) for name in ("inside", "off_block"))
    assert inside == pytest.approx(1 - outside**2)
    assert all(row.checked < 1e-10 for row in found.rows)
    assert "inside" not in {
        row.error for row in fl.compare(model, fl.Categorical(), x, [fl.KFAC()], errors="all").rows
    }
    assert (
        answers(found)[0].sentence == "Nothing that was measured says which approximation is best."
    )


def test_off_block_of_columns() -> None:
    """The public function takes columns of layers, at once or in pieces of the examples."""
    columns = {"0": random_stats(0, N=4), "2": random_stats(1, N=4)}
    pieces = [
        {name: stats.examples(part) for name, stats in columns.items()}
        for part in (slice(0, 1), slice(1, 4))
    ]
    P = torch.cat(
        [stats.gradients().flatten(2).flatten(0, 1) for stats in columns.values()], 1
    )  # [R N, all parameters]
    F = P.T @ P
    split = columns["0"].dim
    outside = 2 * F[:split, split:].square().sum()
    expected = float((outside / F.square().sum()).sqrt())
    assert errors.off_block(columns) == pytest.approx(expected)
    assert errors.off_block(pieces) == pytest.approx(expected)


def test_quantities_of_layers_add_up() -> None:
    """Sums, the largest of spectral norms, nothing of what has no sum; None where nobody asked."""
    one = Quantities(
        eps=1e-7,
        inner=2.0,
        square_difference=Measured(3.0, 0.25),
        top_exact=5.0,
        spectrum_difference=1.0,
    )
    other = Quantities(
        eps=1e-16, inner=0.5, trace_exact=1.0, square_difference=Measured(4.0, 0.5), top_exact=6.0,
        top_difference=Measured(1.0, 0.0), spectrum_difference=1.0,
    )  # fmt: skip
    assert errors.total([one, other]).known() == {
        "eps": 1e-7,
        "inner": 2.5,
        "square_difference": (7.0, 0.75),
        "top_exact": 6.0,
    }
    assert one.trace_exact is None
    steps = [
        DampedQuantities(shift=1.0, rounding=x, xy=x, inverse_difference=Measured(x, 0.0))
        for x in (1.0, 2.0)
    ]
    assert errors.total(steps).known() == {
        "eps": 0.0,
        "rounding": 2.0,
        "xy": 3.0,
        "inverse_difference": (2.0, 0.0),
    }


def test_numbers_of_a_file_are_the_same_numbers() -> None:
    numbers = {
        "layer": "0",
        "damping": None,
        "trace_exact": 2.0,
        "square_difference": [1.0, 0.5],
        "unknown": 3.0,
    }
    assert Quantities.of(numbers) == Quantities(
        trace_exact=2.0, square_difference=Measured(1.0, 0.5)
    )


@pytest.mark.parametrize("name", ["frobenius_rescaled", "cosine"])
def test_a_measure_that_does_not_say_what_it_reads_has_standard_errors_too(name: str) -> None:
    formula = MEASURES[name].formula

    def mine(q):
        return formula(q)

    measure()(mine)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    found = fl.compare(
        model, fl.Categorical(), x, [fl.KFAC()], errors=[name, "mine"], standard_errors=True
    )
    rows = {(row.layer, row.error): row for row in found.rows}
    for layer in ("0", "2", "(all)"):
        assert rows[layer, "mine"].value == rows[layer, name].value
        assert rows[layer, "mine"].stderr == rows[layer, name].stderr
        assert rows[layer, "mine"].stderr is not None


def formula_named(name: str, qualname: str):
    """A formula under a name of its own, as a definition would give it."""

    def formula(q):
        return Measured(q.trace_exact, 0.0)

    formula.__name__ = name
    formula.__qualname__ = qualname
    return formula


@pytest.mark.parametrize("name", ["default", "all"])
def test_the_words_that_stand_for_several_measures_are_no_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Got an error measure named '{name}'"):
        measure()(formula_named(name, name))
    assert name not in MEASURES


@pytest.mark.parametrize("name", ["cosine", "mine"])
def test_a_measure_does_not_take_the_name_of_another(name: str) -> None:
    if name == "mine":
        measure()(formula_named(name, "first.<locals>.mine"))
    before = MEASURES[name]
    with pytest.raises(ValueError, match=f"^Got a second error measure named '{name}'"):
        measure()(formula_named(name, "second.<locals>.mine"))
    assert MEASURES[name] is before


def test_a_measure_that_is_defined_anew_takes_its_own_place() -> None:
    measure()(formula_named("mine", "mine"))
    again = formula_named("mine", "mine")
    measure(exact=1.0)(again)
    assert MEASURES["mine"].formula is again
