"""Every public name has a docstring with a short example, which runs and gives what it says."""

import copy
import doctest
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def reference() -> dict[str, object]:
    """What the API reference lists, by its full name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        docs = importlib.import_module("fisher_docs")
    found = {}
    for things in docs.API.values():
        for thing in things:
            found[docs.public_path(thing)] = thing
    return found


REFERENCE = reference()


@pytest.fixture(scope="module")
def beginning():
    """The names that the examples begin from, as the page of the reference makes them."""
    names: dict[str, object] = {}
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in BLOCK.findall(page):
            exec(compile(block, "api.md", "exec"), names)
    return names


@pytest.fixture
def unregistered():
    """Examples that register something of their own leave nothing behind."""
    problems = importlib.import_module("fisher_lab.problems.registry")
    before = dict(problems._REGISTERED)
    yield
    problems._REGISTERED.clear()
    problems._REGISTERED.update(before)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_example_of_a_public_name_runs(name, beginning, unregistered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    text = inspect.getdoc(REFERENCE[name]) or ""
    assert "\nExample:\n    >>> " in text, f"{name} has no example"
    names = dict(beginning)
    names["model"] = copy.deepcopy(names["model"])  # an example may train it
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    said: list[str] = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.attempted > 0
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_public_method_has_a_docstring(name):
    thing = REFERENCE[name]
    if not inspect.isclass(thing):
        return
    bare = []
    for member, value in vars(thing).items():
        target = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        public = inspect.isfunction(target) and not member.startswith("_")
        if public and not inspect.getdoc(getattr(thing, member)):
            bare.append(member)
    assert not bare
