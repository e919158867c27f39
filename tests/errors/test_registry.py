"""One row of the registry says all about a measure: figures and the report read it, under whatever name it stands."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import errors, plots
from fisher_lab.errors import MEASURES, measure
from fisher_lab.plots.reading import Scale
from fisher_lab.report import answers
from fisher_lab.results import Comparison


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
    (line,) = [line for line in plots.errors(found, "alignment").axes[0].lines if line.get_label() == "_exact"]
    assert line.get_ydata()[0] == 1.0


def test_without_a_value_at_the_exact_block_nothing_is_recommended_and_nothing_guessed() -> None:
    formula = MEASURES["cosine"].formula

    def alignment(q):
        return formula(q)

    measure()(alignment)
    found = compared("alignment")
    assert "KPSVD" not in answers(found)[0].sentence
    assert "Diagonal" not in answers(found)[0].sentence
    for figure in (plots.errors(found, "alignment"), plots.heatmap(found, "alignment"), plots.figures(found)["cost"]):
        assert "exact" not in [text.get_text() for axes in figure.axes for text in axes.texts]
    assert Scale.of("alignment", [0.0, 0.5]).base is None
    assert not plots.figures(found)["cost"].axes[0].lines[-1].get_xdata().size  # no front without a best value


@pytest.mark.parametrize("name", [m.name for m in MEASURES.values() if m.exact is not None])
def test_the_value_at_the_exact_block_is_what_the_row_says(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    exact = fl.exact_fisher(nn.Linear(4, 3).double(), fl.Categorical(), x)[""]
    arguments = (torch.ones(exact.shape, dtype=exact.dtype),) if MEASURES[name].damped else ()
    assert getattr(errors, name)(exact, exact, *arguments) == pytest.approx(MEASURES[name].exact, abs=1e-6)


class Reader:
    """Quantities that write down which of them a formula reads."""

    def __init__(self, quantities) -> None:
        self.quantities = quantities
        self.read = set()

    def __getattr__(self, name):
        if name != "eps":
            self.read.add(name)
        return getattr(self.quantities, name)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_row_names_every_quantity_that_its_formula_reads(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    exact = fl.exact_fisher(model, fl.Categorical(), x)[""]
    approx = fl.estimate(fl.KFAC(), model, fl.Categorical(), x)[""]
    if MEASURES[name].damped:
        pair = errors.DampedPair(exact, approx, torch.ones(exact.shape, dtype=exact.dtype), 0.1)
    else:
        pair = errors.Pair(exact, approx)
    reader = Reader(pair)
    MEASURES[name].formula(reader)
    assert reader.read == set(MEASURES[name].needs)
