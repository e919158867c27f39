"""Calls with odd arguments, as many as are asked for: `python -m tests.fuzz.run 20000`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.judging import verdict
from tests.fuzz.targets import Target, all_targets
from tests.fuzz.values import World, near, odd

SLOW = ("compare", "budget", "fit", "train_command", "tune_command", "write_report", "load")


def calls(
    seed: int, count: int, folder: Path, most_odd: int = 2
) -> Iterator[tuple[str, str | None]]:
    """The calls with what is wrong with them; the same for the same seed.

    Args:
        seed: of all choices.
        count: how many.
        folder: where files may be written.
        most_odd: most arguments of a call that are odd.
    """
    targets = all_targets()
    random = Random(seed)
    for number in range(count):
        target = targets[number % len(targets)]
        # these measure and train: a quarter of their turns
        if target.name in SLOW and random.random() > 0.25:
            target = random.choice(targets)
        yield one_call(target, random.getrandbits(40), folder, most_odd)


def one_call(target: Target, seed: int, folder: Path, most_odd: int = 2) -> tuple[str, str | None]:
    """One call: its text, and what is wrong with it."""
    world = World(seed, folder)
    arguments: dict[str, Any] = {}
    for name, make in target.makers.items():
        if make is not None:
            arguments[name] = make(world)
    names = list(arguments)
    wrong: list[str] = []
    if names:
        wrong = world.random.sample(
            names, k=min(len(names), most_odd, world.choose([0, 1, 1, 1, 1, 2]))
        )
    for name in wrong:
        if world.random.random() < 0.4:
            arguments[name] = odd(world)
        else:
            arguments[name] = near(name, world)
    shown = ", ".join(f"{name}={short(arguments[name])}" for name in wrong)

    def call() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function = target.bind(world)
            first = [arguments.pop(name) for name in target.positional if name in arguments]
            return function(*first, **arguments)

    return f"{target.name}({shown}) seed {seed}", verdict(call)


def short(value: Any) -> str:
    """A value in a few characters."""
    try:
        return ascii(value)[:80].replace("\n", " ")
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__}>"


def main() -> None:
    """Print every fault, then how many there were of each kind."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for text, wrong in calls(seed, count, Path(folder)):
            if wrong is not None:
                faults[f"{text.split('(')[0]}: {wrong.split(':')[0]}"] += 1
                print(f"{text}\n    {wrong}")
    print(f"{count} calls, {sum(faults.values())} neither right nor a sentence")


if __name__ == "__main__":
    main()
