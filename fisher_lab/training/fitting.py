"""The training loop: progress, metrics as JSON lines, atomic checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import check_kind, is_whole, path_of, seed_of
from fisher_lab._ground.progress import Progress
from fisher_lab._ground.ranks import Ranks, none_lost, ranks_of
from fisher_lab._passes.batches import (
    LABELS,
    Inputs,
    by_example,
    entries,
    examples_of,
    mapped,
    rebuilt,
    split,
)
from fisher_lab._passes.labels import needs_data_labels
from fisher_lab._passes.model import Forward, Output, arguments
from fisher_lab.likelihoods import Likelihood, as_likelihood
from fisher_lab.training import checkpoints
from fisher_lab.training.asked import Asked, asked_of, differences
from fisher_lab.training.metrics import Metrics, Record
from fisher_lab.training.places import alone

Callback = Callable[[torch.optim.Optimizer, int], Record]
TESTED_AT_ONCE = 500  # examples of the test data in one forward pass


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    likelihood: Likelihood | nn.Module,
    data: Any,
    epochs: int,
    *,
    batch: int = 100,
    seed: int = 0,
    test_data: Any = None,
    schedule: Any = None,
    metrics: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    labels: str = LABELS,
    output: Output | None = None,
) -> list[Record]:
    """Train a model in place.

    Within a group of torch.distributed every rank takes its part of each batch, and all train the
    model of rank 0 (in DistributedDataParallel, where it is not yet); rank 0 alone writes. Batches
    that are given, as by a DataLoader, are each rank's own.

    Args:
        model: the model; it is trained in training mode and put back into its own.
        optimizer: any torch optimizer; those of `fisher_lab.optim` observe what they need.
        likelihood: the loss.
        data: (inputs, y) or a mapping with y under `labels`, shuffled every epoch by `seed` (an
            incomplete last batch is left out); or batches of that form such as a DataLoader, which
            must give the same batches again for an exact resume. Inputs are a tensor, a tuple (the
            model is called as `model(*inputs)`) or a mapping (`model(**inputs)`).
        epochs: passes over the data.
        batch: examples in a step, for data that is one whole.
        seed: of the order of the examples.
        test_data: of the form of one batch; the loss on it is measured after every epoch.
        schedule: a torch learning rate scheduler, stepped after every epoch.
        metrics: file of JSON lines, one per epoch, which `load_metrics` reads; one that is there
            already is replaced unless the run goes on.
        checkpoint: file that is replaced every `checkpoint_every` steps and at the end; what is
            there and no checkpoint is refused.
        checkpoint_every: steps; None for every epoch.
        resume: go on from `checkpoint` if it exists; the run is then the same, bit by bit, as
            without the stop. Only `epochs` may differ from what the checkpoint was made with.
        callbacks: called after every epoch with the optimizer and the epoch; what they return joins
            the record.
        progress: False for none; else a bar with loss, speed and time left where stderr is a
            terminal, a line now and then elsewhere.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z: a name, an index or a function; None for a tensor,
            or `logits`. Optimizers that observe have an `output=` of their own.

    Returns:
        One record per epoch: `epoch, step, loss` (mean over the epoch's steps)`, seconds` (of steps
        only)`, lr`, and `test_loss` where it is measured. An epoch that ends with a loss that is
        not finite is the last; its record says `diverged` and has no loss.

    Raises:
        ValueError, TypeError: wrong arguments, places that cannot be written or that another run
            writes to, a checkpoint that is damaged or of something else; before any work.
        RuntimeError: on the ranks that wait for one that has ended or hangs, at the latest after
            the time-out of the group; the last checkpoint is whole.

    Example:
        >>> opt = fl.optim.KFAC(model, loss)
        >>> records = fl.training.fit(model, opt, loss, (x, y), epochs=2, progress=False)
        >>> len(records)
        2
    """
    ranks = ranks_of(patient=False)
    batches = _Batches(data, batch, seed_of(seed), labels, ranks)
    run = _Run(model, optimizer, as_likelihood(likelihood), batches, schedule, output)
    if metrics is not None:
        run.metrics = Metrics(path_of("metrics", metrics))
    run.checkpoint = None if checkpoint is None else path_of("checkpoint", checkpoint)
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_kind("resume", resume, bool, "True or False")
    if resume and run.checkpoint is None:
        raise ValueError(
            "Got resume=True without a checkpoint, expected the file to go on from; pass "
            "checkpoint=..."
        )
    if not is_whole(epochs, 1):
        raise ValueError(f"Got epochs={epochs!r}, expected a whole number, 1 or more.")
    if checkpoint_every is not None and not is_whole(checkpoint_every, 1):
        raise ValueError(
            f"Got checkpoint_every={checkpoint_every!r}, expected a whole number of steps, or None "
            "for every epoch."
        )
    test = None if test_data is None else split(test_data, labels)
    with ExitStack() as held:
        if not ranks.first:
            run.metrics = None  # one writes
        written = None if run.metrics is None else run.metrics.path
        places = (written, run.checkpoint) if ranks.first else ()
        ranks.agreed(lambda: held.enter_context(alone(*places)))
        run.begin(resume)
        was_training = model.training
        model.train()
        try:
            shown = progress if ranks.first else False
            with Progress(shown, epochs * batches.steps) as bar:
                bar.advance(run.step)
                with none_lost("start again with resume=True from the last checkpoint"):
                    while run.epoch < epochs and not run.diverged:
                        run.one_epoch(bar, epochs, checkpoint_every)
                        run.close_epoch(test, callbacks)
        finally:
            model.train(was_training)
    return run.records


class _Batches:
    """The batches of every epoch.

    Args:
        data: one whole, or batches.
        batch: examples in a step, for a whole.
        seed: of the order of a whole.
        labels: the key of y in a mapping.
        ranks: the processes that train together.

    Attributes:
        steps: of an epoch, 1 if unknown.
    """

    def __init__(self, data: Any, batch: int, seed: int, labels: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self.batch = batch
        self.seed = seed
        self.labels = labels
        self.whole: tuple[Inputs, Tensor] | None = None
        if is_whole_data(data):
            inputs, y = split(data, labels)
            self.whole = inputs, _labelled(y)
            N = examples_of(inputs)
            if len(self.whole[1]) != N:
                raise ValueError(
                    f"Got {N} inputs and {len(self.whole[1])} labels, expected one label per input."
                )
            if not (is_whole(batch, 1) and batch <= N):
                raise ValueError(f"Got batch={batch!r}, expected 1 to {N}, the number of examples.")
            if batch % ranks.count:
                raise ValueError(
                    f"Got batch={batch} on {ranks.count} ranks, expected a multiple of their "
                    "number: each takes as many examples."
                )
            self.steps = N // batch
            return
        if isinstance(data, Tensor | str) or not isinstance(data, Iterable):
            raise TypeError(
                f"Got data of type {type(data).__name__}, expected (inputs, y), a mapping with "
                f"{labels!r}, or an iterable of such batches; training needs labels."
            )
        self.data: Any = data
        self.steps = 1
        if isinstance(data, Sized):
            self.steps = len(data)

    def asked(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        if self.whole is None:
            return {"seed": self.seed}
        return {"seed": self.seed, "batch": self.batch, "examples": examples_of(self.whole[0])}

    def of_epoch(self, epoch: int, done: int) -> Iterator[tuple[Inputs, Tensor]]:
        """What is left of an epoch of which some steps are done."""
        if self.whole is None:
            for index, given in enumerate(self.data):
                if index >= done:
                    inputs, y = split(given, self.labels)
                    yield inputs, _labelled(y)
            return
        inputs, y = self.whole
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(y), generator=generator)
        for index in range(done, self.steps):
            start = index * self.batch
            own = self.batch // self.ranks.count
            start += self.ranks.own * own
            chosen = order[start : start + own]
            yield _chosen(inputs, chosen), y[chosen.to(y.device)]


def is_whole_data(data: Any) -> bool:
    """Whether data is one whole, (inputs, y) or a mapping, and not batches."""
    if isinstance(data, Mapping):
        return True
    # two batches are a tuple too, but the second one is no tensor
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
    return pair and isinstance(data[0], Tensor | Mapping | tuple)


def at_most(batch: int, data: Any) -> int:
    """A batch size, or all examples where the data is one whole of fewer."""
    if not is_whole_data(data):
        return batch
    inputs, _ = split(data)
    return min(batch, examples_of(inputs))


def _labelled(y: Tensor | None) -> Tensor:
    """Labels, which training needs."""
    if y is None:
        raise ValueError(
            "Got a batch without labels, expected (inputs, y) or a mapping with labels; name "
            "their key with labels=."
        )
    return y


def _chosen(inputs: Inputs, some: Tensor | slice) -> Inputs:
    """The inputs of some of the examples, by index."""
    new = []
    for entry, own in zip(entries(inputs), by_example(inputs), strict=True):
        if own:
            place = some.to(entry.device) if isinstance(some, Tensor) else some
            entry = entry[place]
        new.append(entry)
    return rebuilt(inputs, new)


class _Run:
    """The state of a training: where it is and what it has recorded."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        likelihood: Likelihood,
        batches: _Batches,
        schedule: Any,
        output: Output | None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Got {optimizer!r} as optimizer, expected one such as fl.optim.KFAC(model, loss, "
                "lr)."
            )
        self.ranks = batches.ranks
        if self.ranks.alone:
            self.model = self.trained = model
        else:
            _check_averaged(likelihood)
            parallel = nn.parallel.DistributedDataParallel
            self.trained = model if isinstance(model, parallel) else parallel(model)
            self.model = self.trained.module
        self.optimizer = optimizer
        self.likelihood = likelihood
        self.batches = batches
        self.schedule = schedule
        self.output = output
        # before the first step, as a schedule changes the learning rate
        self.asked: Asked = asked_of(optimizer, schedule, **batches.asked())
        self.metrics: Metrics | None = None
        self.checkpoint: Path | None = None
        self.records: list[Record] = []
        self.epoch = 0
        self.step = 0
        self.position = 0  # steps done in this epoch
        self.seconds = 0.0
        # of the epoch: sum of finite losses, their number, last loss; not read
        self.sums: Tensor | None = None
        self.diverged = False
        self.loss: float | None = None

    def begin(self, resume: bool) -> None:
        """Go on from the checkpoint, or make room for a new run."""
        found = None
        if self.checkpoint is not None:
            # also without going on: what is no checkpoint is not replaced
            path = self.checkpoint
            found = self.ranks.from_first(lambda: checkpoints.existing(path, resume))
        if resume and found is not None:
            self.load(found)
        elif self.metrics is not None:
            self.metrics.path.unlink(missing_ok=True)

    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def one_epoch(self, bar: Progress, epochs: int, checkpoint_every: int | None) -> None:
        """All remaining steps of this epoch."""
        started = time.perf_counter()
        shown = started
        first = self.step
        device = self.device()
        for inputs, y in self.batches.of_epoch(self.epoch, self.position):
            x = mapped(inputs, lambda entry: entry.to(device))
            loss = train_step(
                self.trained, self.optimizer, self.likelihood, x, y.to(device), self.output
            )
            loss = self.ranks.summed(loss) / self.ranks.count  # each rank's is a mean
            self.sums = _add(self.sums, loss)
            self.step += 1
            self.position += 1
            bar.advance()
            now = time.perf_counter()
            if now - shown > bar.every:  # the loss that is shown waits for the device
                speed = (self.step - first) / (now - shown)
                shown = now
                first = self.step
                bar.say(
                    f"epoch {self.epoch + 1}/{epochs}  loss {float(loss):.4g}  {speed:.3g} steps/s"
                )
            if checkpoint_every is not None and self.step % checkpoint_every == 0:
                self.seconds += time.perf_counter() - started
                self.save()
                started = time.perf_counter()
        self._read_loss()
        self.seconds += time.perf_counter() - started

    def _read_loss(self) -> None:
        """The loss of the epoch, which waits for the device, so that all time is counted."""
        if self.sums is None:  # an epoch without batches
            self.diverged = True
            self.loss = None
            return
        total, count, last = self.sums.tolist()
        self.diverged = not math.isfinite(last)
        self.loss = None
        # The mean of what was finite before would rank a run that diverged among the others.
        if not self.diverged:
            self.loss = total / count

    def close_epoch(
        self, test: tuple[Inputs, Tensor | None] | None, callbacks: Sequence[Callback]
    ) -> None:
        """Measure, record and save."""
        self.epoch += 1
        record: Record = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        if self.diverged:
            record["diverged"] = True
        elif test is not None:
            record["test_loss"] = self.ranks.from_first(lambda: self._test_loss(test))
        if self.schedule is not None:
            self.schedule.step()
        if not self.diverged:
            for callback in callbacks:
                record |= callback(self.optimizer, self.epoch)
        self.sums = None
        self.position = 0
        self.records.append(record)
        if self.metrics is not None:
            self.metrics.add(record)
        self.save()

    def _test_loss(self, test: tuple[Inputs, Tensor | None]) -> float:
        """Mean loss over the test data, some examples at a time."""
        inputs, labels = test
        y = _labelled(labels)
        device = self.device()
        total = 0.0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(y), TESTED_AT_ONCE):
                some = slice(start, start + TESTED_AT_ONCE)
                x = mapped(_chosen(inputs, some), lambda entry: entry.to(device))
                own = y[some].to(device)
                loss = self.likelihood.loss(outputs(self.model, x, self.output), own)
                total += float(loss) * len(own)
        self.model.train()
        return total / len(y)

    # -- checkpoints -------------------------------------------------------------------------------
    def save(self) -> None:
        """Replace the checkpoint."""
        if self.checkpoint is None:
            return
        random = self.ranks.gathered(torch.get_rng_state)
        if not self.ranks.first:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": random[0],
            "random_of_ranks": random,
            "records": json.dumps(self.records),
            checkpoints.ASKED: self.asked,
            "seed": self.batches.seed,
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "sums": self.sums,
            "diverged": self.diverged,
        }
        checkpoints.write(self.checkpoint, state)

    def load(self, state: checkpoints.State) -> None:
        """Go on from a checkpoint; metrics written after it are dropped, for they come again.

        Raises:
            ValueError: if it is of another model, or of another training.
        """
        assert self.checkpoint is not None
        # checkpoints written before this was kept know their seed alone
        before = state.get("asked", {**self.asked, "seed": repr(state["seed"])})
        other = differences(before, self.asked)
        if other:
            raise ValueError(
                f"{self.checkpoint} was made with {' and '.join(other)}; give the same again, or "
                "choose another file."
            )
        checkpoints.check_fits(self.checkpoint, self.model, state)
        try:
            # before the model, which nothing can refuse any more
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.checkpoint} is of another optimizer ({error}), expected the one it was "
                "made with; choose another file."
            ) from error
        self.model.load_state_dict(state["model"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        random = state.get("random_of_ranks", [state["random"]])
        torch.set_rng_state(random[self.ranks.own % len(random)])
        self.records = json.loads(state["records"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.position = state["position"]
        self.seconds = state["seconds"]
        self.diverged = state["diverged"]
        sums = state["sums"]
        self.sums = None if sums is None else sums.to(self.device())
        if self.metrics is not None:
            self.metrics.write(self.records)


def _check_averaged(likelihood: Likelihood) -> None:
    """Refuse a loss whose gradient over all ranks is not the mean of theirs."""
    if likelihood.summed:
        raise ValueError(
            "Several processes got a loss with reduction='sum', expected 'mean': their gradients "
            "are averaged; average the loss."
        )


def _add(sums: Tensor | None, loss: Tensor) -> Tensor:
    """Sum of the finite losses, their number, and the last loss `[3]`."""
    finite = torch.isfinite(loss)
    counted = torch.where(finite, loss, 0.0)
    one = torch.stack([counted, finite.to(loss.dtype)])
    if sums is not None:
        one = sums[:2] + one
    return torch.cat([one, loss[None]])


def outputs(model: nn.Module, inputs: Inputs, output: Output | None = None) -> Tensor:
    """The model's output z `[N, *output]` for inputs of any form."""
    args, kwargs = arguments(inputs)
    found = model(*args, **kwargs)
    return Forward(model, output).picked(found)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    likelihood: Likelihood | nn.Module,
    x: Inputs,
    y: Tensor,
    output: Output | None = None,
) -> Tensor:
    """One step of any optimizer; returns the loss, detached and not read.

    An optimizer with `fisher="empirical"` gets the labels for its statistics; one that samples
    them, which labels the loss keeps.

    Args:
        model: the model.
        optimizer: with or without `observing()`; one that `needs_closure` gets one.
        likelihood: the loss.
        x: inputs `[N, ...]`, a tuple or a mapping of them.
        y: labels `[N, ...]`.
        output: what of the model's output is z; see `fit`.

    Raises:
        TypeError: for a model, an optimizer, inputs, labels or a likelihood that are none.

    Example:
        >>> opt = fl.optim.KFAC(model, loss)
        >>> fl.training.train_step(model, opt, fl.Categorical(), x, y).shape
        torch.Size([])
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_kind("optimizer", optimizer, torch.optim.Optimizer, "one such as fl.optim.KFAC")
    check_kind("x", x, (Tensor, tuple, list, Mapping), "a tensor, a tuple or a mapping of them")
    check_kind("y", y, Tensor, "a tensor of labels")
    likelihood = as_likelihood(likelihood)
    observing: Callable[..., Any] = getattr(optimizer, "observing", nullcontext)
    labels = _told(optimizer, likelihood, y)

    def closure() -> Tensor:
        with observing(**labels):
            z = outputs(model, x, output)
        loss = likelihood.loss(z, y)
        optimizer.zero_grad()
        loss.backward()
        return loss

    if getattr(optimizer, "needs_closure", False):
        found: Any = optimizer.step(closure)  # type: ignore[arg-type]
        return found.detach()
    with torch.enable_grad():
        loss = closure()
    optimizer.step()
    return loss.detach()


def _told(optimizer: torch.optim.Optimizer, likelihood: Likelihood, y: Tensor) -> dict[str, Tensor]:
    """What an optimizer's `observing` is told of the labels: all of them for empirical statistics,
    and where the loss ignores some, which it keeps.
    """
    fisher = getattr(optimizer, "fisher", None)
    if needs_data_labels(fisher):
        return {"y": y}
    # one that does not observe has no kind of Fisher
    kept = None if fisher is None else likelihood.kept(y)
    if kept is None:
        return {}
    return {"kept": kept}


def record_errors(data: Any, every: int = 1, **options: Any) -> Callback:
    """A callback that measures the errors of the matrices an optimizer is really using.

    Args:
        data: examples to measure on, as in `fl.compare`.
        every: epochs between two measurements.
        **options: further arguments of `fl.compare`, for instance `errors=["frobenius"]`.

    Example:
        >>> opt = fl.optim.KFAC(model, loss)
        >>> errors = fl.training.record_errors((x, y), errors=["frobenius"])
        >>> wanted = {"callbacks": [errors], "progress": False}
        >>> records = fl.training.fit(model, opt, loss, (x, y), epochs=1, **wanted)
        >>> records[0]["errors"][0]["approximation"]
        'KFAC'
    """
    keep = ("layer", "approximation", "error", "value", "damping")

    def callback(optimizer: torch.optim.Optimizer, epoch: int) -> Record:
        measure = getattr(optimizer, "compare", None)
        if measure is None or epoch % every:
            return {}
        found = []
        for row in measure(data, **options).rows:
            found.append({key: getattr(row, key) for key in keep})
        return {"errors": found}

    return callback
