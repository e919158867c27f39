"""Every public callable with odd arguments: a right result, or one sentence of the library's own.

The long form is `python -m tests.fuzz.run 20000`.
"""

from __future__ import annotations

import resource

import pytest

from tests.fuzz.judging import fault, is_sentence, verdict
from tests.fuzz.run import calls
from tests.fuzz.targets import all_targets

CALLS = 5000
PARTS = 10  # tests of so many calls each, which workers share
MOST_MEMORY = 600 * 2**20  # that odd arguments may take beyond what is loaded


def test_every_public_argument_has_a_right_value():
    missing = []
    for target in all_targets():
        for name, make in target.makers.items():
            if make is None:
                missing.append(f"{target.name}({name})")
    assert not missing, "tests/fuzz/values.py knows no right values of these"


def test_right_arguments_give_results(tmp_path, monkeypatch):
    """Otherwise all that is tested may be one refusal of the first argument."""
    monkeypatch.chdir(tmp_path)
    refused = set()
    done = set()
    for text, wrong in calls(0, 600, tmp_path, most_odd=0):
        name = text.split("(")[0]
        if wrong is None:
            done.add(name)
        else:
            refused.add(name)
    assert not refused - done


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_arguments_get_a_sentence(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a path such as "x" lands
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    for text, wrong in calls(part, CALLS // PARTS, tmp_path):
        if wrong is not None:
            faults.append(f"{text}\n    {wrong}")
    assert not faults, "\n".join(faults)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more * 1024 < MOST_MEMORY


def test_what_is_raw_is_found():
    def inside() -> None:
        raise ValueError("half")

    assert "raw" in (verdict(inside) or "")
    assert "raw" in (verdict(lambda: [][0]) or "")
    assert verdict(lambda: 3) is None
    assert "raw" in (fault_of(RuntimeError("Got 1, expected 2.")) or "")
    assert is_sentence("Got 1, expected 2.")
    assert not is_sentence("half")


def fault_of(error: Exception) -> str | None:
    try:
        raise error
    except Exception as caught:
        return fault(caught)
