"""Import modules where nothing is installed but what the README's commands install.

An environment often holds more than that: `make docs` brings what the documentation needs, a
developer what she likes. A peer that imports such a thing works there and fails in a fresh clone.
Here the rest is hidden from it:

    python -m tests.peers.provided lightning nngeometry    # prints which distributions they imported
"""

import importlib
import importlib.metadata
import json
import sys
import tomllib
import warnings
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
# what `make venv` and the README install beside requirements-peers.txt
INSTALLED = "fisher-lab[data,dev]"


def peer_pins() -> list[str]:
    """The distributions of requirements-peers.txt, by name."""
    lines = (ROOT / "requirements-peers.txt").read_text(encoding="utf-8").splitlines()
    return [
        canonicalize_name(line.split("==")[0])
        for line in lines
        if line and not line.startswith("#")
    ]


def requirements(distribution: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a distribution declares to need here, on this platform, with these extras; none if it is
    missing.
    """
    try:
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for text in texts:
        requirement = Requirement(text)
        marker = requirement.marker
        # A requirement without extras is asked for by the empty name.
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            found.append(requirement)
    return found


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, with the extras of INSTALLED; read there, since an installation
    may be older.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    for extra in Requirement(INSTALLED).extras:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts if not text.startswith("fisher-lab")]


def closure(roots: Iterable[Requirement]) -> set[str]:
    """The distributions of some requirements and of all that these need in turn."""
    waiting = list(roots)
    seen = set()
    names = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        names.add(name)
        waiting += requirements(name, requirement.extras)
    return names


def provided() -> set[str]:
    """What `pip install -e '.[data,dev]'` and then
    `pip install --no-deps -r requirements-peers.txt` install.
    """
    return closure(declared()) | {"fisher-lab"} | set(peer_pins())


def hide_all_but(names: set[str]) -> None:
    """Let this process find only the distributions `names`, the standard library and the working
    directory.
    """
    hidden = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not names & {canonicalize_name(owner) for owner in owners}
    }

    class Provided(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.partition(".")[0] in hidden:
                return None
            return super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *arguments, **options):
            # Libraries ask the metadata, too, whether an optional helper is there.
            found = super().find_distributions(*arguments, **options)
            return (each for each in found if canonicalize_name(each.name) in names)

    sys.meta_path = [Provided if finder is PathFinder else finder for finder in sys.meta_path]


def imported_by(modules: list[str]) -> list[str]:
    """Import the modules; the names of the distributions that were imported with them."""
    owners = importlib.metadata.packages_distributions()
    before = set(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)
    found = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted({canonicalize_name(owner) for name in found for owner in owners.get(name, [])})


if __name__ == "__main__":
    hide_all_but(provided())
    print(json.dumps(imported_by(sys.argv[1:])))
