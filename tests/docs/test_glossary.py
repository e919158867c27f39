"""Words that were given up stay given up."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "glossary.md"


def given_up() -> list[tuple[str, str]]:
    """Class or module, and the name it no longer has."""
    table = PAGE.read_text(encoding="utf-8").partition("## Words that were given up")[2]
    found = []
    for name in re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE):
        owner, _, attribute = name.rpartition(".")
        found.append((owner, attribute))
    return found


def definitions() -> set[tuple[str, str]]:
    """Every function of the package with the class it is in, or the module."""
    found = set()
    for path in (ROOT / "fisher_lab").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found |= {
                    (node.name, entry.name)
                    for entry in node.body
                    if isinstance(entry, ast.FunctionDef)
                }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found |= {(path.stem, node.name), ("", node.name)}
    return found


def test_no_name_that_was_given_up_is_defined():
    names = given_up()
    assert names
    assert not set(names) & definitions()
