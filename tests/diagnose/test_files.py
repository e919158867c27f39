"""Comparisons as files: loaded as they were saved, refused where damaged, gone on from where they
stopped.
"""

import csv
import io
import json
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisher_lab as fl
from fisher_lab.results import ALL, Comparison, Cost, Row, codec
from fisher_lab.statistics import Sums
from tests.diagnose.support import batch, net


@pytest.mark.parametrize("name", ["run.json", "deep/er/run.csv"])
def test_a_saved_comparison_loads_as_it_was(tmp_path, name: str) -> None:
    found = fl.compare(
        net(), nn.CrossEntropyLoss(), batch(), errors="all", dampings=[0.1], problem={"name": "toy"}
    )
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
    assert {"layer", "approximation", "error", "value", "noise", "seconds", "bytes"} <= set(
        frame.columns
    )


def test_infinite_values_survive_the_file(tmp_path) -> None:
    found = Comparison((Row("0", "KFAC", "trace", math.inf, 0.0),), settings={"x": math.nan})
    again = fl.load_comparison(found.save(tmp_path / "a.json"))
    assert again.rows == found.rows
    assert math.isnan(again.settings["x"])


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "a;=1",
    "a,=1",
    "a\t=1",
    "＝1",
    "'=1",
    "''-1",
    "'",
    "-",
]


def named(name: str) -> Comparison:
    """A comparison in which every text is this name."""
    settings = {
        "layers": {name: {"shape": [1, 2]}},
        "left_out": {name: name},
        name: [name, {name: -1.5}],
    }
    return Comparison(
        (Row(name, name, name, -0.5, 0.0, None, None, name),), (Cost(name, name, 0.1, 2),), settings
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_a_spreadsheet_sees_no_formula_in_a_file(tmp_path, name: str) -> None:
    text = named(name).save(tmp_path / "a.csv").read_bytes().decode()
    for separator in ",;\t":
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
            for cell in cells:
                is_number = re.fullmatch(r"-?[0-9.]+(e[+-]?[0-9]+)?", cell)
                assert is_number or not re.match("[=+\\-@\t\r\n＝＋－＠]", cell), cell


@pytest.mark.parametrize("ending", [".json", ".csv"])
@given(
    name=st.one_of(
        st.sampled_from([*FORMULAS, "float:1", "float:text:x"]),
        st.text(),
        st.text("';,=+-@\t\r\n\"\\a#"),
    )
)
def test_every_name_survives_the_file(tmp_path_factory, ending: str, name: str) -> None:
    found = named(name)
    again = fl.load_comparison(found.save(tmp_path_factory.mktemp("any") / f"a{ending}"))
    assert again == found


def test_names_in_files_of_earlier_versions_stay_as_they_are(tmp_path) -> None:
    path = tmp_path / "old.csv"
    header = {
        "format": "fisher_lab comparison",
        "version": 1,
        "settings": {},
        "costs": [],
        "quantities": [],
    }
    row = "'=1,+1,-,0.5,0.0,,,true,\n"
    path.write_text(f"# {json.dumps(header)}\n{','.join(f.name for f in fields(Row))}\n{row}")
    assert fl.load_comparison(path).rows == (Row("'=1", "+1", "-", 0.5, 0.0),)


def deeply(depth: int) -> str:
    return "[" * depth + "]" * depth


WRONG = {
    "rows": [
        "x",
        {},
        [1],
        [{"layer": ["0"]}],
        [{"layer": {}}],
        [{"value": 10**400}],
        [{"value": "x"}],
        [{"error": 1}],
    ],
    "costs": [
        [1],
        [{"layer": 1}],
        [{"bytes": float("inf")}],
        [{"seconds": "x"}],
        [{"approximation": None}],
    ],
    "settings": [
        [],
        {"problem": "x"},
        {"problem": [1]},
        {"layers": []},
        {"layers": {"0": 1}},
        {"left_out": [1]},
        {"layers": {"0": {"shape": "ab"}}},
        {"layers": {"0": {"shape": [1]}}},
        {"layers": {"0": {"shape": ["<b>", 1]}}},
    ],
    "quantities": [[1], [{"layer": 1}], [{"trace_exact": "x"}], [{"trace_approx": [1]}], {"a": 1}],
    "covariances": [[1], 3],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_entries_of_another_kind_are_refused(tmp_path, key: str, value: object) -> None:
    quantity = {"layer": "0", "approximation": "KFAC", "trace_exact": 1.0, "trace_approx": 1.0}
    covariance = {"layer": "0", "error": "trace", "approximations": ["KFAC"], "matrix": [[1.0]]}
    found = Comparison(
        (Row("0", "KFAC", "trace", 0.5, 0.0),),
        (Cost("0", "KFAC", 0.1, 2),),
        {},
        (quantity,),
        (covariance,),
    )
    path = found.save(tmp_path / "a.json")
    body = json.loads(path.read_text())
    whole = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    body[key] = [body[key][0] | value[0]] if whole and key != "settings" else value
    path.write_text(json.dumps(body))
    with pytest.raises(
        ValueError, match=r"truncated or foreign .*expected a \.json or \.csv file written by"
    ):
        fl.load_comparison(path)


@pytest.mark.parametrize("name", ["deep.json", "long.csv"])
def test_files_that_would_be_too_much_are_refused(tmp_path, name: str) -> None:
    path = tmp_path / name
    header = '{"format": "fisher_lab comparison", "version": 1, "settings": {}, "costs": [], "quantities": []'
    path.write_text(
        deeply(100_000)
        if name == "deep.json"
        else f'# {header}}}\nlayer,value\n"{"x" * 200_000}",1\n'
    )
    with pytest.raises(ValueError, match="truncated or foreign"):
        fl.load_comparison(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"rows": []}',
        "[1, 2]",
        '{"format": "fisher_lab comparison", "version": 99}',
        "\x00\xff",
    ],
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
    path = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), layers=["0"]).save(
        tmp_path / "run.json"
    )
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
    with pytest.raises(ValueError, match="disk full"):
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

    def stops(self: fl.KFAC, sums: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return moments(self, sums)

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
    monkeypatch.setattr(fl.KFAC, "assemble", lambda self, m: built.append(1) or assemble(self, m))
    again = fl.compare(net(), fl.Categorical(), batch(), resume=path)
    assert again.rows == whole.rows
    assert len(built) == 2  # the third layer only: KFAC, and the base of EKFAC
    with pytest.raises(ValueError, match="holds another comparison"):
        fl.compare(net(1), fl.Categorical(), batch(), resume=path)


def test_a_run_is_not_resumed_through_a_link(tmp_path) -> None:
    path, link = tmp_path / "run.json", tmp_path / "link.json"
    fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), resume=path)
    link.symlink_to(path)
    with pytest.raises(ValueError, match="is a link, expected a regular file of your own"):
        fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), resume=link)


RESUMED = {
    "another activation": (
        lambda: (nn.Sequential(net()[0], nn.ReLU(), *list(net())[2:]), fl.Categorical()),
        None,
    ),
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
            {"mine": fl.estimate(a, net(), fl.Categorical(), batch())}
            for a in (fl.EKFAC(), fl.KFAC())
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


@pytest.mark.parametrize("name", ["run.json", "run.csv"])
def test_a_changed_file_is_told_from_what_was_measured(tmp_path, name) -> None:
    """One digit changed by accident is refused; by hand it is read on request."""
    found = fl.compare(net(), fl.Categorical(), batch(), [fl.KFAC()], errors=["frobenius"])
    path = found.save(tmp_path / name)
    text = path.read_text(encoding="utf-8")
    digits = repr(found.rows[0].value)
    assert digits in text
    path.write_text(text.replace(digits, repr(found.rows[0].value + 1)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"not those that were written.*check=False"):
        fl.load_comparison(path)
    assert fl.load_comparison(path, check=False).rows[0].value == found.rows[0].value + 1


def test_numbers_without_a_word_in_json(tmp_path) -> None:
    """Infinities and NaNs anywhere, and tables that look like them."""
    about = {"a": math.inf, "b": [-math.inf], "$number": "nan", "c": {"$table": 1}, "d": "float:1"}
    found = Comparison(
        (Row("0", "KFAC", "trace", math.nan, math.inf),), settings={"problem": about}
    )
    for name in ("run.json", "run.csv"):
        again = fl.load_comparison(found.save(tmp_path / name))
        assert again.settings["problem"] == about
        assert math.isnan(again.rows[0].value)
        assert again.rows[0].noise == math.inf


def test_only_unfinished_layers_are_measured_again(tmp_path, monkeypatch) -> None:
    """Layers without damped rows, or whose last approximation was left out, are finished too."""
    from fisher_lab.diagnose import dealing

    path = tmp_path / "run.json"
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()  # the layers below have F = 0 and so no damped errors
    asked = {"errors": ["frobenius", "damped_cosine"], "dampings": [0.1], "resume": path}
    first = fl.compare(model, fl.Categorical(), batch(), [fl.KFAC(), fl.TN()], **asked)
    measured = []
    measure = dealing.measure_group
    monkeypatch.setattr(
        dealing, "measure_group", lambda *args: measured.append(args) or measure(*args)
    )
    again = fl.compare(model, fl.Categorical(), batch(), [fl.KFAC(), fl.TN()], **asked)
    assert measured == []
    assert again.rows == first.rows


def test_a_resumed_run_has_every_row_of_the_uninterrupted_one(tmp_path, monkeypatch) -> None:
    """Also standard errors over all layers, which need what the examples did to finished layers,
    and their covariances; and steps of the network, which no file holds.
    """
    x, y = batch()
    asked = {"errors": ["frobenius", "spectral", "trace"], "standard_errors": True}
    candidates = [fl.KFAC(), fl.EKFAC(), fl.TN()]
    whole = fl.compare(net(), fl.Categorical(), (x, y), candidates, **asked)
    over_all = [row for row in whole.rows if row.layer == ALL]
    assert any(row.stderr is not None for row in over_all)
    path = tmp_path / "run.json"
    moments = fl.TN.moments
    last = net()[4].out_features

    def stops(self: fl.TN, sums: Sums) -> object:
        if sums.d_out == last:
            raise KeyboardInterrupt
        return moments(self, sums)

    monkeypatch.setattr(fl.TN, "moments", stops)
    with pytest.raises(KeyboardInterrupt):
        fl.compare(net(), fl.Categorical(), (x, y), candidates, **asked, resume=path)
    assert fl.load_comparison(path).layers == ["0", "2"]
    built = []

    def records(self: fl.TN, sums: Sums) -> object:
        built.append(sums.d_out)
        return moments(self, sums)

    monkeypatch.setattr(fl.TN, "moments", records)
    resumed = fl.compare(net(), fl.Categorical(), (x, y), candidates, **asked, resume=path)
    assert set(built) == {last}
    assert resumed.rows == whole.rows
    assert resumed.covariances == whole.covariances
    # and the file that is complete holds no more than that of the uninterrupted run
    expected = fl.load_comparison(whole.save(tmp_path / "whole.json"))
    assert fl.load_comparison(path).quantities == expected.quantities
    built.clear()
    again = fl.compare(net(), fl.Categorical(), (x, y), candidates, **asked, resume=path)
    assert built == []
    assert again.rows == whole.rows
    assert again.covariances == whole.covariances


def test_a_partial_file_without_influences_is_measured_again(tmp_path) -> None:
    """Files of earlier versions do not tell what the examples did."""
    x, y = batch()
    asked = {"errors": ["frobenius"], "standard_errors": True, "resume": tmp_path / "run.json"}
    whole = fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC(), **asked)
    settings = whole.settings | {"complete": False}
    finished = [row for row in whole.rows if row.layer == "0"]
    Comparison(tuple(finished), whole.costs, settings, whole.quantities, whole.covariances).save(
        asked["resume"]
    )
    assert fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC(), **asked).rows == whole.rows


@pytest.mark.parametrize("name", ["run.json", "run.csv"])
def test_numbers_of_other_libraries_are_saved(tmp_path, name) -> None:
    """Scalars of numpy and torch in rows, costs and settings of a result that somebody made."""
    settings = {"N": np.int64(3), "problem": {"lr": torch.tensor(0.5), "on": np.bool_(True)}}
    rows = (Row("0", "KFAC", "trace", np.float32(0.5), torch.tensor(0.25)),)
    costs = (Cost("0", "KFAC", np.float32(0.5), np.int64(8)),)
    again = fl.load_comparison(Comparison(rows, costs, settings).save(tmp_path / name))
    assert again.settings == {"N": 3, "problem": {"lr": 0.5, "on": True}}
    assert again.rows == (Row("0", "KFAC", "trace", 0.5, 0.25),)
    assert again.costs == (Cost("0", "KFAC", 0.5, 8),)
    with pytest.raises(TypeError, match=r"of type ndarray, expected"):
        Comparison(rows, costs, {"x": np.zeros(3)}).save(tmp_path / name)


@pytest.mark.parametrize(
    ("problem", "names", "message"),
    [
        ({1: "a", "1": "b"}, ["KFAC"], "differ as text"),
        ({"weights": np.zeros(3)}, ["KFAC"], "of type ndarray"),
        ({}, ["half \ud800"], "half a character"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_it_is_measured(problem, names, message) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("was measured")

    unused = net()
    unused.forward = model
    with pytest.raises((TypeError, ValueError), match=message):
        fl.compare(
            unused, fl.Categorical(), batch(), dict.fromkeys(names, fl.KFAC()), problem=problem
        )
    row = Row("0", "half \ud800", "trace", 1.0, 0.0)
    with pytest.raises(ValueError, match=r"half a character.*\.json"):
        Comparison((row,)).save("never.csv")


def test_notes_that_look_like_numbers(tmp_path) -> None:
    """Names and notes of any text load as what they were, also from files of the first version."""
    label = "float:1\r"
    about = {"note": "float:abc", "other": "float:1"}
    found = fl.compare(net(), fl.Categorical(), batch(), {label: fl.TN()}, problem=about)
    for name in ("run.json", "run.csv"):
        again = fl.load_comparison(found.save(tmp_path / name))
        assert again.approximations == [label]
        assert again.settings.problem == about
    body = {
        "format": "fisher_lab comparison", "version": 1, "settings": {"problem": about}, "rows": [],
        "costs": [], "quantities": [],
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(body))
    old = fl.load_comparison(tmp_path / "old.json").settings.problem
    assert old == {"note": "float:abc", "other": 1.0}


class Mixed(nn.Module):
    """Computes a part of its forward pass in single precision, whatever its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        squares = h.float().square()
        return self.last((squares + 1).to(h.dtype))


def test_every_row_tells_the_precision_inside(tmp_path) -> None:
    """Which the noise floors follow; and the table does where it is lower."""
    asked = {"errors": ["frobenius", "off_block", "damped_cosine"]}
    x, y = batch()
    mixed = fl.compare(Mixed(), fl.Categorical(), (x, y), fl.KFAC(), **asked)
    assert {row.layer for row in mixed.rows} == {"first", "last", ALL}
    assert {row.precision for row in mixed.rows} == {"float32"}
    assert "float32 inside the model" in mixed.table()
    for name in ("run.json", "run.csv"):
        assert fl.load_comparison(mixed.save(tmp_path / name)).rows == mixed.rows
    plain = fl.compare(net(), fl.Categorical(), (x, y), fl.KFAC(), **asked)
    assert {row.precision for row in plain.rows} == {"float64"}
    assert "inside the model" not in plain.table()
    assert set(mixed.to_frame()["precision"]) == {"float32"}


def test_a_complete_file_that_lacks_a_layer_is_gone_on_with(tmp_path) -> None:
    """Somebody took rows out and left the word that all are there."""
    path = tmp_path / "run.json"
    whole = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), resume=path)
    first = [row for row in whole.rows if row.layer == "0"]
    Comparison(tuple(first), whole.costs, whole.settings, whole.quantities).save(path)
    again = fl.compare(net(), fl.Categorical(), batch(), fl.KFAC(), resume=path)
    assert again.rows == whole.rows


MISPLACED = {
    "a name that is a number": ("rows", 0, "layer", 3),
    "a value that is text": ("rows", 0, "value", "0.5"),
    "a value that is true": ("rows", 0, "value", True),
    "a noise that is a list": ("rows", 0, "noise", [1.0]),
    "a damping that is text": ("rows", 0, "damping", "x"),
    "a stderr that is a table": ("rows", 0, "stderr", {}),
    "seconds that are text": ("costs", 0, "seconds", "1"),
    "bytes that are not whole": ("costs", 0, "bytes", 1.5),
    "bytes below 0": ("costs", 0, "bytes", -1),
    "rows that are a table": ("rows", {}),
    "settings that are a list": ("settings", []),
    "layers that are a list": ("settings", "layers", []),
    "a shape of one number": ("settings", "layers", "0", "shape", [3]),
    "a shape of texts": ("settings", "layers", "0", "shape", ["3", "4"]),
    "N that is text": ("settings", "N", "5"),
    "dampings that are texts": ("settings", "dampings", ["0.1"]),
    "complete that is a number": ("settings", "complete", 1),
    "a quantity that is text": ("quantities", 0, "trace_exact", "x"),
    "a quantity of another name that is text": ("quantities", 0, "eps", "x"),
    "covariances that are numbers": ("covariances", [1]),
}


@pytest.mark.parametrize("where", MISPLACED.values(), ids=MISPLACED)
@pytest.mark.parametrize("check", [True, False])
def test_an_entry_of_another_type_is_told_by_its_place(where, check, tmp_path):
    torch.manual_seed(0)
    data = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
    model = nn.Sequential(nn.Linear(4, 2))
    found = fl.compare(model, nn.CrossEntropyLoss(), data, [fl.KFAC()], errors="trace")
    path = found.save(tmp_path / "run.json")
    body = json.loads(path.read_text())
    *place, last, value = where
    table = body
    for key in place:
        table = table[key]
    table[last] = value
    body["digest"] = codec.digest(body)
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=rf"run.json is truncated or foreign \({where[0]}"):
        fl.load_comparison(path, check=check)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for ending in ("json", "csv"):
        with pytest.raises(TypeError, match="N: input should be a valid integer"):
            fl.Comparison((), settings={"N": "many"}).save(tmp_path / f"run.{ending}")
    assert not list(tmp_path.iterdir())
