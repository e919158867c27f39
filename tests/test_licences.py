"""The licences of all that is installed with the package: permissive ones, as its own is.

`python -m tests.test_licences` lists them.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Zlib|MPL|Mozilla|Unlicense|"
    r"matplotlib|0BSD|CC0|CNRI|The Unlicense|MIT-CMU|LLVM)\b",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
LIBRARIES_OF_THE_SYSTEM = re.compile(r"^(nvidia-|cuda-|triton$)")  # of torch, on some machines


def distributions() -> dict[str, Distribution]:
    """All that the package needs, with the extra `data`, as far as it is installed."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    open_names = [*project["dependencies"], *project["optional-dependencies"]["data"]]
    found: dict[str, Distribution] = {}
    while open_names:
        requirement = Requirement(open_names.pop())
        name = requirement.name.lower()
        if name in found or LIBRARIES_OF_THE_SYSTEM.match(name):
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        open_names += found[name].requires or []
    return dict(sorted(found.items()))


def licence(of: Distribution) -> str:
    """What a distribution says of its licence, in one line."""
    about = of.metadata
    expression = about.get("License-Expression")
    if expression:
        return expression
    for line in about.get_all("Classifier") or []:
        if line.startswith("License :: OSI Approved :: "):
            return line.removeprefix("License :: OSI Approved :: ")
    text = about.get("License") or "unknown"
    return text.splitlines()[0]


def test_every_licence_is_permissive():
    found = distributions()
    assert {"torch", "numpy", "scipy", "pydantic"} <= set(found)
    wrong = {}
    for name, of in found.items():
        said = licence(of)
        # one of several that may be chosen is enough
        if not PERMISSIVE.search(said) or (COPYLEFT.search(said) and " OR " not in said.upper()):
            wrong[name] = said
    assert not wrong


def test_a_copyleft_licence_would_be_found():
    assert not PERMISSIVE.search("GNU General Public License v3 (GPLv3)")
    assert COPYLEFT.search("GPL-3.0-only")


if __name__ == "__main__":
    for name, of in distributions().items():
        print(f"{name} {of.version}: {licence(of)}")
