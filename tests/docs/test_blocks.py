"""Every Python block of the README and the documentation runs, each page in one namespace from top
to bottom.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch

import fisher_lab as fl
from fisher_lab.approximations import registry
from fisher_lab.errors import MEASURES
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"generated", "_build", "auto_examples"} & set(page.parts)]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_BLOCKS = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.fixture
def unregistered():
    """What a page registers is taken out of the registries again: other tests run over all that is
    there.
    """
    registries = (fl.Approximation._registry, Layer._registry, Likelihood._registry, MEASURES)
    before = [dict(found) for found in registries]
    yield
    for found, entries in zip(registries, before, strict=True):
        found.clear()
        found.update(entries)
    assert "Isotropic" not in registry()


def numbered(text: str):
    """The blocks with the line they begin on."""
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


def cases():
    """The pages; those of the tutorial train and measure, and the documentation's build runs them
    too.
    """
    found = []
    for page in WITH_BLOCKS:
        marks = [pytest.mark.slow] if page.parent.name == "tutorial" else []
        found.append(pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks))
    return found


@pytest.mark.parametrize("page", cases())
def test_every_block_runs(page, unregistered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write files
    run(page)


def run(page: Path) -> None:
    """Run the blocks of a page."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, block in numbered(text):
            tree = ast.increment_lineno(ast.parse(block, str(page)), line)
            exec(compile(tree, str(page), "exec"), names)


def test_the_main_pages_have_blocks():
    found = {str(page.relative_to(ROOT)) for page in WITH_BLOCKS}
    assert {
        "README.md",
        "docs/index.md",
        "docs/extending.md",
        "docs/coming-from.md",
        "docs/howto/train.md",
    } <= found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_needs_other_libraries_is_at_least_python(page):
    """Blocks that do not run here are marked `py`; a method of a class may stand alone."""
    for block in re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        compile(textwrap.dedent(block), str(page), "exec")


def test_a_broken_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nfine = 1\n```\n\n```python\nassert fine == 2\n```\n",
        encoding="utf-8",
    )
    with pytest.raises(AssertionError):
        run(page)
