"""A damaged file loads as what was written, or is refused in a sentence.

The long form is `python -m tests.fuzz.damage 1000`.
"""

from __future__ import annotations

import pytest

from tests.fuzz import damage


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damaged_files_never_load_as_something_else(kind, tmp_path):
    assert not damage.faults(kind, 150, tmp_path)


def test_what_loads_as_something_else_is_found(tmp_path, monkeypatch):
    write, _ = damage.KINDS["metrics"]
    monkeypatch.setitem(damage.KINDS, "metrics", (write, unchecked))
    assert damage.faults("metrics", 50, tmp_path)


def unchecked(path):
    return damage.json.dumps(damage.training.load_metrics(path, check=False))
