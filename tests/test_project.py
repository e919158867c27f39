"""Promises of the project's own files: packaging, pins, README commands, sizes."""

import importlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.shell_blocks import shell_blocks

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def normalised(name: str) -> str:
    """The one spelling of a distribution's name: lower case, hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required_names(requirements: list[str]) -> set[str]:
    """The distribution names of requirements such as `torch>=2.6`."""
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def pins(file: str) -> dict[str, str]:
    """The `name==version` lines of a requirements file; any other line is an error."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalised(name): version for name, version in pairs}


def test_extras_and_command_exist():
    assert set(PROJECT["project"]["optional-dependencies"]) == {"data", "dev", "docs"}
    module, function = PROJECT["project"]["scripts"]["fisher-lab"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_package_index_shows_the_readme():
    assert (ROOT / PROJECT["project"]["readme"]).is_file()


def test_the_installed_command_starts_anywhere(tmp_path):
    # The one beside this interpreter: elsewhere on the path may lie another version.
    command = Path(sys.executable).with_name("fisher-lab")
    run = subprocess.run(
        [command, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr


def test_everything_declared_is_pinned():
    declared = required_names(PROJECT["project"]["dependencies"])
    declared = declared.union(
        *map(required_names, PROJECT["project"]["optional-dependencies"].values())
    )
    pinned = pins("constraints.txt")
    assert not declared - {"fisher-lab"} - set(pinned)
    assert pinned["torch"] == "2.13.0"
    assert not [version for version in pinned.values() if "+" in version]


def test_peers_are_pinned_apart():
    # They are installed without their dependencies, since those break other packages; a shared pin
    # must agree.
    constraints, peers = pins("constraints.txt"), pins("requirements-peers.txt")
    assert {"curvlinops-for-pytorch", "nngeometry"} <= set(peers)
    assert not [name for name in peers if constraints.get(name, peers[name]) != peers[name]]
    assert not {
        "torchvision",
        "curvlinops-for-pytorch",
        "nngeometry",
        "backpack-for-pytorch",
    } & set(constraints)


def test_types_are_shipped():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["fisher_lab"]
    assert importlib.resources.files("fisher_lab").joinpath("py.typed").is_file()


def test_version_is_written_once():
    assert importlib.metadata.version("fisher-lab") == PROJECT["project"]["version"]
    assert importlib.import_module("fisher_lab").__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_in_the_pages_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", text, flags=re.MULTILINE))
    assert "test" in named
    assert not named - targets


def test_every_target_is_documented_and_phony():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert targets == set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    assert targets == set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split())


def test_continuous_integration_runs_the_commands_of_the_readme():
    each_line, without_make = shell_blocks(ROOT / "README.md")
    names = [line.partition("#")[0].strip() for line in each_line.splitlines()]
    # the tests last: pytest's closing line ends the output
    assert names == ["make compare", "make test"]
    assert without_make.startswith("python3 -m venv .venv\n")
    assert without_make.rstrip().endswith('.venv/bin/python -m pytest -m "not slow"')
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ' run "$(python3 "$blocks" "$readme" 1)"\n' in script
    assert re.search(
        r'"\$blocks" "\$readme" 0\)\n.*\n    run "\$command"\ndone\n$', script, flags=re.DOTALL
    )


def test_continuous_integration_runs_the_commands_of_contributing():
    (block,) = shell_blocks(ROOT / "CONTRIBUTING.md")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    run = set(re.findall(r"^make .*$", script, flags=re.MULTILINE))
    run = {target for line in run for target in line.split()} | {"test"}  # that is the README's
    named = set(re.findall(r"^make ([a-z-]+)", block, flags=re.MULTILINE))
    assert named - run == {"format"}  # it changes files; `make lint` says whether it would


def test_a_shell_block_ends_where_it_ends(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nls  # a\n```\n\n```python\nx = 1\n```\n\n```bash\npwd\n```\n", encoding="utf-8"
    )
    assert shell_blocks(page) == ["ls  # a\n", "pwd\n"]


def test_no_test_steps_aside_silently():
    # A missing peer must fail in continuous integration: ask for it by the fixture or the marker
    # `peers`.
    word = "import" + "orskip"
    assert not [
        path for path in (ROOT / "tests").rglob("*.py") if word in path.read_text(encoding="utf-8")
    ]


def test_the_citation_is_whole_and_of_this_version():
    yaml = importlib.import_module("yaml")
    body = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # what the Citation File Format 1.2.0 asks for
    assert {"cff-version", "message", "title", "authors"} <= set(body)
    assert body["cff-version"] == "1.2.0"
    assert body["authors"]
    for author in body["authors"]:
        assert set(author) <= {"name", "family-names", "given-names", "orcid", "website"}
    assert body["type"] == "software"
    assert body["version"] == PROJECT["project"]["version"]
    assert body["license"] == PROJECT["project"]["license"]
