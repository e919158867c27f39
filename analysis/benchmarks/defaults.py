"""Every optimizer as it comes, on five small problems: no search, one set of defaults for all.

    python -m analysis.benchmarks.defaults              three seeds of everything
    python -m analysis.benchmarks.defaults --seeds 7    one seed

Resumable: a row per run stands in docs/benchmarks/results/defaults.json, and what is there is not
repeated. One thread. The methods of `fl.optim` get no setting at all; the peers (torch's,
pytorch_optimizer's where it is installed) are run at two rates each, and the better one of the two
is shown, so that the comparison leans towards them.
"""

import argparse
import importlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab.likelihoods import Likelihood, as_likelihood
from fisher_lab.problems import char_transformer, data, mnist1d_conv1d
from fisher_lab.problems.training import mlp
from fisher_lab.training import train_step

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "defaults.md"
RESULTS = PAGE.parent / "results" / "defaults.json"
SEEDS = (21, 22, 23)  # other ones than those on which the defaults were chosen
MEASURED = 2000  # most training examples of which the final loss is the mean


# -- problems --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """A network to train.

    Attributes:
        network: makes it, from the global random state.
        likelihood: the loss.
        examples: training inputs and labels.
        batch: examples per step.
        steps: of training.
    """

    network: Callable[[], nn.Module]
    likelihood: Likelihood
    examples: tuple[Tensor, Tensor]
    batch: int
    steps: int


def digits() -> Task:
    """An MLP 64-32-32-10 on 8x8 digits."""
    train = data.digits().train
    return Task(lambda: mlp((64, 32, 32, 10), nn.Tanh), fl.Categorical(), train, 100, 300)


def cnn() -> Task:
    """A convolutional network with BatchNorm on MNIST digits of 14x14 pixels."""
    train = data.mnist(side=14).train
    return Task(_batch_normed, fl.Categorical(), train, 100, 120)


def _batch_normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )


def conv1d() -> Task:
    """Three Conv1d and a Linear on signals in the manner of MNIST-1D."""
    train = mnist1d_conv1d.signals().train
    return Task(lambda: mnist1d_conv1d.network((8, 12, 12)), fl.Categorical(), train, 100, 300)


def regression() -> Task:
    """An MLP 8-32-32-2 that learns a smooth function with a little noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=draw)
    inner = torch.randn(8, 6, generator=draw) / 8**0.5
    outer = torch.randn(6, 2, generator=draw) / 6**0.5
    y = torch.sin(2 * x @ inner) @ outer
    y = y + 0.05 * torch.randn(y.shape, generator=draw)
    likelihood = as_likelihood(nn.MSELoss())
    return Task(lambda: mlp((8, 32, 32, 2), nn.Tanh), likelihood, (x, y), 100, 400)


def chars() -> Task:
    """A causal transformer of one block on the characters of English text."""
    train = char_transformer.text_examples(24).train
    # torch's loss is a mean over examples and positions, as it is usual for text
    likelihood = as_likelihood(nn.CrossEntropyLoss())
    return Task(_ClassesSecond, likelihood, train, 50, 300)


class _ClassesSecond(nn.Module):
    """The transformer, its logits `[N, classes, positions]`, as torch's loss wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = char_transformer.Transformer(width=32, heads=2, blocks=1, context=24)

    def forward(self, characters: Tensor) -> Tensor:
        return self.inner(characters).transpose(1, 2)


TASKS = {task.__name__: task for task in (digits, cnn, conv1d, regression, chars)}


# -- optimizers ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Contender:
    """An optimizer and what it is told.

    Attributes:
        name: of the method, as the page shows it.
        options: its arguments, none for the defaults.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options, by which a run is known."""
        words = [self.name]
        for key, value in self.options.items():
            words.append(f"{key}={value}")
        return " ".join(words)

    def make(self, model: nn.Module, likelihood: Likelihood) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            ImportError: for a peer that is not installed.
        """
        if self.name in fl.optim.registry():
            method: Any = fl.optim.registry()[self.name]
            return method(model, likelihood, **self.options)
        return PEERS[self.name](model, **self.options)


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr)


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    peers = importlib.import_module("pytorch_optimizer")
    return peers.SOAP(model.parameters(), lr=lr, weight_decay=0.0)


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    peers = importlib.import_module("pytorch_optimizer")
    # matrices inside the network go to Muon, all else to its AdamW, as its documentation advises
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = []
    rest = []
    for p in model.parameters():
        fits = p.ndim >= 2 and id(p) not in embedded
        (matrices if fits else rest).append(p)
    groups = [{"params": matrices, "use_muon": True, "lr": lr, "weight_decay": 0.0}]
    if rest:
        groups.append({"params": rest, "use_muon": False, "lr": 3e-3, "weight_decay": 0.0})
    return peers.Muon(groups)


PEERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD momentum": _sgd,
    "Adam": _adam,
    "SOAP": _soap,
    "Muon": _muon,
}
RATES = {
    "SGD momentum": (0.1, 0.3),
    "Adam": (0.003, 0.01),
    "SOAP": (0.003, 0.01),
    "Muon": (0.003, 0.02),
}


def contenders() -> list[Contender]:
    """The peers at their rates, then all methods of `fl.optim` as they come."""
    found = []
    for name, rates in RATES.items():
        for rate in rates:
            found.append(Contender(name, {"lr": rate}))
    for name in fl.optim.registry():
        found.append(Contender(name))
    return found


# -- a run -----------------------------------------------------------------------------------------
def run(task: Task, contender: Contender, seed: int) -> dict[str, Any]:
    """Train once.

    Returns:
        The loss over training examples after training, NaN where it diverged; the mean loss of the
        steps of every tenth of the training; CPU seconds of the steps.
    """
    torch.manual_seed(seed)
    model = task.network().train()
    optimizer = contender.make(model, task.likelihood)
    draw = torch.Generator().manual_seed(seed)
    x, y = task.examples
    losses = []
    started = time.process_time()
    for _ in range(task.steps):
        index = torch.randint(len(x), (task.batch,), generator=draw)
        losses.append(train_step(model, optimizer, task.likelihood, x[index], y[index]))
    seconds = time.process_time() - started
    model.eval()
    with torch.no_grad():
        z = model(x[:MEASURED])
        loss = float(task.likelihood.loss(z, y[:MEASURED]))
    tenths = torch.stack(losses).unflatten(0, (10, -1)).mean(1)
    return {"loss": loss, "along": tenths.tolist(), "seconds": seconds}


def run_all(chosen: list[Contender], tasks: list[str], seeds: list[int], path: Path) -> None:
    """All runs that are not in the file yet, seed by seed, so that a stop leaves whole tables."""
    rows = load(path)
    for seed in seeds:
        for task_name in tasks:
            task = TASKS[task_name]()
            for contender in chosen:
                key = f"{task_name} | {contender.label} | {seed}"
                if key in rows:
                    continue
                found = _tried(task, contender, seed)
                about = {"task": task_name, "method": contender.name, "label": contender.label}
                rows[key] = {**about, "seed": seed, **found}
                save(path, rows)
                print(f"{key:44s} {found['loss']:9.4f} {found['seconds']:6.1f} s", flush=True)


def _tried(task: Task, contender: Contender, seed: int) -> dict[str, Any]:
    """A run, or why there is none."""
    nothing = {"loss": math.nan, "along": [], "seconds": math.nan}
    with warnings.catch_warnings():
        # what is skipped shows in the loss
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return run(task, contender, seed)
        except (ValueError, ImportError) as error:
            return {**nothing, "why": str(error)}


# -- files and tables ------------------------------------------------------------------------------
def load(path: Path) -> dict[str, Any]:
    """The finished runs."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found["rows"]


def save(path: Path, rows: dict[str, Any]) -> None:
    """Keep what is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "fisher-lab": fl.__version__}
    path.write_text(json.dumps({"settings": about, "rows": rows}, indent=1) + "\n")


class Cell(NamedTuple):
    """A method on a task.

    Attributes:
        label: of the setting, for peers the better of their rates.
        losses: final ones of all seeds.
        seconds: CPU seconds of each.
    """

    label: str
    losses: list[float]
    seconds: list[float]

    @property
    def mean(self) -> float:
        """Of the losses; infinite where one is not finite."""
        total = mean(self.losses)
        return total if math.isfinite(total) else math.inf

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "-"
        return f"{self.mean:.3g} ({min(self.losses):.3g} to {max(self.losses):.3g})"


def cells(rows: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """For every task, every method's cell, the best by mean where it has several settings."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows.values():
        grouped.setdefault((row["task"], row["method"], row["label"]), []).append(row)
    found: dict[str, dict[str, Cell]] = {}
    for (task, method, label), group in grouped.items():
        losses = [row["loss"] for row in group]
        seconds = [row["seconds"] for row in group]
        cell = Cell(label, losses, seconds)
        known = found.setdefault(task, {}).get(method)
        if known is None or cell.mean < known.mean:
            found[task][method] = cell
    return found


def ranks(found: dict[str, dict[str, Cell]]) -> dict[str, float]:
    """Mean place over the tasks, 1 for the lowest loss, of every method that ran on all of them."""
    everywhere = set.intersection(*(set(of_task) for of_task in found.values()))
    places: dict[str, list[int]] = {method: [] for method in everywhere}
    for of_task in found.values():
        order = sorted(everywhere, key=lambda method: of_task[method].mean)
        for place, method in enumerate(order, start=1):
            places[method].append(place)
    return {method: mean(of_method) for method, of_method in places.items()}


def page(rows: dict[str, Any]) -> str:
    """The page as Markdown; methods that have not run on all tasks yet are left out."""
    found = cells(rows)
    tasks = [name for name in TASKS if name in found]
    place = ranks(found)
    lines = ["| optimizer | " + " | ".join(tasks) + " | mean rank | CPU s |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for method in sorted(place, key=lambda name: place[name]):
        row = [method]
        total = 0.0
        for task in tasks:
            cell = found[task][method]
            row.append(str(cell))
            seconds = mean(cell.seconds)
            if math.isfinite(seconds):
                total += seconds
        lines.append("| " + " | ".join(row) + f" | {place[method]:.1f} | {total:.1f} |")
    seeds = {row["seed"] for row in rows.values()}
    about = ABOUT.format(seeds=len(seeds))
    settings = [f"- {name}: {TASKS[name].__doc__}" for name in tasks]
    return "\n".join(["# Optimizers as they come", "", about, "", *settings, "", *lines, ""])


ABOUT = """Training loss after a few hundred steps, mean over {seeds} seeds with the range,
written by `python -m analysis.benchmarks.defaults`. The methods of `fl.optim` have their defaults
and nothing else, the same on all problems; SGD with momentum, Adam, SOAP and Muon the better of
two rates on each problem. A dash: diverged, or the method does not treat these layers. Mean rank:
place among the methods shown, averaged over the problems. CPU s: processor seconds of all five
trainings on one thread; the networks are so small that overhead is most of it."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run_all(contenders(), chosen.tasks, chosen.seeds, RESULTS)
    PAGE.write_text(page(load(RESULTS)))


if __name__ == "__main__":
    main()
