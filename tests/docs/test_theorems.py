"""The page of theorems and the tests that cite its numbers say the same."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "theorems.md"
NUMBER = re.compile(r"\b[PX][1-9]\d?\b")
PLACES = ("theorems", "contracts", "optim", "peers", "errors", "layers")


def statements() -> dict[str, str]:
    """The text of every numbered statement of the page."""
    parts = re.split(r"^([PX]\d+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named_files(text: str) -> set[str]:
    """The test files that a statement names."""
    return set(re.findall(r"tests/[\w/]+\.py", text))


def cited() -> dict[str, set[str]]:
    """For each number the test files with a test (not only a file's docstring) that cites it."""
    found: dict[str, set[str]] = {}
    for place in PLACES:
        for path in sorted((ROOT / "tests" / place).glob("test_*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                for number in NUMBER.findall(ast.get_docstring(node) or ""):
                    found.setdefault(number, set()).add(str(path.relative_to(ROOT)))
    return found


def test_numbers_are_complete_and_in_order():
    expected = [f"P{i}" for i in range(1, 30)] + [f"X{i}" for i in range(1, 13)]
    assert list(statements()) == expected


def test_every_file_that_a_statement_names_cites_its_number():
    citations = cited()
    for number, text in statements().items():
        missing = named_files(text) - citations.get(number, set())
        assert not missing, f"{number} names {missing}, whose tests do not cite it"


def test_every_cited_number_is_a_statement():
    unknown = set(cited()) - set(statements())
    assert not unknown


def test_a_statement_without_a_test_says_so():
    for number, text in statements().items():
        if not named_files(text):
            assert "test" in text, f"{number} names no test and does not say why"
