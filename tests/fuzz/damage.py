"""Files of every kind, damaged in every way: `python -m tests.fuzz.damage 1000`.

What is loaded of a damaged file is what was written, or a sentence.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import training
from fisher_lab.training import checkpoints
from fisher_lab.training.commands import _finished, _save
from tests.fuzz import values
from tests.fuzz.judging import fault

Load = Callable[[Path], Any]
ABOUT = {"problem": {"name": "mine"}, "epochs": 3, "batch": 10, "seed": 0, "options": "{}"}


# -- what is written -------------------------------------------------------------------------------
def comparison_json(folder: Path) -> Path:
    return small().save(folder / "run.json")


def comparison_csv(folder: Path) -> Path:
    return small().save(folder / "run.csv")


@functools.cache
def small() -> fl.Comparison:
    return fl.compare(
        values.dense_net(),
        nn.CrossEntropyLoss(),
        (values.inputs(), values.classes()),
        [fl.KFAC(), fl.Diagonal()],
        errors=["trace", "frobenius", "damped_cosine"],
        dampings=[0.1],
    )


def trained(folder: Path) -> Path:
    torch.manual_seed(0)
    model = values.dense_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    training.fit(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        (values.inputs(20), values.classes(20)),
        4,
        batch=5,
        metrics=folder / "run.jsonl",
        checkpoint=folder / "run.pt",
        progress=False,
    )
    return folder / "run.pt"


def metrics(folder: Path) -> Path:
    return trained(folder).with_suffix(".jsonl")


def tuned(folder: Path) -> Path:
    trials = []
    for lr in (0.001, 0.01, 0.1):
        about = {"optimizer": "KFAC", "lr": lr, "damping": 1.0}
        trials.append({**about, "loss": math.sqrt(lr), "seconds": 0.25, "epochs": 3})
    _save(folder / "trials.json", ABOUT, trials)
    return folder / "trials.json"


# -- what is read ----------------------------------------------------------------------------------
def loaded(path: Path) -> Any:
    found = fl.load_comparison(path)
    contents = found._contents()
    return json.dumps(contents, default=vars, sort_keys=True)


def state(path: Path) -> str:
    return checkpoints.digest(checkpoints.read(path))


def trials_of(path: Path) -> str:
    return json.dumps(_finished(path, ABOUT), sort_keys=True)


def records_of(path: Path) -> str:
    return json.dumps(training.load_metrics(path), sort_keys=True)


KINDS: dict[str, tuple[Callable[[Path], Path], Load]] = {
    "json": (comparison_json, loaded),
    "csv": (comparison_csv, loaded),
    "checkpoint": (trained, state),
    "tune": (tuned, trials_of),
    "metrics": (metrics, records_of),
}


# -- damage ----------------------------------------------------------------------------------------
def damaged(content: bytes, random: Random) -> bytes:
    """The bytes with one thing wrong."""
    whole = bytearray(content)
    at = random.randrange(len(whole))
    length = random.choice([1, 2, 7, 64, 512])
    other = random.randrange(len(whole))
    kind = random.choice(
        ["bit", "bit", "bit", "byte", "cut", "line", "gone", "twice", "zero", "noise", "swap"]
    )
    if kind == "bit":
        whole[at] ^= 1 << random.randrange(8)
    elif kind == "byte":
        whole[at] = random.randrange(256)
    elif kind == "cut":
        del whole[at:]
    elif kind == "line":
        lines = content.splitlines(keepends=True)
        del lines[random.randrange(len(lines))]
        whole = bytearray(b"".join(lines))
    elif kind == "gone":
        del whole[at : at + length]
    elif kind == "twice":
        whole[at:at] = whole[at : at + length]
    elif kind == "zero":
        whole[at : at + length] = bytes(len(whole[at : at + length]))
    elif kind == "noise":
        whole[at:at] = random.randbytes(length)
    else:
        part = whole[at : at + length]
        whole[at : at + length] = whole[other : other + length]
        whole[other : other + length] = part
    return bytes(whole)


def faults(kind: str, count: int, folder: Path, seed: int = 0) -> list[str]:
    """What is wrong with what damaged files load as.

    Args:
        kind: one of KINDS.
        count: files.
        folder: where they are written.
        seed: of the damage.
    """
    write, read = KINDS[kind]
    random = Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(folder)
        content = path.read_bytes()
        expected = read(path)
        found = []
        for number in range(count):
            path.write_bytes(damaged(content, random))
            wrong = _fault(read, path, expected, kind)
            if wrong is not None:
                found.append(f"{kind} {number}: {wrong}")
    return found


def _fault(read: Load, path: Path, expected: Any, kind: str) -> str | None:
    try:
        got = read(path)
    except Exception as error:
        return fault(error)
    # whole lines are lost at the end as if the run had been stopped before
    is_start = kind == "metrics" and expected.startswith(got[:-1])
    if got != expected and not is_start:
        return "loads as something else"
    return None


def main() -> None:
    """Print what is wrong, and how many of each kind are."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found = faults(kind, count, Path(folder))
        print("\n".join(found[:20]))
        print(f"{kind}: {count} damaged files, {len(found)} load as something else or end raw")


if __name__ == "__main__":
    main()
