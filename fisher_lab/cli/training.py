"""`fisher-lab train` and `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from fisher_lab._ground.ranks import is_several
from fisher_lab.cli.options import ProblemOptions, assignments, literal
from fisher_lab.results.grid import as_text
from fisher_lab.training import optimizer_names, train_command, tune_command

NAMES = ", ".join(optimizer_names())
OptimizerName = Annotated[
    str, tyro.conf.arg(help=f"{NAMES}, or one that the file of --problem defines.")
]


def train(
    optimizer: OptimizerName = "KFAC",
    problem: ProblemOptions = ProblemOptions(problem="mnist_autoencoder"),
    lr: float | None = None,
    damping: float | None = None,
    option: tuple[str, ...] = (),
    epochs: int = 10,
    batch: int = 100,
    output: Path | None = None,
    resume: bool = False,
    measure_every: int = 0,
    quiet: bool = False,
) -> None:
    """Train a problem from its start with a method of fisher_lab.optim, or with SGD or Adam.

    Args:
        optimizer: its name.
        problem: the problem.
        lr: learning rate; the optimizer's own if not given.
        damping: lambda on the scale of the Fisher; the optimizer's default if not given.
        option: further arguments of the optimizer, as name=value, for instance observe_every=1.
        epochs: passes over the training data.
        batch: examples in a step.
        output: file for the metrics, .jsonl; the checkpoint lies beside it as .pt.
        resume: go on from that checkpoint.
        measure_every: epochs between measurements of the matrices in use; 0 for none.
        quiet: no progress bar and no table.
    """
    records = train_command(
        problem.problem,
        optimizer,
        lr=lr,
        damping=damping,
        epochs=epochs,
        batch=batch,
        seed=problem.seed,
        output=output,
        resume=resume,
        measure_every=measure_every,
        settings=problem.settings(),
        options=_options(option),
        progress=_progress(quiet),
    )
    shown = records[-1:] if quiet else records
    for record in shown:
        loss = _loss(record)
        test = ""
        if record.get("test_loss") is not None:
            test = f"  test {as_text(record['test_loss'])}"
        print(f"epoch {record['epoch']:4d}  {loss}{test}  {record['seconds']:.1f} s")


def _options(texts: tuple[str, ...]) -> dict[str, Any]:
    """Further arguments of the optimizer, as Python values."""
    found = {}
    for key, value in assignments("--option", texts).items():
        found[key] = literal(value)
    return found


def _progress(quiet: bool) -> bool | None:
    """No bar, or one where stderr is a terminal."""
    if quiet:
        return False
    return None


def _loss(row: dict[str, Any]) -> str:
    """The loss of an epoch or a trial; a diverged one has none."""
    if row["loss"] is None:
        return "diverged"
    return f"loss {as_text(row['loss'])}"


def tune(
    optimizer: OptimizerName = "KFAC",
    problem: ProblemOptions = ProblemOptions(problem="mnist_autoencoder"),
    lrs: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0),
    dampings: tuple[float, ...] = (0.1, 1.0, 10.0),
    option: tuple[str, ...] = (),
    epochs: int = 10,
    batch: int = 100,
    output: Path | None = None,
    quiet: bool = False,
) -> None:
    """Train with every learning rate and damping of a grid, the same budget for every optimizer.

    With an output file, trials that it holds already are not run again.

    Args:
        optimizer: its name.
        problem: the problem.
        lrs: learning rates.
        dampings: dampings; an optimizer without damping gets as many more learning rates instead.
        option: further arguments of the optimizer, as name=value.
        epochs: of every trial.
        batch: examples in a step.
        output: file for the trials, .json.
        quiet: no progress bar.
    """
    if is_several():
        raise ValueError(
            "Got several processes for tune, expected one, as its trials are short; train with "
            "what it finds in several."
        )
    trials = tune_command(
        problem.problem,
        optimizer,
        lrs=lrs,
        dampings=dampings,
        epochs=epochs,
        batch=batch,
        seed=problem.seed,
        output=output,
        settings=problem.settings(),
        options=_options(option),
        progress=_progress(quiet),
    )
    for trial in trials:
        loss = _loss(trial)
        damping = ""
        if trial["damping"] is not None:
            damping = f"  damping {trial['damping']:g}"
        print(
            f"{trial['optimizer']}  lr {trial['lr']:g}{damping}  {loss}  {trial['seconds']:.1f} s"
        )
