"""Training and tuning named problems with optimizers by name: what the command line calls.

Arguments and places are checked first: a problem may take long to load, and a training longer.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_lab import optim, problems
from fisher_lab._ground.arguments import check_kind, is_whole, number, path_of, shown
from fisher_lab._ground.files import check_output, write_atomically
from fisher_lab._ground.text import did_you_mean
from fisher_lab.likelihoods import Likelihood
from fisher_lab.results.codec import decoded, digest, encoded
from fisher_lab.training import checkpoints
from fisher_lab.training.fitting import Record, at_most, fit, record_errors
from fisher_lab.training.places import alone

BASELINES = ("SGD", "Adam")  # torch's, SGD with momentum 0.9
TUNED_EPOCHS = 10


def optimizer_names() -> list[str]:
    """Everything that `make_optimizer` knows: the library's optimizers, those that a user defined,
    and torch's.
    """
    return [*optim.registry(), *BASELINES]


def make_optimizer(
    name: str,
    model: nn.Module,
    likelihood: Likelihood | nn.Module,
    lr: float | None = None,
    damping: float | None = None,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer by name.

    Args:
        name: one of `optimizer_names()`.
        model: what is trained.
        likelihood: the loss.
        lr: learning rate; None for the optimizer's own.
        damping: lambda of a method of `fisher_lab.optim`; None for its default. The baselines have
            none.
        seed: of the optimizer's own random numbers.
        **options: further arguments of the optimizer.

    Raises:
        ValueError: an unknown name, or a damping for an optimizer without one.
    """
    check_kind("name", name, str, f"one of {', '.join(optimizer_names())}")
    if lr is not None:
        options["lr"] = lr
    if name in BASELINES:
        if damping is not None:
            raise ValueError(
                f"Got damping={damping} for {name}, expected none: it has no damping; leave it out."
            )
        if name == "SGD":
            options = {"momentum": 0.9, **options}
            return torch.optim.SGD(model.parameters(), **options)
        return torch.optim.Adam(model.parameters(), **options)
    known = optim.registry()
    if name not in known:
        names = optimizer_names()
        guess = did_you_mean(name, names)
        raise ValueError(f"Got optimizer {name!r}{guess}, expected one of {', '.join(names)}.")
    if damping is not None:
        options["damping"] = damping
    if _takes_seed(known[name]):
        options["seed"] = seed
    build: Any = known[name]
    return build(model, likelihood, **options)


def _takes_seed(optimizer: type) -> bool:
    """Whether an optimizer has random numbers of its own (K-BFGS draws nothing)."""
    parameters = inspect.signature(optimizer).parameters
    if "seed" in parameters:
        return True
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # **options are handed on
            return True
    return False


def start(problem: str | problems.Problem, /, **settings: Any) -> problems.Problem:
    """A problem by name, untrained if it can be had untrained; a Problem as it is."""
    if isinstance(problem, problems.Problem):
        return problem
    known = problems.describe().get(problem)
    if known is not None and "steps" in known.settings:
        settings = {"steps": 0, **settings}
    return problems.load(problem, **settings)


def train_command(
    problem: str | problems.Problem,
    optimizer: str,
    *,
    lr: float | None = None,
    damping: float | None = None,
    epochs: int = 10,
    batch: int = 100,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    measure_every: int = 0,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> list[Record]:
    """Train a named problem; what `fisher-lab train` does.

    Args:
        problem: a name or a Problem.
        optimizer: one of `optimizer_names()`.
        lr: learning rate; None for the optimizer's own.
        damping: None for the optimizer's default.
        epochs: passes over the training data.
        batch: examples in a step (at most all of them).
        seed: of the order of the examples and of sampled labels.
        output: metrics file (.jsonl); the checkpoint lies beside it with the ending .pt.
        resume: go on from that checkpoint.
        measure_every: epochs between measurements of the matrices in use on the problem's measuring
            data; 0 for none.
        settings: of the problem.
        options: further arguments of the optimizer.
        progress: see `fit`.

    Returns:
        One record per epoch; see `fit`.
    """
    path = None if output is None else path_of("output", output)
    if path is not None and path.suffix != ".jsonl":
        raise ValueError(
            f"Got output {str(path)!r}, expected a file that ends in .jsonl: metrics are JSON "
            "lines."
        )
    _check_counts(epochs=epochs, batch=batch)
    _check_tables(settings=settings, options=options)
    if not is_whole(measure_every, 0):
        raise ValueError(
            f"Got measure_every={shown(measure_every)}, expected a whole number of epochs, 0 or "
            "more."
        )
    checkpoint = None
    if path is not None:
        check_output(path, (".jsonl",))
        checkpoint = path.with_suffix(".pt")
        # fit looks too, but the problem may take long to load
        checkpoints.existing(checkpoint, resume)
    loaded = start(problem, **(settings or {}))
    data = loaded.data if loaded.train_data is None else loaded.train_data
    given = _with_output(optimizer, loaded, options)
    opt = make_optimizer(optimizer, loaded.model, loaded.likelihood, lr, damping, seed, **given)
    callbacks = []
    if measure_every:
        measured = {"fisher": loaded.fisher, "labels": loaded.labels}
        callbacks.append(record_errors(loaded.data, measure_every, **measured))
    return fit(
        loaded.model,
        opt,
        loaded.likelihood,
        data,
        epochs,
        batch=at_most(batch, data),
        seed=seed,
        test_data=loaded.test_data,
        metrics=path,
        checkpoint=checkpoint,
        resume=resume,
        callbacks=callbacks,
        progress=progress,
        labels=loaded.labels,
        output=loaded.output,
    )


def _with_output(
    optimizer: str, problem: problems.Problem, options: dict[str, Any] | None
) -> dict[str, Any]:
    """The optimizer's further arguments, what of the model's output is z among them."""
    given = dict(options or {})
    if problem.output is not None and optimizer not in BASELINES:
        given.setdefault("output", problem.output)
    return given


def _check_counts(**counts: int) -> None:
    """Refuse counts that are not whole numbers from 1 on."""
    for name, value in counts.items():
        if not is_whole(value, 1):
            raise ValueError(f"Got {name}={value!r}, expected a whole number, 1 or more.")


def _check_tables(**tables: Any) -> None:
    """Refuse what are no arguments by name."""
    for name, table in tables.items():
        if table is not None:
            check_kind(name, table, dict, "a dict of arguments by name")
            for key in table:
                check_kind(name, key, str, "a dict of arguments by name")


def tune_command(
    problem: str | problems.Problem,
    optimizer: str,
    *,
    lrs: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    dampings: Sequence[float] = (0.1, 1.0, 10.0),
    epochs: int = TUNED_EPOCHS,
    batch: int = 100,
    seed: int = 0,
    output: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> list[Record]:
    """Train with every learning rate and damping of a grid; what `fisher-lab tune` does.

    Every optimizer gets the same number of trials: one without damping gets as many learning rates
    instead, spread evenly (in the logarithm) over the same range.

    Args:
        problem: a name or a Problem; every trial starts from its weights.
        optimizer: one of `optimizer_names()`.
        lrs: learning rates.
        dampings: dampings.
        epochs: of every trial.
        batch: examples in a step.
        seed: of every trial.
        output: JSON file; trials that it holds already are not run again.
        settings: of the problem.
        options: further arguments of the optimizer.
        progress: see `fit`.

    Returns:
        The trials `{optimizer, lr, damping, loss, seconds, ...}`, the best first; a diverged one
        has no loss.
    """
    _check_counts(epochs=epochs, batch=batch)
    _check_tables(settings=settings, options=options)
    _check_grid(lrs, dampings)
    path = None if output is None else path_of("output", output)
    with alone(path):
        loaded = start(problem, **(settings or {}))
        about = {
            "problem": loaded.settings,
            "epochs": epochs,
            "batch": batch,
            "seed": seed,
            "options": repr(options or {}),
        }
        trials = _finished(path, about)
        for lr, damping in grid(optimizer, lrs, dampings):
            key = {"optimizer": optimizer, "lr": lr, "damping": damping}
            if any(key.items() <= trial.items() for trial in trials):
                continue
            model = copy.deepcopy(loaded.model)
            given = _with_output(optimizer, loaded, options)
            opt = make_optimizer(optimizer, model, loaded.likelihood, lr, damping, seed, **given)
            data = loaded.data if loaded.train_data is None else loaded.train_data
            records = fit(
                model,
                opt,
                loaded.likelihood,
                data,
                epochs,
                batch=at_most(batch, data),
                seed=seed,
                progress=progress,
                labels=loaded.labels,
                output=loaded.output,
            )
            last = records[-1]
            spent = {"seconds": last["seconds"], "epochs": last["epoch"]}
            trials.append({**key, "loss": last["loss"], **spent})
            if path is not None:
                _save(path, about, trials)
    mine = [trial for trial in trials if trial["optimizer"] == optimizer]
    return sorted(mine, key=_rank)


def _rank(trial: Record) -> float:
    """The loss; a diverged trial, which has none, comes last."""
    if trial["loss"] is None:
        return math.inf
    return trial["loss"]


def _check_grid(lrs: Sequence[float], dampings: Sequence[float]) -> None:
    """Refuse an empty grid, and numbers that no step can be made with."""
    for name, values, least in (("lrs", lrs, "> 0"), ("dampings", dampings, ">= 0")):
        check_kind(name, values, (list, tuple), f"a list of numbers {least}")
        if not values:
            raise ValueError(f"Got no {name}, expected at least one number {least}.")
        for value in values:
            wrong = not math.isfinite(number(value)) or number(value) < 0
            if wrong or (name == "lrs" and value == 0):
                raise ValueError(
                    f"Got {value!r} in {name}, expected finite numbers {least}; leave it out."
                )


def grid(
    optimizer: str, lrs: Sequence[float], dampings: Sequence[float]
) -> list[tuple[float, float | None]]:
    """The trials of an optimizer, len(lrs) * len(dampings) of them."""
    if optimizer not in BASELINES:
        return [(lr, damping) for lr in lrs for damping in dampings]
    count = len(lrs) * len(dampings)
    if count == 1 or min(lrs) == max(lrs):
        return [(lrs[0], None)] * count
    low = math.log(min(lrs))
    high = math.log(max(lrs))
    trials: list[tuple[float, float | None]] = []
    for i in range(count):
        lr = math.exp(low + (high - low) * i / (count - 1))
        # four digits, as somebody would write it
        rounded = float(f"{lr:.4g}")
        trials.append((rounded, None))
    return trials


def _save(path: Path, about: Record, trials: list[Record]) -> None:
    """All trials so far, with a digest of them."""
    body = encoded({"about": about, "trials": trials})
    body["digest"] = digest(body)
    text = json.dumps(body, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n")


def _finished(path: Path | None, about: Record) -> list[Record]:
    """The trials that a file holds already.

    Raises:
        ValueError: for a file that `tune` did not write, or wrote for something else.
    """
    if path is None or not path.exists():
        return []
    from fisher_lab.results.schema import TRIALS, checked

    try:
        body = json.loads(path.read_bytes().decode("utf-8"))
        # files of earlier versions have none
        if "digest" in body and body["digest"] != digest(body):
            raise ValueError("its contents are not those that were written")
        saved = checked(TRIALS, decoded(body))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no trials ({error}), expected a file that tune wrote; choose another."
        ) from error
    if saved["about"] != decoded(json.loads(json.dumps(encoded(about)))):
        raise ValueError(
            f"{path} holds trials of another problem or budget, expected the same; choose another "
            "file."
        )
    return [dict(trial) for trial in saved["trials"]]
