"""Pages that run while they are built show what they print and draw; docstrings become markup."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE = """# A page

```python
from matplotlib.figure import Figure
figure = Figure()
print("one |", 1 + 1)
```

![An empty figure](drawn:figure)

```python
figure = Figure(figsize=(2, 1))
```

![Another empty figure](drawn:figure)
"""


@pytest.fixture
def running(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("running")


@pytest.fixture
def docstrings(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("docstrings")


def test_a_page_shows_what_its_blocks_print_and_draw(running, tmp_path):
    text = running.with_results(PAGE, "tutorial/page", tmp_path)
    assert ":class: output\n\none | 2\n```" in text
    assert "![An empty figure](/generated/drawn/tutorial-page-1.png)" in text
    assert "![Another empty figure](/generated/drawn/tutorial-page-2.png)" in text
    first, second = ((tmp_path / f"tutorial-page-{n}.png").read_bytes() for n in (1, 2))
    assert first != second
    assert text.count(":class: output") == 1  # nothing stands below a block that prints nothing


def test_a_block_that_fails_ends_the_build(running, tmp_path):
    with pytest.raises(ZeroDivisionError):
        running.with_results("```python\n1 / 0\n```\n", "tutorial/page", tmp_path)


def test_only_pages_that_show_results_run(running, tmp_path):
    source = [PAGE]
    running.insert_results(None, "extending", source)
    assert source == [PAGE]


@pytest.mark.parametrize(
    ("plain", "markup"),
    [
        ("|F^ - F|_F / |F|_F", r"\|F^ - F\|_F / \|F\|_F"),
        ("see `compare` and `[N, T]`", "see `compare` and ``[N, T]``"),
        ("See also: KFAC, TKFAC.", "See also: `KFAC`, `TKFAC`."),
        ("a * b of d_in", r"a \* b of d_in"),
    ],
)
def test_plain_text_becomes_markup(docstrings, plain, markup):
    assert docstrings.marked(plain) == markup


def test_a_doctest_stays_as_it_is(docstrings):
    lines = [">>> x = a * b", "|c|", "", "|d|"]
    docstrings.to_markup(None, "function", "f", None, None, lines)
    assert lines == [">>> x = a * b", "|c|", "", r"\|d\|"]


def test_the_names_of_see_also_are_links(docstrings):
    lines = [
        "See Also:",
        "    estimate, for one; fl.exact_fisher, for the blocks.",
        "",
        "Args:",
        "    a, b",
    ]
    docstrings.to_markup(None, "function", "f", None, None, lines)
    assert lines[1] == "    `estimate`, for one; `fl.exact_fisher`, for the blocks."
    assert lines[-1] == "    a, b"


def written() -> list[Path]:
    """The pages that are written by hand."""
    made = {"generated", "_build", "auto_examples"}
    return [page for page in sorted(DOCS.rglob("*.md")) if not made & set(page.parts)]


def test_every_picture_says_what_it_shows():
    short = []
    for page in [*written(), ROOT / "README.md"]:
        for alt in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")):
            if len(alt.split()) < 3:
                short.append(f"{page.relative_to(ROOT)}: {alt!r}")
    assert not short


def test_the_tutorial_has_pictures_exercises_and_answers():
    pages = sorted((DOCS / "tutorial").glob("[1-6]-*.md"))
    assert len(pages) == 6
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "](drawn:" in text
        assert "## Exercises" in text
        assert text.count("<details>") == text.count("</details>") >= 1


def test_the_gallery_has_twelve_figures():
    scripts = sorted((DOCS / "gallery").glob("plot_*.py"))
    assert len(scripts) == 12
    for script in scripts:
        assert "\nfigure = " in script.read_text(encoding="utf-8"), script.name
