"""The report: what it says, that it needs nothing beside it, and that it is written whole or not at
all.
"""

import re

import pytest

from fisher_lab.report import answers, write_report
from fisher_lab.results import ALL, Comparison, Cost, Row
from tests.report.support import Page


def comparison(steps=None, name="toy", label="KFAC", **settings):
    values = {
        ("0", label): (0.5, 0.9),
        ("0", "TKFAC"): (0.2, 0.8),
        ("0", "TN"): (0.2, 0.7),
        ("0", "EKFAC"): (0.215, 0.85),
        ("2", label): (0.0, 1.0),
        ("2", "TKFAC"): (0.1, 0.9),
    }
    rows = [
        Row(layer, approximation, error, value, 1e-9, None, 1e-12)
        for (layer, approximation), pair in values.items()
        for error, value in zip(("frobenius", "cosine"), pair, strict=True)
    ]
    rows += [
        Row(ALL, "TKFAC", "frobenius", 0.15, 1e-9),
        Row("0", "TKFAC", "damped_cosine", 0.6, 0, 0.1),
    ]
    costs = [
        Cost("0", "TKFAC", 0.1, 4000),
        Cost("0", "TN", 0.1, 3000),
        Cost("0", "EKFAC", 0.2, 1000),
    ]
    problem = {"name": name} | ({} if steps is None else {"steps": steps})
    base = {
        "problem": problem,
        "model": "Sequential",
        "N": 7,
        "fisher": "true",
        "layers": {"0": {"shape": [3, 4]}},
    }
    return Comparison(tuple(rows), tuple(costs), base | settings)


def test_the_answer_names_the_best_by_each_measure_and_the_cheapest_near_it():
    found = {answer.layer: answer.sentence for answer in answers(comparison())}
    assert list(found) == [ALL, "0", "2"]
    assert found["0"] == (
        "Best by Frobenius: TKFAC and TN (0.2000); by direction at damping 0.1: TKFAC (0.6000); "
        "cheapest within 10 %: EKFAC (1 kB)."
    )
    assert found["2"] == "Best by Frobenius: KFAC (exact); by cosine: KFAC (exact)."
    assert found[ALL] == "Best by Frobenius: TKFAC (0.1500)."


def test_what_is_exact_within_rounding_is_called_exact():
    rows = [Row("0", "KFAC", "cosine", 1 - 1e-16, 1e-15), Row("0", "TN", "cosine", 1.0, 1e-15)]
    assert answers(Comparison(tuple(rows)))[0].sentence == "Best by cosine: KFAC and TN (exact)."


def test_the_page_holds_every_number_the_settings_and_the_meaning_of_the_measures(tmp_path):
    page = Page(write_report(comparison(), tmp_path / "new" / "report.html"))
    rows = [
        attributes for tag, attributes in page.tags if tag == "tr" and "data-layer" in attributes
    ]
    assert [(r["data-layer"], r["data-approximation"]) for r in rows] == [
        ("0", "KFAC"),
        ("0", "TKFAC"),
        ("0", "TN"),
        ("0", "EKFAC"),
        ("2", "KFAC"),
        ("2", "TKFAC"),
        (ALL, "TKFAC"),
    ]
    values = [attributes.get("data-value") for tag, attributes in page.tags if tag == "td"]
    assert {"0.5", "0.215", "0.6", "4000"} <= set(values)
    for text in (
        "true Fisher",
        "7 examples of the problem toy",
        "problem / name",
        "|F^ - F|_F / |F|_F",
        "1.0e-12",
    ):
        assert text in page.text, text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def test_the_page_refers_to_nothing_outside_and_its_identifiers_are_unique(tmp_path):
    page = Page(write_report({"one": comparison(), "two": comparison()}, tmp_path / "report.html"))
    links = [
        v
        for _, attributes in page.tags
        for k, v in attributes.items()
        if k in ("src", "href", "xlink:href")
    ]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert not [link for link in links if not link.startswith(("#", "data:"))]
    assert not [link for link in links if link.startswith("#") and link[1:] not in identifiers]
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(identifiers)
    assert not re.search(r"@import|url\((?!#)|<link[^>]+stylesheet", page.source)


def test_names_cannot_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    page = Page(
        write_report(
            comparison(name=hostile, label=hostile, note=hostile), tmp_path / "report.html"
        )
    )
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "alert(1)" in page.text


def test_files_and_several_comparisons_make_one_page(tmp_path):
    saved = comparison().save(tmp_path / "run.json")
    page = Page(write_report([saved, comparison(), str(saved)], tmp_path / "report.html"))
    assert [i["id"] for t, i in page.tags if t == "section" and "id" in i] == [
        "section0",
        "section1",
        "section2",
    ]
    assert {"toy", "toy (2)", "toy (3)"} <= set(page.texts)
    assert "Along the training" not in page.text


def test_checkpoints_of_one_problem_also_give_figures_along_the_training(tmp_path):
    page = Page(write_report([comparison(steps=s) for s in (0, 100)], tmp_path / "report.html"))
    assert "Along the training" in page.text
    assert "toy, step 100" in page.texts


def test_what_was_left_out_and_what_is_not_complete_is_said(tmp_path):
    given = comparison(left_out={"norm": "no adapter"}, complete=False)
    page = Page(write_report(given, tmp_path / "report.html"))
    assert "Left out: norm: no adapter" in page.text
    assert "Not complete" in page.text


def test_a_failing_report_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = write_report(comparison(), tmp_path / "report.html")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"could not be written \(disk full\)"):
        write_report(comparison(name="other"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("given", "name", "error"),
    [
        (list, "report.html", ValueError),
        (lambda: Comparison(()), "report.html", ValueError),
        (lambda: comparison(), "report.pdf", ValueError),
        (lambda: "missing.json", "report.html", ValueError),
        (lambda: [3], "report.html", TypeError),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_sentence(tmp_path, given, name, error):
    with pytest.raises(error, match="expected"):
        write_report(given(), tmp_path / name)
    assert not list(tmp_path.iterdir())
