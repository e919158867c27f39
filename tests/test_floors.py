"""The floor law: a file imports only from floors below its own, and the package loads no more than
it needs.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fisher_lab"

FLOORS = [
    ["_ground"],  # what users write, in one form; the machine; numerics
    # LayerStats; p(y|z); module adapters; rows and their files
    ["statistics", "likelihoods", "layers", "results"],
    ["matrices", "_passes"],  # structures; model + data -> {layer: LayerStats}
    # one method a file; one measure a row; named problems
    ["approximations", "errors", "problems"],
    # estimates and torch.func's truth; the Fisher of all layers together; figures
    ["estimation", "whole_network", "plots"],
    ["diagnose"],  # compare(...)
    ["optim"],  # optimizers
    ["report", "training"],  # HTML report, training loop
    ["cli"],  # the command line calls all of them
    ["__init__", "__main__"],  # the public face
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS, start=1) for unit in units}

# What `import fisher_lab` must not load beyond what torch loads itself: each is imported where it
# is first used.
LATE = [
    "matplotlib",
    "pandas",
    "sklearn",
    "skimage",
    "mlxtend",
    "jinja2",
    "tyro",
    "rich",
    "selenium",
    "hypothesis",
]
LATE += [
    "scipy.stats",
    "scipy.optimize",
    "scipy.signal",
    "scipy.ndimage",
    "scipy.interpolate",
    "scipy.integrate",
]


def module_name(path: Path, package: Path) -> str:
    """The dotted name of a file of the package: fisher_lab/matrices/__init__.py is
    fisher_lab.matrices.
    """
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The name that has a floor: the file or folder right below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one but the bodies of `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        }:
            for branch in child.orelse:
                yield branch
                yield from runtime_nodes(branch)
        else:
            yield child
            yield from runtime_nodes(child)


def imported_modules(path: Path, package: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function."""
    here = module_name(path, package)
    folder = here.split(".") if path.name == "__init__.py" else here.split(".")[:-1]
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            # `from source import x` means the module x if there is one, else a name in it
            for alias in node.names:
                target = package.parent.joinpath(*source.split("."), alias.name)
                is_module = (
                    target.with_suffix(".py").is_file() or (target / "__init__.py").is_file()
                )
                found.add(f"{source}.{alias.name}" if is_module else source)
    return {name for name in found if name.split(".")[0] == package.name}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Each module of the package with the modules of the package it imports."""
    files = sorted(package.rglob("*.py"))
    return {module_name(path, package): imported_modules(path, package) for path in files}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """One sentence for each import that the floor law forbids."""
    wrong = []
    for module, imports in graph.items():
        unit = unit_of(module)
        if unit not in FLOOR_OF:
            wrong.append(
                f"{module} stands on no floor: give {unit!r} one in FLOORS and in the design page "
                "of the docs"
            )
            continue
        for imported in sorted(imports):
            other = unit_of(imported)
            if other != unit and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[unit]:
                wrong.append(
                    f"{module} (floor {FLOOR_OF[unit]}) imports {imported} (floor "
                    f"{FLOOR_OF.get(other)})"
                )
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, or nothing."""
    try:
        TopologicalSorter(
            {module: imports - {module} for module, imports in graph.items()}
        ).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_file_imports_only_from_floors_below_its_own():
    graph = import_graph(PACKAGE)
    assert "fisher_lab" in graph
    assert not violations(graph), "\n".join(violations(graph))


def test_no_import_goes_in_a_circle():
    assert not circle(import_graph(PACKAGE)), " -> ".join(circle(import_graph(PACKAGE)))


@pytest.fixture
def planted(tmp_path):
    """A function that writes a small package from {file: text} and returns its import graph."""

    def plant(files):
        for name, text in files.items():
            path = tmp_path / "fisher_lab" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return import_graph(tmp_path / "fisher_lab")

    return plant


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("layers.py", "import fisher_lab.diagnose"),
        ("layers.py", "from fisher_lab import diagnose"),
        ("layers.py", "from .diagnose import compare"),
        ("layers.py", "def f():\n    from . import diagnose"),
        ("layers.py", "from . import statistics"),  # its own floor, another unit
        ("statistics.py", "import fisher_lab as fl"),  # the public face stands on top
        ("matrices/dense.py", "from ..estimation import exact_fisher"),
        ("matrices/dense.py", "if not TYPE_CHECKING:\n    from ..estimation import exact_fisher"),
        (
            "matrices/dense.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from ..estimation import exact_fisher",
        ),
        ("nowhere.py", ""),
    ],
)
def test_a_planted_violation_is_found(planted, file, text):
    names = ("__init__", "diagnose", "statistics", "estimation", "matrices/__init__")
    others = {f"{name}.py": "" for name in names}
    assert len(violations(planted(others | {file: text}))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nfrom fisher_lab import statistics",
        "from .base import FisherMatrix",
        "from ..statistics import LayerStats",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..estimation import Running",
        "import typing\nif typing.TYPE_CHECKING:\n    from ..estimation import Running",
    ],
)
def test_what_is_allowed_is_not_reported(planted, text):
    files = {
        "statistics.py": "",
        "estimation.py": "",
        "matrices/base.py": "",
        "matrices/dense.py": text,
    }
    files |= {
        "__init__.py": "from .matrices import dense",
        "matrices/__init__.py": "from .dense import Dense",
    }
    graph = planted(files)
    assert not violations(graph)
    assert not circle(graph)


def test_a_planted_circle_is_found(planted):
    files = {"matrices/__init__.py": "", "matrices/base.py": "from . import dense"}
    assert circle(
        planted(files | {"matrices/dense.py": "def f():\n    from .base import FisherMatrix"})
    )


KINDS_OF_FISHER = {"true", "mc", "empirical"}


def compared_kinds(text: str) -> list[int]:
    """Lines that branch on the name of a kind of Fisher: a comparison, a case, a key of a table."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        for part in asked:
            options = part.elts if isinstance(part, ast.Tuple | ast.Set | ast.List) else [part]
            for option in options:
                if isinstance(option, ast.Constant) and option.value in KINDS_OF_FISHER:
                    lines.append(node.lineno)
    return lines


def test_only_the_labels_know_the_kinds_of_fisher():
    """All others ask the kind what it is: `draws`, `expectation`, `needs_data_labels`."""
    known = PACKAGE / "_passes" / "labels.py"
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != known:
            name = path.relative_to(PACKAGE)
            found = compared_kinds(path.read_text(encoding="utf-8"))
            wrong += [f"{name}:{line}" for line in found]
    assert not wrong, f"ask the Labels instead of comparing: {', '.join(wrong)}"


@pytest.mark.parametrize(
    "text",
    [
        'if fisher == "mc":\n    pass',
        'if "true" != self.fisher:\n    pass',
        'x = fisher in ("mc", "empirical")',
        'words = {"true": "in closed form"}',
        'match fisher:\n    case "mc":\n        pass',
    ],
)
def test_a_planted_comparison_of_kinds_is_found(text):
    assert compared_kinds(text)


@pytest.mark.parametrize("text", ['network(model, fisher="mc")', 'def f(fisher="true"):\n    pass'])
def test_naming_a_kind_is_not_comparing_it(text):
    assert not compared_kinds(text)


PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import fisher_lab
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "loaded": sorted(set(sys.modules) - before)}))
"""


def probe() -> dict:
    """What `import fisher_lab` costs on top of `import torch`, measured in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return json.loads(run.stdout)


def test_import_is_light():
    runs = [probe()]
    # the first may compile, and machines are busy
    while min(run["seconds"] for run in runs) >= 1 and len(runs) < 3:
        runs.append(probe())
    heavy = [name for name in LATE if name in runs[0]["loaded"]]
    assert not heavy, (
        f"import fisher_lab loads {', '.join(heavy)}: import them where they are first used"
    )
    assert min(run["seconds"] for run in runs) < 1
