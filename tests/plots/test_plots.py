"""Figures: the numbers, labels and legends on their axes are those of the results."""

import math
import subprocess
import sys
import typing
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import fisher_lab as fl
from fisher_lab import plots
from fisher_lab.plots.cost import front
from fisher_lab.plots.scale import Scale
from fisher_lab.plots.style import STYLES, styles
from fisher_lab.results import ALL, Comparison, Cost, Row

ROOT = Path(__file__).resolve().parent.parent.parent
VALUES = {"KFAC": 0.5, "EKFAC": 0.25, "MiniBlock(linear=col)": 0.0}


def row(layer, label, value, error="frobenius", damping=None):
    return Row(layer, label, error, value, 1e-9, damping, 0.0)


def comparison(values=VALUES, error="frobenius"):
    rows = [
        row(layer, label, value, error)
        for layer in ("0", "2", ALL)
        for label, value in values.items()
    ]
    costs = [
        Cost(layer, label, 0.1 * (i + 1), 100 * (i + 1))
        for layer in ("0", "2")
        for i, label in enumerate(values)
    ]
    quantities = [
        {
            "layer": layer,
            "approximation": label,
            "damping": None,
            "trace_exact": 2.0,
            "trace_approx": 2.0 + value,
        }
        for layer in ("0", "2", ALL)
        for label, value in values.items()
    ]
    settings = {
        "fisher": "true",
        "N": 7,
        "problem": {"name": "toy"},
        "layers": {"0": {"shape": [3, 4]}},
    }
    return Comparison(tuple(rows), tuple(costs), settings, tuple(quantities))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bars_have_the_values_of_the_rows_and_say_what_is_exact():
    figure = plots.errors(comparison({"KFAC": 0.5, "EKFAC": 0.25, "TN": 0.1}))
    (axes,) = figure.axes
    heights = [bar.get_y() + bar.get_height() for container in axes.containers for bar in container]
    assert heights == pytest.approx([0.5] * 3 + [0.25] * 3 + [0.1] * 3)
    assert axes.get_yscale() == "linear"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0\n3x4", "2", "all layers"]
    assert "frobenius" in axes.get_ylabel()
    assert axes.get_title(loc="left") == "toy, true Fisher, N = 7"
    assert legend(figure) == ["KFAC", "EKFAC", "TN"]
    assert [t.get_text() for t in axes.texts] == ["exact"]


def test_names_are_drawn_as_they_are_written():
    names = ["a$b$", r"\$\frac{", "_mine", "a\tb\nc", "\x1b[31m"]
    figure = plots.errors(comparison({name: 0.5 + index for index, name in enumerate(names)}))
    assert legend(figure) == [r"a\$b\$", r"\\$\frac{", " _mine", "a b c", "\ufffd[31m"]
    plots.svg(figure)  # nothing of it is a formula, which could not be read


def test_a_log_axis_draws_zero_on_the_line_that_says_exact():
    figure = plots.errors(comparison({"KFAC": 1.0, "EKFAC": 1e-4, "TN": 0.0}))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    (line,) = [line for line in axes.lines if line.get_label() == "_exact"]
    level = line.get_ydata()[0]
    tops = [bar.get_y() + bar.get_height() for container in axes.containers for bar in container]
    assert tops[-1] == pytest.approx(level)
    assert 0 < level < 1e-4
    assert axes.texts[0].get_text() == "exact"
    assert axes.texts[0].xy[1] == level
    assert axes.get_ylim()[0] < level


def test_an_infinite_error_stands_on_a_line_that_says_so():
    figure = plots.errors(comparison({"KFAC": 1.0, "EKFAC": math.inf}))
    assert [t.get_text() for t in figure.axes[0].texts] == ["exact", "infinite"]


def test_a_cosine_is_exact_at_one():
    assert Scale.of("cosine", [0.001, 0.9]).base == 1.0
    assert not Scale.of("cosine", [0.001, 0.9]).log
    assert Scale.of("an own measure", [0.5, 0.9]).base is None


def test_whiskers_are_drawn_where_rows_have_a_standard_error():
    rows = [
        Row("0", label, "frobenius", value, 0.0, stderr=0.05)
        for label, value in (("KFAC", 0.5), ("TN", 0.3))
    ]
    results = Comparison(tuple(rows))
    segments = plots.errors(results).axes[0].collections[0].get_segments()
    assert segments[0][:, 1] == pytest.approx([0.45, 0.55])
    assert not plots.errors(comparison()).axes[0].collections
    figure = plots.training({0: results, 5: results})
    assert figure.axes[0].collections[0].get_segments()[0][:, 1] == pytest.approx([0.45, 0.55])


def test_the_heat_map_writes_every_value_into_its_cell():
    figure = plots.heatmap(comparison())
    axes, bar = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.5, 0.25, 0.0]] * 3)
    assert [t.get_text() for t in axes.texts] == ["0.500", "0.250", "exact"] * 3
    assert [t.get_text() for t in axes.get_xticklabels()] == list(VALUES)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0  3x4", "2", "all layers"]
    assert "frobenius" in bar.get_ylabel()


def test_traces_stand_beside_the_exact_ones():
    figure = plots.traces(comparison())
    (axes,) = figure.axes
    assert legend(figure) == ["exact", *VALUES]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [2.5, 2.5])
    assert [s[0, 1] for s in axes.collections[0].get_segments()] == [2.0, 2.0]


def test_cost_adds_up_layers_and_draws_the_pareto_front():
    figure = plots.cost(comparison({"KFAC": 0.5, "EKFAC": 0.6, "TN": 0.1}))
    left, right = figure.axes
    assert left.get_xlabel() == "bytes held"
    assert right.get_xlabel() == "seconds to build"
    (line,) = [line for line in left.lines if line.get_color() == "0.35"]
    np.testing.assert_allclose(line.get_xydata(), [[200, 0.5], [600, 0.1]])
    assert legend(figure) == ["KFAC", "EKFAC", "TN"]
    one = plots.cost(comparison({"KFAC": 0.5, "TN": 0.1}), layer="0").axes[0]
    assert one.lines[-1].get_xdata()[0] < 200


def test_the_front_keeps_what_nothing_beats():
    assert front({"a": (1, 3.0), "b": (2, 3.0), "c": (2, 1.0), "d": (3, 2.0), "e": (1, 4.0)}) == [
        "a",
        "c",
    ]


def test_cost_of_a_measure_that_is_exact_at_one_prefers_what_is_nearer_to_one():
    line = next(
        line
        for line in plots.cost(comparison({"KFAC": 0.9, "TN": 0.5}, "cosine"), "cosine")
        .axes[0]
        .lines
        if line.get_color() == "0.35"
    )
    np.testing.assert_allclose(line.get_xydata(), [[200, 0.9]])


def test_training_puts_steps_across_and_layers_beside_each_other():
    steps = {
        s: comparison({"KFAC": v, "TN": v / 2}) for s, v in ((100, 0.3), (0, 0.001), (1000, 0.6))
    }
    figure = plots.training(steps)
    first, second, everything = (axes for axes in figure.axes if axes.get_visible())
    assert [axes.get_title() for axes in (first, second, everything)] == [
        "0  3x4",
        "2",
        "all layers",
    ]
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[0, 0.001], [100, 0.3], [1000, 0.6]])
    assert first.get_yscale() == "log"
    assert first.get_ylim()[0] < 0.0005
    assert first.get_ylim()[1] > 0.6
    assert second.get_ylim() == first.get_ylim()
    assert first.get_xlabel() == "training step"
    assert legend(figure) == ["KFAC", "TN"]
    assert [
        axes.get_title() for axes in plots.training(steps, layers=["2"]).axes if axes.get_visible()
    ] == ["2"]


def test_damping_goes_across_on_a_log_axis():
    rows = [row("0", "KFAC", 1 - d, "damped_cosine", d) for d in (0.1, 0.001)]
    figure = plots.damping(Comparison(tuple(rows)))
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.001, 0.999], [0.1, 0.9]])
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.texts] == ["exact"]
    bars = plots.errors(Comparison(tuple(rows)), "damped_cosine", damping=0.1)
    assert "at damping 0.1" in bars.axes[0].get_ylabel()


@pytest.fixture(scope="module")
def matrices():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(8, 3, dtype=torch.float64)
    exact = fl.exact_fisher(model, fl.Categorical(), x)[""]
    return exact, {
        a.label: fl.estimate(a, model, fl.Categorical(), x)[""] for a in (fl.KFAC(), fl.MiniBlock())
    }


def test_blocks_show_the_logarithm_of_the_matrices_and_of_their_inverses(matrices):
    exact, others = matrices
    figure = plots.blocks(exact, others, inverse_damping=0.1)
    images = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in images] == ["exact", "KFAC", "MiniBlock"] * 2
    np.testing.assert_allclose(
        images[0].images[0].get_array(), exact.dense().abs().clamp(min=1e-300).log10()
    )
    damped = exact.dense() + 0.1 * exact.trace() / 16 * torch.eye(16, dtype=torch.float64)
    expected = torch.linalg.inv(damped).abs()
    shown = 10 ** np.asarray(images[3].images[0].get_array())
    np.testing.assert_allclose(shown, expected, rtol=1e-6, atol=1e-8 * float(expected.max()))
    assert sorted(
        {line.get_ydata()[0] for line in images[0].lines if len(set(line.get_ydata())) == 1}
    ) == [4, 8, 12]
    assert len({image.images[0].get_clim() for image in images}) == 2


def test_the_spectrum_is_sorted_and_relative_to_the_largest(matrices):
    exact, others = matrices
    figure = plots.spectrum(exact, others)
    (axes,) = figure.axes
    expected = np.sort(exact.eigenvalues().numpy())[::-1] / float(exact.eigenvalues()[-1])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), expected[expected > 1e-12])
    assert legend(figure) == ["exact", "KFAC", "MiniBlock"]


def test_an_approximation_called_exact_stands_beside_the_exact_block(matrices):
    exact, others = matrices
    figure = plots.blocks(exact, {"exact": others["KFAC"]})
    first, second = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert not np.allclose(first, second)
    first, second = plots.spectrum(exact, {"exact": others["KFAC"]}).axes[0].lines
    assert not np.array_equal(first.get_ydata(), second.get_ydata())


def test_a_large_block_shows_the_largest_entry_of_every_cell(monkeypatch, matrices):
    monkeypatch.setattr("fisher_lab.plots.matrices.PIXELS", 6)
    picture = np.asarray(plots.blocks(matrices[0], {}).axes[0].images[0].get_array())
    dense = matrices[0].dense().abs().numpy()
    assert picture.shape == (6, 6)
    assert picture[0, 1] == np.log10(dense[:3, 3:6].max())
    assert picture[5, 5] == np.log10(dense[15, 15])


@pytest.mark.parametrize(
    ("draw", "word"),
    [
        (lambda: plots.errors(comparison(), "spectral"), "frobenius"),
        (lambda: plots.errors(comparison(), layers=["7"]), "'7'"),
        (lambda: plots.errors(comparison(), damping=0.1), "no damping"),
        (lambda: plots.damping(comparison()), 'errors="all"'),
        (lambda: plots.training({}), "step"),
        (lambda: plots.cost(comparison(), layer="7"), "'7'"),
        (lambda: plots.traces(Comparison(comparison().rows)), "traces"),
        (lambda: plots.save(Figure(), "x.gif"), ".svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(draw, word):
    with pytest.raises(ValueError, match="expected") as refusal:
        draw()
    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


OF_COMPARISONS = [
    plots.errors,
    plots.heatmap,
    plots.traces,
    plots.cost,
    plots.damping,
    plots.figures,
]


@pytest.mark.parametrize("draw", OF_COMPARISONS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("given", [None, 3, "a.json", {}, [], torch.eye(2), fl.KFAC()], ids=repr)
def test_what_is_no_comparison_is_refused_in_one_sentence(draw, given):
    with pytest.raises(TypeError, match=r"^Got \w+, expected a Comparison; .*\.$") as refusal:
        draw(given)
    assert type(given).__name__ in str(refusal.value)


@pytest.mark.parametrize("given", [{0: None}, {0: {}, 1: "x"}, [comparison()], comparison()])
def test_training_refuses_what_is_no_table_of_comparisons(given):
    with pytest.raises(TypeError, match=r"^Got .*, expected .*Comparison.*\.$"):
        plots.training(given)


@pytest.mark.parametrize("draw", OF_COMPARISONS, ids=lambda draw: draw.__name__)
def test_a_type_checker_sees_what_a_figure_is_drawn_from(draw):
    assert typing.get_type_hints(draw)["comparison"] is Comparison


def test_blocks_of_what_is_no_matrix_are_refused(matrices):
    exact, others = matrices
    for draw in (plots.blocks, plots.spectrum):
        for wrong in ((None, others), (torch.eye(2), {}), (exact, {"KFAC": torch.eye(2)})):
            with pytest.raises(TypeError, match=r"^Got .*, expected a FisherMatrix.*\.$"):
                draw(*wrong)
        with pytest.raises(TypeError, match=r"^Got .*, expected \{label: FisherMatrix\}.*\.$"):
            draw(exact, exact)


def test_blocks_of_different_layers_are_refused(matrices):
    other = fl.exact_fisher(torch.nn.Linear(2, 2), fl.Categorical(), torch.randn(4, 2))[""]
    with pytest.raises(ValueError, match="expected"):
        plots.blocks(matrices[0], {"other": other})


def test_a_method_looks_the_same_in_every_figure_and_no_two_look_alike():
    registered = [a.label for a in fl.default_approximations()]
    assert len(set(STYLES.values())) == len(STYLES)
    looks = styles(registered)
    assert all(looks[name] == STYLES[name] for name in registered if name in STYLES)
    assert len({(s.color, s.marker) for s in STYLES.values()}) == len(
        {s.marker for s in STYLES.values()}
    )
    labels = [
        "MiniBlock",
        "MiniBlock(linear=col)",
        "MiniBlock(linear=row_avg)",
        "Mine",
        "Other",
        "Third",
        "Fourth",
    ]
    assert len(set(styles(labels).values())) == len(labels)
    assert len({s.color for s in styles(labels).values()}) == len(labels)  # bars have no line
    assert styles(["Mine"])["Mine"] == styles(labels)["Mine"]


def test_figures_draws_all_that_the_numbers_allow_and_names_files(tmp_path):
    found = plots.figures(comparison())
    assert list(found) == ["errors-frobenius", "heatmap-frobenius", "traces", "cost"]
    again = plots.figures(comparison())
    for name, figure in found.items():
        one, two = (
            plots.save(figure, tmp_path / "one.svg"),
            plots.save(again[name], tmp_path / "two.svg"),
        )
        assert one.read_bytes() == two.read_bytes()
    assert plots.svg(found["cost"]).startswith("<svg")


def test_a_long_name_of_the_problem_leaves_room_for_the_axes():  # else matplotlib warns
    one = comparison({"KFAC": 0.5})
    one.settings["problem"]["name"] = f"a/folder/{'long' * 30}.py:function"
    for figure in plots.figures(one).values():
        plots.svg(figure)
        title = figure.axes[0]._left_title  # matplotlib has no public way to its extent
        assert title.get_text().startswith("…")
        assert "long.py:function, true Fisher" in title.get_text()
        assert title.get_window_extent().x1 <= figure.bbox.x1


def test_drawing_leaves_matplotlibs_settings_and_windows_alone():
    before = dict(matplotlib.rcParams)
    plots.errors(comparison())
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, fisher_lab as fl\nassert 'matplotlib' not in sys.modules\nfl.plots.errors\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
