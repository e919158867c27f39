"""Optimizers on the MNIST autoencoder 784-1000-500-250-30-250-500-1000-784, batch 1000.

    python -m analysis.benchmarks.optimizers steps       time per step, beside SGD's and a floor
    python -m analysis.benchmarks.optimizers training    losses after tuning on grids

Both are resumable: finished runs are kept in docs/benchmarks/results/ and not repeated. Peers
(pytorch_optimizer, heavyball) are timed where they are installed.
"""

import argparse
import importlib
import json
import math
import platform
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fisher_lab as fl
from analysis.benchmarks.floors import KEPT, Pieces, unavoidable
from analysis.benchmarks.pages import training_figure
from fisher_lab import problems
from fisher_lab.training import train_step

RESULTS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks" / "results"
BATCH, OBSERVE, REFRESH = 1000, 10, 100
LOSS = fl.Bernoulli()  # binary cross-entropy summed over pixels, averaged over the batch
METHODS = ("TNT", "KFAC", "MBF", "EKFAC", "TKFAC", "TEKFAC", "TENGraD", "Shampoo", "KBFGS")

TIMED = {"observe_every": OBSERVE, "refresh_every": REFRESH}
TRAINED = {"observe_every": 2, "refresh_every": 20}
# In training, natural-gradient steps are bounded in KL, and momentum comes before preconditioning:
# early on F changes quickly, and momentum after it keeps steps of an earlier, smaller F going.
TRUST = {"kl_clip": 0.1, "momentum_order": "before"}


class Grid(NamedTuple):
    """The settings among which the best is taken.

    Attributes:
        lrs: learning rates.
        option: name of the second setting.
        values: of the second setting.
    """

    lrs: tuple[float, ...]
    option: str
    values: tuple[float, ...]


# the same budget for all: four learning rates times three values of the second setting
NATURAL = Grid((0.01, 0.03, 0.1, 0.3), "damping", (0.01, 0.1, 1.0))
GRIDS: dict[str, Grid] = {
    "SGD momentum": Grid((1e-3, 3e-3, 1e-2, 3e-2), "momentum", (0.9, 0.95, 0.99)),
    "Adam": Grid((1e-3, 3e-3, 1e-2, 3e-2), "eps", (1e-8, 1e-4, 1e-2)),
    **dict.fromkeys(METHODS, NATURAL),
    # under the root: large steps else diverge
    "Shampoo": Grid((0.03, 0.1, 0.3, 1.0), "damping", (10.0, 100.0, 1000.0)),
    "KBFGS": Grid((0.03, 0.1, 0.3, 1.0), "damping", (0.03, 0.3, 3.0)),
}
PEERS = ("pytorch_optimizer.Shampoo", "pytorch_optimizer.SOAP", "heavyball.SOAP")


def network() -> tuple[nn.Sequential, Tensor]:
    """The untrained autoencoder and its training images `[N, 784]`."""
    problem = problems.load("mnist_autoencoder", full=True, steps=0, examples=1)
    assert problem.train_data is not None
    return problem.model.train(), problem.train_data[0]


def make(
    name: str, model: nn.Module, lr: float, second: float | None = None
) -> torch.optim.Optimizer:
    """An optimizer by name; `second` is the other setting of its grid."""
    option = {}
    if name in GRIDS and second is not None:
        option[GRIDS[name].option] = second
    if name == "SGD momentum":
        return torch.optim.SGD(model.parameters(), lr, **{"momentum": 0.9, **option})
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr, **option)
    if name == "KBFGS":  # learns from every step, so that it has no periods
        return fl.optim.KBFGS(model, LOSS, lr, **option)
    if name in METHODS:
        settings = {"damping": 1.0, **TIMED}
        if option:
            settings = {**option, **TRAINED}
            if name != "Shampoo":
                settings.update(TRUST)
        method = getattr(fl.optim, name)
        if name == "TENGraD":
            settings["batch"] = KEPT  # as published, of batches of 1000
        return method(model, LOSS, lr=lr, **settings)
    return make_peer(name, model, lr)


def make_peer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer of another package, as `package.class`.

    Raises:
        ImportError: if the package is not installed.
    """
    module_name, _, cls = name.partition(".")
    module = importlib.import_module(module_name)
    if module_name == "heavyball":
        # its default tries every kernel for minutes and then takes the same ones
        module.utils.compile_mode = "default"
    period = "precondition_frequency"
    if cls == "Shampoo":
        period = "preconditioning_compute_steps"
    optimizer = getattr(module, cls)
    return optimizer(model.parameters(), lr=lr, **{period: REFRESH})


def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    """One training step; the loss before it."""
    return train_step(model, optimizer, LOSS, x, x)


# -- time per step ---------------------------------------------------------------------------------
def seconds_per_step(name: str, warm: int, measured: int) -> tuple[float, float]:
    """Mean seconds of a step, and state bytes per parameter.

    Args:
        name: of the optimizer.
        warm: steps before the clock starts.
        measured: steps on the clock: whole cycles of observing and refreshing.
    """
    torch.manual_seed(0)
    model, images = network()
    optimizer = make(name, model, 1e-4)
    x = images[:BATCH]
    for _ in range(warm):
        step(model, optimizer, x)
    started = time.perf_counter()
    for _ in range(measured):
        step(model, optimizer, x)
    spent = (time.perf_counter() - started) / measured
    parameters = sum(p.numel() for p in model.parameters())
    held = sum(t.nbytes for t in tensors(optimizer.state_dict()))
    return spent, held / parameters


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def steps(quick: bool) -> None:
    """Measure all optimizers in turn, SGD before and after, and write the table."""
    path = RESULTS / "optimizer_steps.json"
    rows = load(path, quick)
    # SGD before and after, as the machine may change its pace
    for name in ("SGD momentum", *METHODS, "Adam", *PEERS, "SGD momentum again"):
        if name in rows:
            continue
        try:
            rows[name] = timed(name.removesuffix(" again"), quick)
        except ImportError:
            print(f"{name}: not installed, left out")
            continue
        milliseconds = rows[name]["seconds"] * 1e3
        print(f"{name:28s} {milliseconds:8.1f} ms", flush=True)
        save(path, rows, quick)
    about = (
        f"batch {BATCH}, periods {OBSERVE}/{REFRESH}, peers' period {REFRESH}; products: those "
        "(and factorisations) that a method cannot do without, see analysis/benchmarks/floors.py"
    )
    table("Optimizers: time per step", path, step_lines(rows), quick, about)


def timed(name: str, quick: bool) -> dict[str, float]:
    """The row of one optimizer."""
    own = name in METHODS
    # ours and other periodic ones over a whole period; ours beyond their first refreshes
    measured = 30
    if own or "." in name:
        measured = REFRESH
    warm = 10
    if own:
        warm = REFRESH + 1
    if quick:
        warm = 2
        measured = 3
    spent, size = seconds_per_step(name, warm, measured)
    row = {"seconds": spent, "bytes_per_parameter": size}
    if own:
        torch.manual_seed(0)
        model, images = network()
        pieces = Pieces(model, LOSS.loss, images[:BATCH])
        row["unavoidable"] = unavoidable(name, pieces, OBSERVE, REFRESH, time.perf_counter)
    return row


def step_lines(rows: dict[str, Any]) -> list[str]:
    """The table of times."""
    before = rows["SGD momentum"]["seconds"]
    after = rows["SGD momentum again"]["seconds"]
    sgd = (before + after) / 2
    lines = [
        "| optimizer | ms per step | / SGD | / (SGD + products) | state bytes per parameter |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        seconds = row["seconds"]
        floor = ""
        if "unavoidable" in row:
            least = sgd + row["unavoidable"]
            floor = f"{seconds / least:.2f}"
        milliseconds = seconds * 1e3
        ratio = seconds / sgd
        size = row["bytes_per_parameter"]
        lines.append(f"| {name} | {milliseconds:.1f} | {ratio:.2f} | {floor} | {size:.1f} |")
    return lines


# -- training to a loss ----------------------------------------------------------------------------
def train(name: str, lr: float, second: float, epochs: int, seed: int = 0) -> dict[str, Any]:
    """Training loss over all images and seconds of training after every epoch."""
    torch.manual_seed(seed)
    model, images = network()
    optimizer = make(name, model, lr, second)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    clock: list[float] = []
    spent = 0.0
    for _ in range(epochs):
        started = time.perf_counter()
        shuffled = torch.randperm(len(images), generator=order)
        for index in shuffled.split(BATCH):
            step(model, optimizer, images[index])
        spent += time.perf_counter() - started
        with torch.no_grad():
            loss = float(LOSS.loss(model(images), images))
        losses.append(loss)
        clock.append(spent)
        # diverged, or NaN: the rest of the budget would not bring it back
        if not loss < 1e4:
            break
    return {"losses": losses, "seconds": clock}


def training(names: list[str], tuning: int, final: int, quick: bool) -> None:
    """Tune every optimizer with the same budget, then train with its best setting.

    Args:
        names: of the optimizers.
        tuning: epochs of each setting.
        final: epochs of the best one.
        quick: one setting each, and nothing is saved.
    """
    path = RESULTS / "optimizer_training.json"
    rows = load(path, quick)
    for name in names:
        tune(name, tuning, rows, path, quick)
        best = best_of(name, tuning, rows)
        key = f"{name} final"
        if key not in rows:
            trained = train(name, best["lr"], best["second"], final, seed=1)
            rows[key] = {**best, **trained}
            report(key, rows[key])
            save(path, rows, quick)
    finals = {}
    for key, row in rows.items():
        if key.endswith(" final"):
            finals[row["name"]] = row
    lines = final_lines(finals, final)
    if not quick:
        figure = path.parent.parent / "optimizer_training.svg"
        training_figure(finals, figure)
        lines += ["", f"![Training losses against epochs and seconds]({figure.name})"]
    periods = "/".join(map(str, TRAINED.values()))
    about = (
        f"Batch {BATCH}, periods {periods} (K-BFGS learns from every step); 12 settings of "
        f"{tuning} epochs each, then {final} epochs with another seed. TNT, KFAC, MBF, EKFAC, "
        f"TKFAC, TEKFAC and TENGraD have `kl_clip={TRUST['kl_clip']}` and momentum before "
        "preconditioning, the others their defaults"
    )
    table("Optimizers: training", path, lines, quick, about)


def tune(name: str, epochs: int, rows: dict[str, Any], path: Path, quick: bool) -> None:
    """Train with every setting of an optimizer's grid that is not among the rows yet."""
    grid = GRIDS[name]
    settings = list(product(grid.lrs, grid.values))
    if quick:
        settings = settings[:1]
    for lr, second in settings:
        key = f"{name} lr={lr:g} {grid.option}={second:g}"
        if key in rows:
            continue
        trained = train(name, lr, second, epochs)
        rows[key] = {"name": name, "lr": lr, "second": second, **trained}
        report(key, rows[key])
        save(path, rows, quick)


def best_of(name: str, epochs: int, rows: dict[str, Any]) -> dict[str, Any]:
    """The row of an optimizer's grid with the lowest last loss; one that diverged only if
    all did.
    """
    tuned = []
    for key, row in rows.items():
        if row["name"] == name and not key.endswith(" final"):
            tuned.append(row)

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        loss = row["losses"][-1]
        diverged = len(row["losses"]) < epochs or math.isnan(loss)
        return diverged, loss

    return min(tuned, key=order)


def report(key: str, row: dict[str, Any]) -> None:
    """A line about a finished run."""
    loss = row["losses"][-1]
    seconds = row["seconds"][-1]
    print(f"{key:44s} {loss:9.2f}  {seconds:6.1f} s", flush=True)


def final_lines(finals: dict[str, Any], epochs: int) -> list[str]:
    """The table of trainings, each with its best setting."""
    lines = [
        "| optimizer | best setting | final training loss | s per epoch | epochs to SGD's loss | "
        "s to Adam's loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in finals.items():
        reached = first_below(row, finals.get("SGD momentum"), range(1, epochs + 1))
        spent = first_below(row, finals.get("Adam"), row["seconds"])
        grid = GRIDS[name]
        lr = at(row["lr"], grid.lrs)
        second = at(row["second"], grid.values)
        loss = row["losses"][-1]
        each = row["seconds"][-1] / len(row["seconds"])
        lines.append(
            f"| {name} | lr {lr}, {grid.option} {second} | {loss:.2f} | {each:.2f} | {reached} | "
            f"{spent} |"
        )
    return lines


def at(value: float, grid: tuple[float, ...]) -> str:
    """A value, and whether it lies at the end of its grid."""
    text = f"{value:g}"
    if value in (grid[0], grid[-1]):
        text += " (end of its grid)"
    return text


def first_below(row: dict[str, Any], target: dict[str, Any] | None, axis: Any) -> str:
    """Where on the axis the losses first reach the last loss of `target`."""
    if target is None:
        return ""
    wanted = target["losses"][-1]
    for place, loss in zip(axis, row["losses"], strict=False):
        if loss <= wanted:
            return f"{place:.3g}"
    return "never"


# -- files -----------------------------------------------------------------------------------------
def load(path: Path, quick: bool) -> dict[str, Any]:
    """Finished runs; none for a quick trial."""
    if quick or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found["rows"]


def save(path: Path, rows: dict[str, Any], quick: bool) -> None:
    """Keep what is finished."""
    if quick:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "fisher-lab": fl.__version__,
    }
    text = json.dumps({"settings": about, "rows": rows}, indent=1)
    path.write_text(text + "\n")


def table(title: str, path: Path, lines: list[str], quick: bool, about: str) -> None:
    """Print the table and, but for a quick trial, write its page of the documentation."""
    text = "\n".join(lines) + "\n"
    print(text)
    if quick:
        return
    head = f"# {title}\n\nMNIST autoencoder, 2.8 million parameters."
    threads = torch.get_num_threads()
    where = f"{about}; torch {torch.__version__}, {threads} threads."
    page = path.parent.parent / f"{path.stem}.md"
    page.write_text(f"{head}\n\n{text}\n{where}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["steps", "training"])
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=list(GRIDS),
        default=["SGD momentum", "Adam", "TNT", "KFAC"],
    )
    parser.add_argument("--tuning-epochs", type=int, default=10)
    parser.add_argument("--final-epochs", type=int, default=50)
    parser.add_argument(
        "--quick", action="store_true", help="a trial of a few steps that saves nothing"
    )
    chosen = parser.parse_args()
    if chosen.what == "steps":
        steps(chosen.quick)
    else:
        training(chosen.optimizers, chosen.tuning_epochs, chosen.final_epochs, chosen.quick)


if __name__ == "__main__":
    main()
