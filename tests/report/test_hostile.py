"""Comparison files that strangers wrote: no string of theirs becomes markup, a script, or a file
somewhere else.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fisher_lab as fl
from fisher_lab import cli, plots
from fisher_lab.report import write_report
from tests.report.support import HOSTILE, Page, hostile_file

OWN_TAGS = {
    "html",
    "head",
    "meta",
    "link",
    "title",
    "style",
    "body",
    "main",
    "h1",
    "h2",
    "h3",
    "nav",
    "a",
    "section",
    "p",
    "dl",
    "dt",
    "dd",
    "figure",
    "figcaption",
    "div",
    "details",
    "summary",
    "form",
    "label",
    "select",
    "option",
    "input",
    "output",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "button",
    "code",
    "script",
    "svg",
    "defs",
    "clippath",
    "pattern",
    "g",
    "path",
    "use",
    "image",
    "rect",
    "metadata",
    "rdf:rdf",
    "cc:work",
}
every_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Glyph .* missing from font"),
    # names as long as these leave no room
    pytest.mark.filterwarnings("ignore:constrained_layout not applied"),
]


@every_text
def test_no_string_of_a_file_becomes_markup_of_the_page(tmp_path, text):
    path = write_report(hostile_file(tmp_path / "run.json", text), tmp_path / "report.html")
    page = check(path)
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", page.source)
    if text.isprintable():
        assert f"{text}KFAC" in [
            attributes.get("data-approximation") for _, attributes in page.tags
        ]
        assert " ".join(f"{text}note".split()) in page.text


def test_nor_where_several_files_are_one_training(tmp_path):
    given = [
        hostile_file(tmp_path / f"at{steps}.json", HOSTILE["image"], steps) for steps in (3, 40)
    ]
    for path in given:  # the only error that is drawn along a training
        path.write_text(
            path.read_text().replace(json.dumps(f"{HOSTILE['image']}frobenius"), '"frobenius"')
        )
    page = check(write_report(given, tmp_path / "report.html"))
    assert "Along the training" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 13


def check(path):
    """The page, whose elements, attributes and identifiers are the template's and
    matplotlib's own.
    """
    page = Page(path)
    assert {tag for tag, _ in page.tags} <= OWN_TAGS
    assert len(page.scripts) == sum(tag == "script" for tag, _ in page.tags) == 1
    for _, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("autofocus", "srcdoc")
        ]
        assert re.fullmatch(r"[A-Za-z][\w.-]*", attributes.get("id") or "a")
        for name in ("href", "xlink:href", "src", "action"):
            assert re.match(r"#[\w.-]+$|data:", attributes.get(name) or "#a"), attributes
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(identifiers)
    for drawing in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        ElementTree.fromstring(drawing)  # it would also stand alone, as a file
    return page


def test_the_page_allows_its_own_script_and_nothing_from_outside(tmp_path):
    page = Page(write_report(hostile_file(tmp_path / "run.json", "x"), tmp_path / "report.html"))
    metas = [
        attributes
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(metas) == 1
    policy = dict(part.strip().split(" ", 1) for part in metas[0]["content"].split(";"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    # Before all else, for it holds only for what comes behind it.
    assert [tag for tag, _ in page.tags[:4]] == ["html", "head", "meta", "meta"]
    assert page.tags[3][1] == metas[0]


@pytest.mark.parametrize("prefix", ['"><script>', "a b", "1a", "a\\1", "a'"])
def test_identifiers_of_a_drawing_take_letters_only(tmp_path, prefix):
    figure = plots.cost(fl.load_comparison(hostile_file(tmp_path / "run.json", "")))
    with pytest.raises(ValueError, match="expected"):
        plots.svg(figure, prefix)


@pytest.mark.parametrize("name", ["image", "folder", "absolute", "empty"])
def test_figures_lie_in_their_folder_whatever_the_errors_are_called(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    given = hostile_file(tmp_path / "run.json", HOSTILE[name])
    folder = tmp_path / "deep" / "er" / "figures"
    cli.main(["plot", str(given), "--output", str(folder), "--form", "svg"])
    printed = capsys.readouterr().out.splitlines()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != given]
    assert sorted(map(str, written)) == sorted(printed)
    assert {path.parent for path in written} == {folder}
    assert len(written) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.svg", path.name) for path in written)
    assert not Path("/tmp/escapedfrobenius.svg").exists()


def test_a_file_at_the_place_that_a_name_points_to_stays(tmp_path, capsys):
    victim = tmp_path / "victim.svg"
    victim.write_text("precious")
    given = hostile_file(tmp_path / "run.json", "/../../victim")
    body = json.loads(given.read_text())
    for row in body["rows"]:
        row["error"] = str(victim.with_suffix("")) if row["damping"] is None else "../victim"
    given.write_text(json.dumps(body))
    cli.main(["plot", str(given), "--output", str(tmp_path / "figures")])
    assert victim.read_text() == "precious"


def test_runs_of_one_name_in_two_folders_do_not_overwrite_each_others_figures(tmp_path, capsys):
    given = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        given.append(str(hostile_file(tmp_path / folder / "run.json", "", 3)))
    cli.main(["plot", *given, "--output", str(tmp_path / "figures")])
    assert len(list((tmp_path / "figures").iterdir())) == 2 * 6


def test_a_link_in_the_folder_is_not_followed(tmp_path, capsys):
    victim, folder = tmp_path / "victim", tmp_path / "figures"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "cost.svg").symlink_to(victim)
    given = hostile_file(tmp_path / "run.json", "")
    with pytest.raises(SystemExit):
        cli.main(["plot", str(given), "--output", str(folder)])
    assert "expected one that lies in" in capsys.readouterr().err
    assert victim.read_text() == "precious"
    figure = plots.cost(fl.load_comparison(given))
    # a path that is given by name is the caller's: the link is replaced
    plots.save(figure, folder / "cost.svg")
    assert victim.read_text() == "precious"
    assert not (folder / "cost.svg").is_symlink()


@every_text
def test_tables_show_every_string_as_it_is_and_command_no_terminal(tmp_path, text):
    comparison = fl.load_comparison(hostile_file(tmp_path / "run.json", text))
    shown = comparison.table(width=400)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)
    if text.isprintable():
        assert f"{text}KFAC" in shown


@pytest.mark.parametrize("name", ["[red]", "[/]", "[link=http://127.0.0.1:9]x[/link]"])
def test_brackets_of_a_name_stand_in_the_table(tmp_path, name):
    comparison = fl.load_comparison(hostile_file(tmp_path / "run.json", name))
    assert f"{name}KFAC" in comparison.table(width=400)
    assert f"{name}0" in comparison.table(width=400)


def test_half_a_character_is_refused(tmp_path):
    """No file that we write holds one: saving refuses it, too."""
    given = hostile_file(tmp_path / "run.json", "\ud800")
    with pytest.raises(ValueError, match=r"run.json is truncated or foreign \(settings"):
        fl.load_comparison(given)
