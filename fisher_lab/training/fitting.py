"""The training loop: progress, metrics as JSON lines, atomic checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import is_whole, seed_of
from fisher_lab._ground.files import append, replacing, write_atomically
from fisher_lab._ground.progress import Progress
from fisher_lab.likelihoods import Likelihood, as_likelihood
from fisher_lab.problems.training import mean_loss

Record = dict[str, Any]
Callback = Callable[[torch.optim.Optimizer, int], Record]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    likelihood: Likelihood | nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    *,
    batch: int = 100,
    seed: int = 0,
    test_data: tuple[Tensor, Tensor] | None = None,
    schedule: Any = None,
    metrics: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
) -> list[Record]:
    """Train a model in place.

    Args:
        model: the model; it is trained in training mode and put back into its own.
        optimizer: any torch optimizer; those of `fisher_lab.optim` observe what they need.
        likelihood: the loss.
        data: (x, y), shuffled every epoch by `seed` (an incomplete last batch is left out); or
            batches such as a DataLoader, which must give the same batches again for an exact
            resume.
        epochs: passes over the data.
        batch: examples in a step, for (x, y).
        seed: of the order of the examples.
        test_data: x and y on which the loss is measured after every epoch.
        schedule: a torch learning rate scheduler, stepped after every epoch.
        metrics: file of JSON lines, one per epoch.
        checkpoint: file that is replaced every `checkpoint_every` steps and at the end.
        checkpoint_every: steps; None for every epoch.
        resume: go on from `checkpoint` if it exists; the run is then the same, bit by bit, as
            without the stop.
        callbacks: called after every epoch with the optimizer and the epoch; what they return joins
            the record.
        progress: show a bar with loss, speed and time left; None: when stderr is a terminal.

    Returns:
        One record per epoch: `epoch, step, loss` (mean over the epoch's steps)`, seconds` (of steps
        only)`, lr`, and `test_loss` where it is measured. An epoch that ends with a loss that is
        not finite is the last; its record says `diverged`.
    """
    run = _Run(model, optimizer, as_likelihood(likelihood), data, batch, seed, schedule)
    run.metrics = None if metrics is None else Path(metrics)
    run.checkpoint = None if checkpoint is None else Path(checkpoint)
    if resume and run.checkpoint is None:
        raise ValueError(
            "Got resume=True without a checkpoint, expected the file to go on from; pass "
            "checkpoint=..."
        )
    if not is_whole(epochs, 1):
        raise ValueError(f"Got epochs={epochs!r}, expected a whole number, 1 or more.")
    if resume and run.checkpoint is not None and run.checkpoint.exists():
        run.load()
    elif run.metrics is not None:
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        run.metrics.unlink(missing_ok=True)
    was_training = model.training
    model.train()
    try:
        with Progress(progress, epochs * run.steps_per_epoch()) as bar:
            bar.advance(run.step)
            while run.epoch < epochs and not run.diverged:
                run.one_epoch(bar, epochs, checkpoint_every)
                run.close_epoch(test_data, callbacks)
    finally:
        model.train(was_training)
    return run.records


class _Run:
    """The state of a training: where it is and what it has recorded."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        likelihood: Likelihood,
        data: Any,
        batch: int,
        seed: int,
        schedule: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Got {optimizer!r} as optimizer, expected one such as fl.optim.KFAC(model, loss, "
                "lr)."
            )
        self.model, self.optimizer, self.likelihood, self.schedule = (
            model,
            optimizer,
            likelihood,
            schedule,
        )
        self.data, self.batch, self.seed = data, batch, seed_of(seed)
        self.metrics: Path | None = None
        self.checkpoint: Path | None = None
        self.records: list[Record] = []
        self.epoch = self.step = self.position = 0  # position: steps done in this epoch
        self.seconds = 0.0
        # of the epoch: sum of finite losses, their number, last loss; not read
        self.sums: Tensor | None = None
        self.diverged = False
        self.loss: float | None = None
        self.paired = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
        if self.paired and not (is_whole(batch, 1) and batch <= len(data[0])):
            raise ValueError(
                f"Got batch={batch!r}, expected 1 to {len(data[0])}, the number of examples."
            )

    def steps_per_epoch(self) -> int:
        """Steps of an epoch, 1 if unknown."""
        if self.paired:
            return len(self.data[0]) // self.batch
        return len(self.data) if hasattr(self.data, "__len__") else 1

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of this epoch, on the model's device."""
        device = next(self.model.parameters()).device
        if not self.paired:
            for index, (x, y) in enumerate(self.data):
                if index >= self.position:
                    yield x.to(device), y.to(device)
            return
        x, y = self.data
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(x), generator=generator)
        for index in range(self.position, self.steps_per_epoch()):
            chosen = order[index * self.batch : (index + 1) * self.batch].to(x.device)
            yield x[chosen].to(device), y[chosen].to(device)

    def one_epoch(self, bar: Progress, epochs: int, checkpoint_every: int | None) -> None:
        """All remaining steps of this epoch."""
        shown = started = time.perf_counter()
        first = self.step
        for x, y in self.batches():
            loss = train_step(self.model, self.optimizer, self.likelihood, x, y)
            self.sums = _add(self.sums, loss)
            self.step, self.position = self.step + 1, self.position + 1
            bar.advance()
            if bar.enabled and time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                speed = (self.step - first) / (shown - started)
                bar.say(
                    f"epoch {self.epoch + 1}/{epochs}  loss {float(loss):.4g}  {speed:.3g} steps/s"
                )
            if checkpoint_every and self.step % checkpoint_every == 0:
                self.seconds, started = (
                    self.seconds + time.perf_counter() - started,
                    time.perf_counter(),
                )
                self.save()
        # waits: all time is counted
        total, count, last = [math.nan] * 3 if self.sums is None else self.sums.tolist()
        self.diverged = not math.isfinite(last)
        self.loss = total / count if count else None
        self.seconds += time.perf_counter() - started

    def close_epoch(
        self, test_data: tuple[Tensor, Tensor] | None, callbacks: Sequence[Callback]
    ) -> None:
        """Measure, record and save."""
        self.epoch += 1
        record: Record = {
            "epoch": self.epoch, "step": self.step, "loss": self.loss, "seconds": self.seconds,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }  # fmt: skip
        if self.diverged:
            record["diverged"] = True
        elif test_data is not None:
            self.model.eval()
            record["test_loss"] = mean_loss(self.model, self.likelihood, test_data)
            self.model.train()
        if self.schedule is not None:
            self.schedule.step()
        for callback in () if self.diverged else callbacks:
            record |= callback(self.optimizer, self.epoch)
        self.sums, self.position = None, 0
        self.records.append(record)
        if self.metrics is not None:
            append(self.metrics, json.dumps(record) + "\n")
        self.save()

    # -- checkpoints -------------------------------------------------------------------------------
    def save(self) -> None:
        """Replace the checkpoint in one go: a kill leaves the old or the new one."""
        if self.checkpoint is None:
            return
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": torch.get_rng_state(), "records": json.dumps(self.records), "seed": self.seed,
            "epoch": self.epoch, "step": self.step, "position": self.position, "seconds": self.seconds,
            "sums": self.sums, "diverged": self.diverged,
        }  # fmt: skip
        with replacing(self.checkpoint) as file:
            torch.save(state, file)

    def load(self) -> None:
        """Go on from the checkpoint; metrics written after it are dropped, for they come again."""
        assert self.checkpoint is not None
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(
                f"{self.checkpoint} was made with seed={state['seed']}, expected {self.seed}; use "
                "the same seed, or another file."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.records = json.loads(state["records"])
        self.epoch, self.step, self.position = state["epoch"], state["step"], state["position"]
        self.seconds, self.diverged = state["seconds"], state["diverged"]
        sums = state["sums"]
        self.sums = None if sums is None else sums.to(next(self.model.parameters()).device)
        if self.metrics is not None:
            lines = [json.dumps(record) + "\n" for record in self.records]
            write_atomically(self.metrics, "".join(lines))


def _add(sums: Tensor | None, loss: Tensor) -> Tensor:
    finite = torch.isfinite(loss)
    one = torch.stack([torch.where(finite, loss, 0.0), finite.to(loss.dtype)])
    return torch.cat([one if sums is None else sums[:2] + one, loss[None]])


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, likelihood: Likelihood, x: Tensor, y: Tensor
) -> Tensor:
    """One step of any optimizer; returns the loss, detached and not read.

    An optimizer with `fisher="empirical"` gets the labels for its statistics.

    Args:
        model: the model.
        optimizer: with or without `observing()`; one that `needs_closure` gets one.
        likelihood: the loss.
        x: inputs `[N, ...]`.
        y: labels `[N, ...]`.
    """

    def closure() -> Tensor:
        with observing(*labels):
            z = model(x)
        loss = likelihood.loss(z, y)
        optimizer.zero_grad()
        loss.backward()
        return loss

    observing: Callable[..., Any] = getattr(optimizer, "observing", nullcontext)
    labels = (y,) if getattr(optimizer, "fisher", None) == "empirical" else ()
    if getattr(optimizer, "needs_closure", False):
        found: Any = optimizer.step(closure)  # type: ignore[arg-type]
        return found.detach()
    with torch.enable_grad():
        loss = closure()
    optimizer.step()
    return loss.detach()


def record_errors(data: Any, every: int = 1, **options: Any) -> Callback:
    """A callback that measures, along a training, the errors of the matrices the optimizer is
    really using.

    Args:
        data: examples to measure on, as in `fl.compare`.
        every: epochs between two measurements.
        **options: further arguments of `fl.compare`, for instance `errors=["frobenius"]`.
    """

    def callback(optimizer: torch.optim.Optimizer, epoch: int) -> Record:
        measure = getattr(optimizer, "compare", None)
        if measure is None or epoch % every:
            return {}
        rows = measure(data, **options).rows
        keep = ("layer", "approximation", "error", "value", "damping")
        return {"errors": [{key: getattr(row, key) for key in keep} for row in rows]}

    return callback
