"""tests/README.md, written by `python -m tests.map`, names files that exist, and no module is
missing.
"""

import re

from tests import map as tests_map

ROWS = re.compile(r"^\| `(fisher_lab/[\w/]+\.py)` \| (.*) \|$", re.MULTILINE)


def rows() -> dict[str, list[str]]:
    """For each module of the page the test files that it names."""
    page = tests_map.PAGE.read_text(encoding="utf-8")
    found = {}
    for module, tests in ROWS.findall(page):
        found[module] = re.findall(r"`([^`]+)`", tests)
    return found


def test_every_module_has_a_row_and_no_row_is_of_a_module_that_went():
    assert list(rows()) == tests_map.modules()


def test_tests_that_are_named_exist():
    wrong = {}
    for module, tests in rows().items():
        missing = [name for name in tests if not (tests_map.ROOT / name).is_file()]
        if missing:
            wrong[module] = missing
    assert wrong == {}


def test_the_first_test_file_adds_most_and_a_small_gain_is_not_named():
    held = {
        "a.py": tests_map.Held(set(range(10))),
        "b.py": tests_map.Held(set(range(5, 90))),
        "c.py": tests_map.Held({1, 90}),
    }
    assert tests_map.holders(held) == ["b.py", "a.py"]


def test_of_two_that_run_the_same_the_one_with_more_tests_is_named():
    held = {
        "a.py": tests_map.Held({1, 2}, {"a.py::one"}),
        "b.py": tests_map.Held({1, 2}, {"b.py::one", "b.py::two"}),
    }
    assert tests_map.holders(held) == ["b.py"]
