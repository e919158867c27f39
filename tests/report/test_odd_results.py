"""Results that are rare but possible, all the way to the page: no raw error, and nothing unsaid."""

import math

import pytest

from fisher_lab import plots
from fisher_lab.report import answers, write_report
from fisher_lab.results import ALL, Comparison, Cost, Row
from tests.report.support import HOSTILE, Page

ERRORS = ("frobenius", "trace", "cosine", "mine")
DAMPED = ("damped_cosine",)


def comparison(values, layers=("0",), labels=("KFAC", "TN(modes=2)"), stderr=None, costs=True):
    """Every error of every approximation takes the next value, and after the last the first."""
    rows, prices, traces = [], [], []
    turn = 0

    def value():
        nonlocal turn
        turn += 1
        return values[turn % len(values)]

    for layer in (*layers, ALL):
        for label in labels:
            for error in ERRORS:
                rows.append(Row(layer, label, error, value(), 1e-9, stderr=stderr))
            for error in DAMPED:
                for damping in (0.01, 0.1):
                    rows.append(Row(layer, label, error, value(), 1e-9, damping, stderr=stderr))
            prices.append(Cost(layer, label, value(), 100))
            traces.append(
                {
                    "layer": layer,
                    "approximation": label,
                    "damping": None,
                    "trace_exact": value(),
                    "trace_approx": value(),
                }
            )
    settings = {"fisher": "true", "N": 7, "problem": {"name": "toy"}}
    return Comparison(tuple(rows), tuple(prices) if costs else (), settings, tuple(traces))


ODD = {
    "nan": comparison([math.nan]),
    "inf": comparison([math.inf]),
    "minus inf": comparison([-math.inf]),
    "nan and inf": comparison([math.nan, math.inf, -math.inf]),
    "zero": comparison([0.0]),
    "zero and nan": comparison([0.0, math.nan]),
    "negative": comparison([-0.5, -1e-6]),
    "huge and tiny": comparison([1e300, 5e-324, 0.0, -1e300]),
    "huge": comparison([1.7e308]),
    "tiny": comparison([5e-324]),
    "nan as standard error": comparison([0.5, 0.0, 1e-9], stderr=math.nan),
    "large standard errors": comparison([0.5, 0.0, 1e-9], stderr=1e300),
    "two layers": comparison([0.5, 1e-4], layers=("0", "2")),
    "no name": comparison([0.5, 1e-4], layers=("",), labels=("",)),
    "one approximation": comparison([0.5, 1e-4], labels=("KFAC",)),
    "one of each": comparison([0.5], layers=("0",), labels=("KFAC",)),
    "30 layers": comparison([0.5, 1e-4, 0.0], [f"block.{i}.linear" for i in range(30)], ("KFAC",)),
    "25 approximations": comparison([0.5, 0.1], ("0",), [f"Mine(rank={i})" for i in range(25)]),
    "no costs": comparison([0.5], costs=False),
}


@pytest.mark.parametrize("name", ODD)
def test_a_page_is_written_of_whatever_was_measured(name, tmp_path):
    page = Page(write_report(ODD[name], tmp_path / "report.html"))
    assert len([tag for tag, _ in page.tags if tag == "figure"]) >= len(ERRORS)
    shown = [attributes for tag, attributes in page.tags if "data-approximation" in attributes]
    pairs = dict.fromkeys((row.layer, row.approximation) for row in ODD[name].rows)
    assert [(a["data-layer"], a["data-approximation"]) for a in shown] == list(pairs)


@pytest.mark.parametrize("name", ODD)
def test_every_figure_that_is_not_on_the_page_can_be_drawn(name):
    odd = ODD[name]
    first = odd.layers[0]
    plots.svg(plots.cost(odd, "cosine", layer=first))
    plots.svg(plots.errors(odd, "damped_cosine", damping=0.1, layers=[first]))
    plots.svg(plots.damping(odd, layers=[ALL]))
    plots.svg(plots.training({0: odd, 10: odd}, layers=[first]))


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_of_names_that_anybody_may_have_written(name):
    text = HOSTILE[name]
    odd = comparison([0.5, 1e-4, math.nan], layers=(text, f"{text}2"), labels=(text, "KFAC"))
    for figure in plots.figures(odd).values():
        plots.svg(figure)


def test_what_is_no_number_is_not_the_best():
    rows = [Row("0", "KFAC", "frobenius", math.nan, 0.0), Row("0", "TN", "frobenius", 0.5, 0.0)]
    cost = (Cost("0", "KFAC", 0.1, 10), Cost("0", "TN", 0.1, 20))
    (answer,) = answers(Comparison(tuple(rows), cost))
    assert answer.sentence.startswith("Best by Frobenius: TN (0.5000); cheapest within 10 %: TN")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_no_error_is_a_number_the_answer_says_so(value):
    rows = [
        Row("0", "KFAC", "frobenius", value, 0.0),
        Row("0", "TN", "frobenius", value, 0.0),
        Row("0", "TN", "cosine", 0.9, 0.0),
    ]
    (answer,) = answers(Comparison(tuple(rows), (Cost("0", "KFAC", 0.1, 10),)))
    assert (
        answer.sentence == "By Frobenius none is near: no value is finite; by cosine: TN (0.9000)."
    )


def test_an_error_measured_of_the_whole_network_alone_has_an_answer_too():
    (answer,) = answers(Comparison((Row(ALL, "the network", "off_block", 0.4, 0.0),)))
    assert answer.sentence == "Nothing that was measured says which approximation is best."
