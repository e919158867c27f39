"""requirements-peers.txt is installed without dependencies, so it must name all that its libraries
import.
"""

import ast
import importlib.metadata
import subprocess
import sys

import pytest
from packaging.utils import canonicalize_name

from tests.peers.provided import ROOT, peer_pins, provided, requirements
from tests.test_project import pins

pytestmark = [pytest.mark.peers, pytest.mark.lightning]

LEFT_OUT = {
    # cannot be imported beside the CPU build of torch; nngeometry and BackPACK do without it
    "torchvision",
}


@pytest.fixture(autouse=True)
def all_pins_installed():
    """An environment from before a pin was added cannot say what the pins provide."""
    installed = {canonicalize_name(found.name) for found in importlib.metadata.distributions()}
    absent = sorted(set(peer_pins()) - installed)
    assert not absent, "run pip install --no-deps -r requirements-peers.txt"


def modules_of_peers() -> list[str]:
    """The packages of every pinned peer, and the modules below them that a test imports."""
    owners = importlib.metadata.packages_distributions()
    peers = set(peer_pins())
    packages = {
        name
        for name, found in owners.items()
        if peers & {canonicalize_name(owner) for owner in found}
    }
    # not the compiled libraries beside them
    packages = {name for name in packages if name.isidentifier()}
    modules = set(packages)
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.partition(".")[0] in packages
            ):
                modules.add(node.module)
    return sorted(modules)


def import_with(names: set[str], modules: list[str]) -> subprocess.CompletedProcess:
    """Import the modules in a process that finds the distributions `names` alone, and print what
    was imported.
    """
    code = (
        "import sys; from tests.peers import provided; names, modules = map(str.split, "
        "sys.argv[1:]);provided.hide_all_but(set(names)); print(*provided.imported_by(modules))"
    )
    arguments = [" ".join(names), " ".join(modules)]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_peers_import_nothing_but_what_is_pinned():
    modules = modules_of_peers()
    assert {"curvlinops", "nngeometry", "backpack", "lightning", "nngeometry.object.pspace"} <= set(
        modules
    )
    run = import_with(provided(), modules)
    # The last line names the module that is missing.
    assert run.returncode == 0, (
        f"add what is missing to requirements-peers.txt: {run.stderr.strip().splitlines()[-1]}"
    )
    imported = set(run.stdout.split())
    assert {"torch", "lightning", "pyyaml"} <= imported
    assert (
        not imported
        - {"fisher-lab"}
        - set(pins("constraints.txt"))
        - set(pins("requirements-peers.txt"))
    )


def test_a_missing_pin_is_named():
    run = import_with(provided() - {"pyyaml"}, ["yaml"])  # installed, but not provided
    assert run.returncode != 0
    assert "No module named 'yaml'" in run.stderr


def test_what_the_peers_declare_is_pinned_or_left_out_for_a_reason():
    names = provided()
    missing = []
    for peer in peer_pins():
        for requirement in requirements(peer):
            name = canonicalize_name(requirement.name)
            if name not in names | LEFT_OUT:
                missing.append(f"{peer}: {requirement}")
    assert not missing
