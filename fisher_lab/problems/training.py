"""The seeded start and the short training that all problems share.

The same settings give the same parameters bit for bit on one machine, however many threads it may
use; torch's global random state is neither read nor changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._passes.labels import FisherKind
from fisher_lab.likelihoods import Likelihood
from fisher_lab.problems.data import Dataset, local_generator, standard_torch
from fisher_lab.problems.registry import Problem


@standard_torch()
def trained_problem(
    build: Callable[[], nn.Module],
    likelihood: Likelihood,
    data: Dataset,
    *,
    seed: int,
    steps: int,
    examples: int,
    lr: float,
    batch: int,
    fisher: FisherKind = "true",
    **settings: Any,
) -> Problem:
    """Initialise a model, train it, and measure it on the first training examples.

    Args:
        build: makes the model; its random numbers come from `seed`.
        likelihood: its loss is trained on.
        data: training and test examples, x `[N, *input]`, y `[N, *label]`.
        seed: of the initial parameters and of the order of the examples.
        steps: number of Adam steps, 0 for the untrained model.
        examples: number N of measuring examples.
        lr: learning rate of Adam.
        batch: examples per step.
        fisher: the kind of Fisher matrix that is affordable.
        **settings: more to record, where it differs from what the problem function was called with.

    Returns:
        The problem; its settings are `final_training_loss`, over all training examples,
        `data_sha256` and `settings`; the decorator `problem` adds what the problem function was
        called with.

    Raises:
        ValueError: if a setting is out of range, or the training diverged.
        TypeError: if a setting is of the wrong type.
    """
    available = len(data.train[0])
    check_count("seed", seed, 0, 2**63 - 1, "choose another seed")
    check_count("steps", steps, 0, None, "use 0 for the untrained model")
    check_count("examples", examples, 1, available, "there are no more training examples")
    check_count("batch", batch, 1, available, "there are no more training examples")
    check_rate("lr", lr)
    with seeded(seed):
        model = build().to(torch.float32)
    with one_thread():
        loss = train(model, likelihood, data.train, steps=steps, lr=lr, batch=batch, seed=seed)
    x, y = data.train
    recorded = {**settings, "data_sha256": data.sha256, "final_training_loss": loss}
    return Problem(
        "", model, likelihood, (x[:examples], y[:examples]), recorded, fisher, data.train, data.test
    )


def train(
    model: nn.Module,
    likelihood: Likelihood,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> float:
    """Train a model in place with Adam and leave it in evaluation mode, without gradients.

    Args:
        model: the network.
        likelihood: its loss is minimised.
        data: x `[N, *input]` and y `[N, *label]`.
        steps: number of minibatches.
        lr: learning rate.
        batch: examples in a minibatch; every epoch is a new random order, its incomplete last
            minibatch left out.
        seed: of that order.

    Returns:
        The loss over all of `data` after training.

    Raises:
        ValueError: if that loss is not finite.
    """
    x, y = data
    generator = local_generator(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    with torch.enable_grad():
        for indices in _minibatches(len(x), batch, steps, generator):
            optimizer.zero_grad()
            z = model(x[indices])
            loss = likelihood.loss(z, y[indices])
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
    final = mean_loss(model, likelihood, data)
    if not math.isfinite(final):
        raise ValueError(
            f"the training loss is {final} after {steps} steps with lr={lr}, expected a number: "
            "use a smaller lr"
        )
    return final


def mean_loss(
    model: nn.Module, likelihood: Likelihood, data: tuple[Tensor, Tensor], chunk: int = 500
) -> float:
    """Mean loss over x `[N, *input]` and y `[N, *label]`, `chunk` examples at a time."""
    x, y = data
    total = 0.0
    with torch.no_grad():
        for x_part, y_part in zip(x.split(chunk), y.split(chunk), strict=True):
            loss = likelihood.loss(model(x_part), y_part)
            total += float(loss) * len(x_part)
    return total / len(x)


def mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers from one width to the next, with an activation between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have modules initialised from `seed`, and the global random state put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators' generators too.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums over several depend, in their last bits, on how many
    there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_count(name: str, value: int, low: int, high: int | None, cure: str) -> None:
    """Refuse a setting that is not a whole number from `low` to `high`."""
    expected = f"a whole number, {low} or more"
    if high is not None:
        expected = f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"got {name}={value!r} of type {type(value).__name__}, expected {expected}: {cure}"
        )
    if value < low or (high is not None and value > high):
        raise ValueError(f"got {name}={value}, expected {expected}: {cure}")


def check_rate(name: str, value: float) -> None:
    """Refuse a setting that is not a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"got {name}={value!r} of type {type(value).__name__}, expected a positive number: "
            "try 0.001"
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"got {name}={value}, expected a positive finite number: try 0.001")


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Refuse layer widths that are not whole numbers from 1 on."""
    if not isinstance(widths, tuple | list) or not widths:
        raise TypeError(
            f"got {name}={widths!r}, expected a tuple of at least one width: write one such as "
            "(20, 20)"
        )
    for width in widths:
        check_count(f"{name} with the entry", width, 1, None, "a layer needs at least one unit")


def _minibatches(N: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors `[batch]`, `steps` of them."""
    per_epoch = N // batch
    order = torch.empty(0)
    for step in range(steps):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(N, generator=generator)
        start = place * batch
        yield order[start : start + batch]
