"""Tables for terminals of any width, and for notebooks."""

import math
import re

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import cli
from fisher_lab.results import ALL, Comparison, Row

WIDTHS = (60, 72, 80, 100, 110, 160)


@pytest.fixture(scope="module")
def comparison():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    chosen = [fl.KFAC(), fl.TN(), fl.Diagonal()]
    return fl.compare(model, fl.Categorical(), x, chosen, errors="all", progress=False)


def titles(table):
    """Words of the heads of all tables."""
    heads = []
    for block in re.split(r"\n *─+", table)[:-1]:
        lines = block.splitlines()
        heads += lines[-3:]
    return " ".join(" ".join(heads).split())


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_asked_and_no_number_is_cut(comparison, width):
    for errors in (None, comparison.errors):
        table = comparison.table(errors, width)
        assert max(map(len, table.splitlines())) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in table
        assert "size" in table


@pytest.mark.parametrize("width", WIDTHS)
def test_what_does_not_fit_is_named(comparison, width):
    table = comparison.table(width=width)
    words = " ".join(table.replace("\n", " ").split())
    shown, _, rest = words.partition("For want of width not shown:")
    assert rest  # even the widest is too narrow for all
    for error in comparison.errors:
        title = error.replace("_", " ")
        assert title in rest or all(word in shown for word in title.split())


def test_errors_that_are_named_are_all_shown(comparison):
    """Those that did not fit into the width were left out, and the layers' names with them."""
    lines = comparison.table(comparison.errors, 80).splitlines()
    values = 0
    for line in lines:
        if line.startswith(" 0  4x4  KFAC"):
            values += len(line.split("KFAC")[1].split()) - 4  # time and size are two words each
    assert values == sum(
        row.layer == "0" and row.approximation == "KFAC" for row in comparison.rows
    )


def test_the_first_to_go_say_what_another_says(comparison):
    shown = titles(comparison.table(["trace", "trace_ratio", "frobenius", "spectral"], 110))
    assert "ratio" in shown
    narrow = comparison.table(width=74)
    assert "trace  frobenius  cosine" in narrow
    assert "trace ratio" in narrow.partition("not shown")[2]


def test_standard_errors_stand_beside_their_values():
    row = Row("0", "KFAC", "trace", 0.25, 1e-12, stderr=0.0123)
    rounding = Row("0", "TN", "trace", 0.0, 1e-12, stderr=5e-12)
    table = Comparison((row, rounding)).table()
    assert "0.2500 ± 0.012" in table
    assert "e-12" not in table


def test_long_names_go_on_in_the_next_line():
    name = "encoder.layers.10.self_attention.output.projection"
    table = Comparison((Row(name, "KFAC", "trace", 0.25, 0.0),)).table(width=60)
    first_column = "".join(line[1:16].strip() for line in table.splitlines()[3:])
    assert name in first_column
    assert "0.2500" in table


def test_the_width_is_that_of_the_terminal(comparison, monkeypatch):
    monkeypatch.setenv("COLUMNS", "75")
    assert str(comparison) == comparison.table(width=75)
    monkeypatch.setenv("COLUMNS", "20")  # too narrow for anything
    assert str(comparison) == comparison.table(width=60)


def test_a_table_is_text_in_a_notebook_too(comparison, monkeypatch):
    """rich shows the table itself there and returned 57 characters."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "KFAC" in comparison.table()


# -- what the command line shows -------------------------------------------------------------------
ARGUMENTS = ["compare", "--problem", "iris_regression", "--examples", "20", "--steps", "0"]


def shown_by(capsys, *options):
    cli.main([*ARGUMENTS, *options])
    return capsys.readouterr().out


def test_lines_are_sorted_and_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    out = shown_by(capsys, "--sort", "frobenius", "--top", "2", "--columns", "frobenius")
    blocks = re.findall(r"^ (\S+) .*?  ([A-Z]\S+) +(\S+)", out, re.MULTILINE)
    assert [name for name, *_ in blocks] == ["0", "2", "4", ALL]
    assert blocks[0][1] == "TENGraD"  # exact for so few examples
    assert re.search(r"^\d+ more lines are not shown\.$", out, re.MULTILINE)
    assert "trace" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--sort", "frobeniu"],
            "Got error 'frobeniu' (did you mean 'frobenius'?), expected one of",
        ),
        (
            ["--columns", "damped_cosine"],
            "(did you mean 'cosine'?), expected one of those measured: trace,",
        ),
        (["--top", "0"], "Got 0 lines per layer, expected 1 or more."),
    ],
)
def test_what_cannot_be_shown_is_refused_before_measuring(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*ARGUMENTS, *options])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_best_and_worst_have_colours_where_there_are_any(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shown_by(capsys, "--columns", "frobenius")
    assert "\x1b[1;32m" in out
    assert "\x1b[31m" in out
    monkeypatch.delenv("FORCE_COLOR")
    assert "\x1b" not in shown_by(capsys, "--columns", "frobenius")


# -- notebooks -------------------------------------------------------------------------------------
def test_a_notebook_shows_every_value_and_sorts_by_it(comparison):
    html = comparison._repr_html_()
    keys = re.findall(r'data-key="([^"]+)"', html)
    for row in comparison.rows:
        if math.isfinite(row.value):
            assert str(row.value) in keys
    assert html.count("<tr>") == 1 + len(comparison.approximations) * 3
    assert html.count('onclick="') == len(re.findall("<th ", html))


def test_what_strangers_wrote_is_text_in_a_notebook():
    name = '<img src=x onerror="hit()">"\'\u202e'
    html = Comparison((Row(name, name, name, 0.25, 0.0),))._repr_html_()
    assert "<img" not in html
    assert "\u202e" not in html
    assert html.count("&lt;img src=x onerror=&#34;hit()&#34;&gt;") == 3


def test_a_matrix_says_what_it_is_and_not_all_its_numbers():
    factors = (torch.eye(30, dtype=torch.float64)[None], torch.eye(40, dtype=torch.float64)[None])
    kron = fl.matrices.Kronecker(factors)
    assert repr(kron).startswith("Kronecker 1200 x 1200 over W 30x40, torch.float64 on cpu, 20 kB:")
    assert "factors.0 [1, 30, 30]" in repr(kron)
    html = kron._repr_html_()
    assert "trace 1200" in html
    assert "1 x 40 x 40" in html
