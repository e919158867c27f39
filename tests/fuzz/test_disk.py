"""Faults of the disk: every call to the system fails in its turn, and nothing that was there is
lost.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fisher_lab import plots, training
from tests.fuzz import values

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
CALLS = ("open", "fsync", "replace", "fdopen")
MOST = 12  # calls of one kind that one of the runs below makes


def saved_json(folder: Path) -> None:
    values.comparison().save(folder / "a.json")


def saved_csv(folder: Path) -> None:
    values.comparison().save(folder / "a.csv")


def drawn(folder: Path) -> None:
    plots.save(plots.traces(values.comparison()), folder / "a.svg")


def trained(folder: Path) -> None:
    torch.manual_seed(0)
    model = values.dense_net()
    training.fit(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        nn.CrossEntropyLoss(),
        (values.inputs(20), values.classes(20)),
        2,
        batch=5,
        metrics=folder / "a.jsonl",
        checkpoint=folder / "a.pt",
        progress=False,
    )


RUNS = (
    saved_json,
    saved_csv,
    trained,
    pytest.param(drawn, marks=pytest.mark.slow),
)


class Faulty:
    """A call of the system that fails once, at its turn.

    Args:
        real: the call.
        turn: at which of its calls, from 0.
        number: of the error.
        folder: whose files it concerns, where it is given a name.
    """

    def __init__(self, real, turn, number, folder):
        self.real = real
        self.turn = turn
        self.number = number
        self.folder = str(folder)
        self.failed = False

    def __call__(self, *arguments, **options):
        # imports and the test runner open files too
        is_name = bool(arguments) and isinstance(arguments[0], str | os.PathLike)
        if is_name and not str(arguments[0]).startswith(self.folder):
            return self.real(*arguments, **options)
        self.turn -= 1
        if self.turn == -1:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **options)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("run", RUNS)
def test_what_the_system_refuses_loses_nothing(run, call, tmp_path, monkeypatch):
    run(tmp_path)  # what can be loaded late is loaded
    faults = 0
    for turn in range(MOST):
        folder = tmp_path / str(turn)
        folder.mkdir()
        run(folder)
        before = contents(folder)
        number = ERRORS[turn % len(ERRORS)]
        with monkeypatch.context() as patched:
            faulty = Faulty(getattr(os, call), turn, number, folder)
            patched.setattr(os, call, faulty)
            sentence = refusal(run, folder)
            assert sentence.endswith(".") == faulty.failed
        if not faulty.failed:
            break
        faults += 1
        assert set(contents(folder)) <= set(before), "something half-written is left"
        for name in before:
            # metrics begin anew before the first epoch
            assert name in contents(folder) or name.endswith(".jsonl")
        run(folder)  # and the next run is none the worse
    else:
        pytest.fail("it makes more calls than are tried")
    assert faults or call == "fdopen"


def refusal(run, folder: Path) -> str:
    """What it says, nothing where it ends well."""
    try:
        run(folder)
    except ValueError as error:
        return str(error)
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
