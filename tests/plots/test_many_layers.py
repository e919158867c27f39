"""Figures of any number of layers, of some layers and methods, and of a paper's columns."""

import math

import numpy as np
import pytest

import fisher_lab as fl
from fisher_lab import plots
from fisher_lab.plots.reading import alike
from fisher_lab.results import ALL, Comparison, Cost, Row

LABELS = ("KFAC", "EKFAC", "TN")


def deep(layers, labels=LABELS, error="frobenius", damping=None):
    names = [f"decoder.block.{index}.mlp" for index in range(layers)]
    rows, costs, traces = [], [], []
    for place, layer in enumerate([*names, ALL]):
        for index, label in enumerate(labels):
            value = 0.1 * (index + 1) + 0.01 * place
            rows.append(Row(layer, label, error, value, 1e-9, damping))
            costs.append(Cost(layer, label, value, 1000 * (index + 1)))
            pair = {"trace_exact": 1.0 + place, "trace_approx": 1.0 + place + value}
            traces.append({"layer": layer, "approximation": label, "damping": None} | pair)
    settings = {"fisher": "true", "N": 7, "problem": {"name": "toy"}}
    return Comparison(tuple(rows), tuple(costs), settings, tuple(traces))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


@pytest.mark.parametrize("draw", [plots.errors, plots.heatmap, plots.traces, plots.cost])
@pytest.mark.parametrize("layers", [1, 9, 100])
def test_no_number_of_layers_makes_a_figure_larger_than_a_page(draw, layers):
    figure = draw(deep(layers))
    plots.svg(figure)
    width, height = figure.get_size_inches()
    assert width <= 16
    assert height <= 10


def test_of_many_layers_errors_are_lines_along_the_depth():
    comparison = deep(40)
    figure = plots.errors(comparison)
    (axes,) = figure.axes
    assert not axes.containers
    assert legend(figure) == list(LABELS)
    line = next(line for line in axes.lines if line.get_label() == "EKFAC")
    np.testing.assert_array_equal(line.get_xdata(), range(40))
    np.testing.assert_allclose(line.get_ydata(), 0.2 + 0.01 * np.arange(40))
    # all layers together are no further layer: a mark apart, without a line to it
    alone = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_ydata()[0] for line in alone] == pytest.approx([0.5, 0.6, 0.7])
    assert all(line.get_xdata()[0] > 41 for line in alone)
    assert ticks(axes)[0] == "decoder.block.0.mlp"
    assert ticks(axes)[-1] == "all layers"


def test_of_many_layers_traces_are_lines_beside_the_exact_one():
    figure = plots.traces(deep(40))
    exact, first = figure.axes[0].lines[:2]
    assert legend(figure) == ["exact", *LABELS]
    np.testing.assert_allclose(exact.get_ydata(), 1.0 + np.arange(40))
    np.testing.assert_allclose(first.get_ydata(), 1.1 + 1.01 * np.arange(40))


def test_of_many_layers_some_have_panels_and_the_title_says_so():
    figure = plots.training({0: deep(40), 10: deep(40)})
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == 12
    assert titles[0] == "decoder.block.0.mlp"
    assert titles[-1] == "all layers"
    assert figure.get_suptitle() == "toy, true Fisher, N = 7; 12 of 41 layers"
    damped = deep(40, error="damped_cosine", damping=0.1)
    assert plots.damping(damped).get_suptitle().endswith("12 of 41 layers")
    few = plots.training({0: deep(3)})
    assert few.get_suptitle() == "toy, true Fisher, N = 7"


def test_the_values_of_a_table_are_written_where_they_fit():
    assert plots.heatmap(deep(10)).axes[0].texts
    assert not plots.heatmap(deep(100)).axes[0].texts


DRAWN = {
    "errors": lambda **chosen: plots.errors(deep(3), **chosen),
    "heatmap": lambda **chosen: plots.heatmap(deep(3), **chosen),
    "traces": lambda **chosen: plots.traces(deep(3), **chosen),
    "training": lambda **chosen: plots.training({0: deep(3)}, **chosen),
    "damping": lambda **chosen: plots.damping(
        deep(3, error="damped_cosine", damping=0.1), **chosen
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_layers_and_approximations_are_chosen_by_name(name):
    layer = "decoder.block.1.mlp"
    figure = DRAWN[name](layers=[layer], approximations=["TN", "KFAC"])
    if name == "heatmap":
        table = figure.axes[0].images[0].get_array()
        np.testing.assert_allclose(table, [[0.31, 0.11]])
        return
    assert [label for label in legend(figure) if label != "exact"] == ["TN", "KFAC"]
    shown = [axes.get_title() for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert (shown or ticks(figure.axes[0])) == [layer]


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("argument", ["layers", "approximations"])
def test_names_that_were_not_measured_are_refused_with_those_that_were(name, argument):
    with pytest.raises(ValueError, match=r"^Got \w+ 'nobody', expected one of '.*\.$") as refusal:
        DRAWN[name](**{argument: ["nobody"]})
    assert ("'KFAC'" if argument == "approximations" else "mlp'") in str(refusal.value)
    with pytest.raises(ValueError, match=rf"^Got {argument}=\[\], expected None for all"):
        DRAWN[name](**{argument: []})


def test_cost_takes_approximations_too():
    assert legend(plots.cost(deep(3), approximations=["TN"])) == ["TN"]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("name", [*DRAWN, "cost", "spectrum"])
def test_a_figure_of_a_paper_has_its_width(name, columns):
    if name == "cost":
        figure = plots.cost(deep(3), columns=columns)
    elif name == "spectrum":
        figure = plots.spectrum(fl.matrices.Dense(_spd(), (2, 2)), {}, columns=columns)
    else:
        figure = DRAWN[name](columns=columns)
    plots.svg(figure)
    width, height = figure.get_size_inches()
    assert width == {1: 3.4, 2: 7.0}[columns]
    assert height < 9
    # the legend keeps inside
    for drawn in figure.legends:
        assert drawn.get_window_extent().x1 <= figure.bbox.x1 + 1


def _spd():
    import torch

    return torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("columns", [0, 3, "two"])
def test_papers_have_one_or_two_columns(columns):
    with pytest.raises(ValueError, match=r"^Got columns=.*, expected 1 or 2 columns .*\.$"):
        plots.errors(deep(3), columns=columns)


# -- colours of a table ----------------------------------------------------------------------------
def table(values, error):
    rows = [Row("0", f"M{i}", error, value, 1e-9) for i, value in enumerate(values)]
    image = plots.heatmap(Comparison(tuple(rows)), error).axes[0].images[0]
    return [image.cmap(image.norm(value)) for value in values]


def test_signed_errors_are_drawn_around_exact():
    low, exact, high, half = table([-0.2, 0.0, 0.2, 0.1], "trace")
    assert min(exact[:3]) > 0.95  # white
    assert low[0] > low[2]  # orange
    assert high[2] > high[0]  # violet
    assert min(half[:3]) > min(high[:3])  # paler
    ratio = table([0.8, 1.0, 1.2], "trace_ratio")
    np.testing.assert_allclose(ratio, table([-0.2, 0.0, 0.2], "trace"), atol=0.02)


def test_what_is_exact_has_one_colour_whatever_the_measure():
    frobenius, _ = table([0.0, 1.0], "frobenius")
    cosine, worse = table([1.0, 0.2], "cosine")
    assert frobenius == cosine
    assert worse == table([0.0, 1.0], "frobenius")[1]


# -- identical methods -----------------------------------------------------------------------------
def twins(other=0.3, error="frobenius", layer_of_other="0"):
    rows = []
    for label, value in (("KFAC", 0.5), ("TKFAC", 0.3), ("TN", other)):
        rows.append(Row("0", label, error, value, 1e-12))
    rows.append(Row("2", "TKFAC", error, 0.4, 1e-12))
    rows.append(Row("2", "TN", error, 0.4 if layer_of_other == "0" else 0.41, 1e-12))
    return Comparison(tuple(rows))


def test_methods_that_are_the_same_are_drawn_once_under_both_names():
    assert legend(plots.errors(twins())) == ["KFAC", "TKFAC = TN"]
    names = plots.heatmap(twins()).axes[0].get_xticklabels()
    assert [text.get_text() for text in names] == ["KFAC", "TKFAC = TN"]
    assert legend(plots.training({0: twins(), 1: twins()})) == ["KFAC", "TKFAC = TN"]


def test_methods_that_differ_anywhere_are_drawn_apart():
    apart = ["KFAC", "TKFAC", "TN"]
    assert legend(plots.errors(twins(other=0.3001))) == apart
    differs_elsewhere = twins(layer_of_other="2")
    assert legend(plots.errors(differs_elsewhere)) == apart
    assert legend(plots.errors(differs_elsewhere, layers=["0"])) == ["KFAC", "TKFAC = TN"]
    assert legend(plots.training({0: twins(), 1: twins(other=0.4)})) == apart


def test_the_same_trace_does_not_make_two_methods_one():
    assert legend(plots.errors(twins(error="trace"), "trace")) == ["KFAC", "TKFAC", "TN"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_says_nothing_of_two_methods(value):
    rows = [Row("0", label, "frobenius", value, 0.0) for label in ("KFAC", "TN")]
    mixed = [*rows, Row("0", "TKFAC", "frobenius", 0.5, 0.0)]
    labels = ["KFAC", "TN", "TKFAC"]
    assert alike([Comparison(tuple(mixed))], labels, ["0"]) == {label: [] for label in labels}


def test_cost_draws_methods_that_are_the_same_each_for_their_prices_differ():
    assert legend(plots.cost(deep(1, ("KFAC", "TN")))) == ["KFAC", "TN"]
