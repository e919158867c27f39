"""The fingerprint of a user's own code: it changes with what the code does, with nothing else."""

import types

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._ground.code import fingerprint
from fisher_lab.diagnose import DifferentRunError

OWN = '''
"""A file."""
from dataclasses import dataclass
import fisher_lab as fl

FACTOR = 2.0

def helper(x, by=1.0):
    return x * by * FACTOR

@dataclass(frozen=True)
class Mine(fl.Diagonal):
    """Mine."""

    def assemble(self, moments):
        found = super().assemble(moments)
        return found.scaled(helper(0.5))
'''


def classes_of(text: str):
    module = types.ModuleType("own_code")
    exec(compile(text, "own_code.py", "exec"), module.__dict__)
    return module.Mine


def of(text: str) -> str | None:
    return fingerprint(classes_of(text))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("FACTOR = 2.0", "FACTOR = 3.0"),
        ("x * by", "x / by"),
        ("by=1.0", "by=1.5"),
        ("helper(0.5)", "helper(0.25)"),
        ("found.scaled", "found.powered"),
        ("fl.Diagonal", "fl.KFAC"),
    ],
)
def test_what_the_code_does_changes_it(before, after):
    assert of(OWN) != of(OWN.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [("FACTOR = 2.0", "# a comment\n\n\nFACTOR = 2.0"), ('"""A file."""', "other = 3")],
)
def test_lines_elsewhere_do_not(before, after):
    assert of(OWN) == of(OWN.replace(before, after))


def test_what_is_the_librarys_has_none():
    assert fingerprint(fl.KFAC(), fl.Corrected, nn.CrossEntropyLoss(), fl.errors.trace) is None


def test_it_is_the_same_in_another_process_and_for_constants_in_sets():
    text = OWN.replace("FACTOR = 2.0", "FACTOR = 2.0 if {'a', 'b'} else 1")
    assert of(text) == of(text)


def test_a_run_is_not_gone_on_with_after_its_own_approximation_was_edited(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    data = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])

    def run(text: str) -> fl.Comparison:
        own = {"mine": classes_of(text)()}
        return fl.compare(
            model, nn.CrossEntropyLoss(), data, own, errors="trace", resume=tmp_path / "run.json"
        )

    first = run(OWN)
    assert run(f"# a comment\n{OWN}").rows == first.rows
    with pytest.raises(DifferentRunError, match="code"):
        run(OWN.replace("FACTOR = 2.0", "FACTOR = 3.0"))
