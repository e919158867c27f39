"""The pages keep up with the code: an approximation, a floor or a study without its page is an
error.
"""

import importlib
import json
import re
from pathlib import Path

import pytest

import fisher_lab as fl
from fisher_lab.approximations import registry
from tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
OWN = [name for name, cls in registry().items() if cls.__module__.startswith("fisher_lab.")]
run = importlib.import_module("analysis.run")


@pytest.mark.parametrize("name", OWN)
def test_every_approximation_has_its_page(name):
    text = (DOCS / "approximations" / f"{name}.md").read_text(encoding="utf-8")
    for heading in (
        "## What it keeps exactly",
        "## Cost",
        "## How it trains",
        "## Definition, from the code",
    ):
        assert heading in text
    assert f"generated/parts/{name}.md" in text
    index = (DOCS / "approximations" / "index.md").read_text(encoding="utf-8")
    assert re.search(rf"^{name}$", index, re.MULTILINE)


def test_the_drawing_of_the_floors_is_the_floor_law():
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ *(\d+)  (\S.*?)   ", text, re.MULTILINE)
    drawn = {int(number): set(names.split()) for number, names in lines}
    assert drawn == {number: set(units) for number, units in enumerate(FLOORS, start=1)}


@pytest.mark.parametrize("name", run.STUDIES)
def test_every_study_has_script_page_rows_and_figures(name):
    page = (DOCS / "studies" / f"{name}.md").read_text(encoding="utf-8")
    for part in (
        "**The paper's setting.**",
        "**Ours.**",
        "**What the paper says.**",
        "## What we measured",
    ):
        assert part in page
    assert "## Where they differ, and why" in page
    assert callable(importlib.import_module(f"analysis.{name}").main)
    linked = re.findall(r"\((figures/[^)]+)\)", page) + re.findall(
        r"\{include\} (results/\S+)", page
    )
    assert linked
    assert not [path for path in linked if not (DOCS / "studies" / path).is_file()]
    body = json.loads((DOCS / "studies" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert body["study"] == name
    assert {"seed", "seconds", "versions", "date", "command"} <= set(body)
    assert body["rows"]


@pytest.mark.parametrize("name", run.STUDIES)
def test_the_tables_of_a_study_are_those_of_its_saved_run(name):
    body = json.loads((DOCS / "studies" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for path in (DOCS / "studies" / "results").glob("*.md"):
        if path.stem == name or path.stem.startswith(f"{name}-"):
            assert (
                f"`{body['command']}`: seed {body['seed']}, {body['seconds']} s, "
                f"{body['date'][:10]}" in path.read_text()
            )


def test_a_small_study_goes_from_measuring_to_its_figure(tmp_path, monkeypatch):
    common = importlib.import_module("analysis.common")
    monkeypatch.setattr(common, "DOCS", tmp_path)
    study = common.Study("small")
    for step in (0, 5):
        problem = common.checkpoint("digits_mlp", step, examples=20)
        study.compare(step, problem, [fl.KFAC(), fl.TKFAC()], layers=["2"], errors=["frobenius"])
    study.save()
    found = common.along("small")
    assert list(found) == [0, 5]
    first = study.comparisons["0"].value("2", "KFAC", "frobenius")
    assert found[0].value("2", "KFAC", "frobenius") == pytest.approx(first, rel=1e-5)
    study.table(["layer 2", "0", "5"], common.values(found, "2", "frobenius"))
    study.draw(fl.plots.training(found))
    assert "| KFAC | " in (tmp_path / "results" / "small.md").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "small.png").stat().st_size > 1000


def test_generated_parts_know_every_registered_thing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    docs = importlib.import_module("fisher_docs")
    layers, problems, measures = docs.layer_table(), docs.problem_table(), docs.measure_table()
    assert "| `nn.Linear` | inputs and output gradients |" in layers
    assert "martens_grosse" in problems
    for name in ("trace", "damped_spectral"):
        assert f"`{name} <fisher_lab.errors.{name}>`" in measures
    part = docs.approximation("EKFAC", registry()["EKFAC"])
    assert "{py:obj}`fisher_lab.EKFAC`" in part
    assert "EigenbasisDiagonal" in part
    assert "`naive_ekfac` of `tests/naive.py`" in part
    assert "P9 of the [theorems](../theorems.md): `tests/theorems/test_frobenius_order.py`." in part
    assert docs.benchmarks(tmp_path) == "No benchmark was run yet.\n"
    (tmp_path / "speed.md").write_text("# Speed\n\n| a |\n\n![b](b.svg)\n", encoding="utf-8")
    assert docs.benchmarks(tmp_path) == "\n## Speed\n\n| a |\n\n![b](benchmarks/b.svg)\n"


WRITTEN = [
    p for p in DOCS.rglob("*.md") if not {"generated", "_build", "auto_examples"} & set(p.parts)
]
WRITTEN += [ROOT / "CONTRIBUTING.md", ROOT / "README.md"]


def test_no_page_names_a_path_that_does_not_exist():
    missing = []
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        links = [
            page.parent / link for link in re.findall(r"\]\(((?!http)[^)#]+\.(?:md|png))", text)
        ]
        links += [
            ROOT / path
            for path in re.findall(r"`((?:fisher_lab|tests|analysis|docs)/[\w./]*)`", text)
        ]
        missing += [f"{page.name}: {link}" for link in links if not link.exists()]
    assert not missing


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    wrong = []
    for page in WRITTEN:
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
            rows = table.splitlines()
            cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
            wrong += [
                f"{page.name}: {row}"
                for row, count in zip(rows, cells, strict=True)
                if count != cells[0]
            ]
    assert not wrong


def test_no_page_includes_a_part_twice():
    for page in WRITTEN:
        parts = re.findall(r"\{include\} (\S+)", page.read_text(encoding="utf-8"))
        assert len(parts) == len(set(parts)), page.name


def test_every_section_of_the_api_stands_in_the_table_of_contents(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    docs = importlib.import_module("fisher_docs")
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for title in docs.API:
        assert f"\ngenerated/api-{docs.slug(title)}\n" in text
