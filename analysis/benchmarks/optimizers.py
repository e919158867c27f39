"""Optimizers on the MNIST autoencoder 784-1000-500-250-30-250-500-1000-784, batch 1000: time per
step, and training.

    python -m analysis.benchmarks.optimizers steps       time per step, SGD's plus the unavoidable products beside it
    python -m analysis.benchmarks.optimizers training    losses after tuning on grids with the same budget for all

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisher_lab as fl
from analysis.benchmarks.floors import Pieces, unavoidable
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

# the same budget for all: four learning rates times three values of the second setting
GRIDS: dict[str, tuple[tuple[float, ...], str, tuple[float, ...]]] = {
    "SGD momentum": ((1e-3, 3e-3, 1e-2, 3e-2), "momentum", (0.9, 0.95, 0.99)),
    "Adam": ((1e-3, 3e-3, 1e-2, 3e-2), "eps", (1e-8, 1e-4, 1e-2)),
    **dict.fromkeys(METHODS, ((0.01, 0.03, 0.1, 0.3), "damping", (0.01, 0.1, 1.0))),
    # under the root: large steps else diverge
    "Shampoo": ((0.03, 0.1, 0.3, 1.0), "damping", (10.0, 100.0, 1000.0)),
    "KBFGS": ((0.03, 0.1, 0.3, 1.0), "damping", (0.03, 0.3, 3.0)),
}


def network() -> tuple[nn.Sequential, Tensor]:
    """The untrained autoencoder and its training images `[N, 784]`."""
    problem = problems.load("mnist_autoencoder", full=True, steps=0, examples=1)
    assert problem.train_data is not None
    return problem.model.train(), problem.train_data[0]


def make(
    name: str, model: nn.Module, lr: float, second: float | None = None
) -> torch.optim.Optimizer:
    """An optimizer by name; `second` is the other setting of its grid."""
    if name == "SGD momentum":
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9 if second is None else second)
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr, eps=1e-8 if second is None else second)
    if name == "KBFGS":  # learns from every step
        return fl.optim.KBFGS(model, LOSS, lr, damping=0.3 if second is None else second)
    if name in METHODS:
        method = getattr(fl.optim, name)
        if second is None:
            return method(model, LOSS, lr=lr, damping=1.0, **TIMED)
        return method(
            model, LOSS, lr=lr, damping=second, **TRAINED, **({} if name == "Shampoo" else TRUST)
        )
    module, _, cls = name.partition(".")
    # its default tries every kernel for minutes and then takes the same ones
    if module == "heavyball":
        importlib.import_module(module).utils.compile_mode = "default"
    period = (
        {"preconditioning_compute_steps": REFRESH}
        if cls == "Shampoo"
        else {"precondition_frequency": REFRESH}
    )
    return getattr(importlib.import_module(module), cls)(model.parameters(), lr=lr, **period)


def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    """One training step; the loss before it."""
    return train_step(model, optimizer, LOSS, x, x)


# -- time per step ---------------------------------------------------------------------------------
def seconds_per_step(name: str, warm: int, measured: int) -> tuple[float, float]:
    """Mean seconds of a step over whole cycles of observing and refreshing, and state bytes per
    parameter.
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
    size = sum(p.numel() for p in model.parameters())
    return spent, sum(t.numel() * t.element_size() for t in tensors(optimizer.state_dict())) / size


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def steps(quick: bool) -> None:
    """Measure all optimizers in turn, SGD before and after, and write the table."""
    path = RESULTS / "optimizer_steps.json"
    rows = load(path, quick)
    warm, measured = (2, 3) if quick else (REFRESH + 1, REFRESH)
    peers = [
        f"{m}.{c}"
        for m, c in (
            ("pytorch_optimizer", "Shampoo"),
            ("pytorch_optimizer", "SOAP"),
            ("heavyball", "SOAP"),
        )
    ]
    for name in ("SGD momentum", *METHODS, "Adam", *peers, "SGD momentum again"):
        if name in rows:
            continue
        base = name.removesuffix(" again")
        try:
            own = base in METHODS
            spent, size = seconds_per_step(
                base, warm if own else min(warm, 10), measured if own or "." in base else 30
            )
        except ImportError:
            print(f"{name}: not installed, left out")
            continue
        rows[name] = {"seconds": spent, "bytes_per_parameter": size}
        if own:
            torch.manual_seed(0)
            model, images = network()
            pieces = Pieces(model, LOSS.loss, images[:BATCH])
            rows[name]["unavoidable"] = unavoidable(
                base, pieces, OBSERVE, REFRESH, time.perf_counter
            )
        print(f"{name:28s} {spent * 1e3:8.1f} ms", flush=True)
        save(path, rows, quick)
    sgd = (rows["SGD momentum"]["seconds"] + rows["SGD momentum again"]["seconds"]) / 2
    lines = [
        "| optimizer | ms per step | / SGD | / (SGD + products) | state bytes per parameter |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        floor = f"{row['seconds'] / (sgd + row['unavoidable']):.2f}" if "unavoidable" in row else ""
        ratio = row["seconds"] / sgd
        lines.append(
            f"| {name} | {row['seconds'] * 1e3:.1f} | {ratio:.2f} | {floor} | "
            f"{row['bytes_per_parameter']:.1f} |"
        )
    table(
        "Optimizers: time per step",
        path,
        lines,
        quick,
        f"batch {BATCH}, periods {OBSERVE}/{REFRESH}, peers' period {REFRESH}; products: those "
        "(and factorisations) that a method cannot do without, see analysis/benchmarks/floors.py",
    )


# -- training to a loss ----------------------------------------------------------------------------
def train(name: str, lr: float, second: float, epochs: int, seed: int = 0) -> dict[str, Any]:
    """Training loss over all images and seconds of training after every epoch."""
    torch.manual_seed(seed)
    model, images = network()
    optimizer = make(name, model, lr, second)
    order = torch.Generator().manual_seed(seed)
    losses, clock, spent = [], [], 0.0
    for _ in range(epochs):
        started = time.perf_counter()
        for index in torch.randperm(len(images), generator=order).split(BATCH):
            step(model, optimizer, images[index])
        spent += time.perf_counter() - started
        with torch.no_grad():
            losses.append(float(LOSS.loss(model(images), images)))
        clock.append(spent)
        if not losses[-1] < 1e4:  # diverged: the rest of the budget would not bring it back
            break
    return {"losses": losses, "seconds": clock}


def training(names: list[str], tuning: int, final: int, quick: bool) -> None:
    """Tune every optimizer with the same budget, then train with its best setting, and write the
    table.
    """
    path = RESULTS / "optimizer_training.json"
    rows = load(path, quick)
    for name in names:
        lrs, option, seconds = GRIDS[name]
        for lr in lrs[:1] if quick else lrs:
            for second in seconds[:1] if quick else seconds:
                key = f"{name} lr={lr:g} {option}={second:g}"
                if key not in rows:
                    rows[key] = {
                        "name": name,
                        "lr": lr,
                        "second": second,
                        **train(name, lr, second, tuning),
                    }
                    print(
                        f"{key:44s} {rows[key]['losses'][-1]:9.2f}  "
                        f"{rows[key]['seconds'][-1]:6.1f} s",
                        flush=True,
                    )
                    save(path, rows, quick)
        tuned = [r for k, r in rows.items() if r["name"] == name and not k.endswith("final")]
        best = min(
            tuned,
            key=lambda r: (
                len(r["losses"]) < tuning or math.isnan(r["losses"][-1]),
                r["losses"][-1],
            ),
        )
        key = f"{name} final"
        if key not in rows:
            rows[key] = {**best, **train(name, best["lr"], best["second"], final, 1)}
            print(
                f"{key:44s} {rows[key]['losses'][-1]:9.2f}  {rows[key]['seconds'][-1]:6.1f} s",
                flush=True,
            )
            save(path, rows, quick)
    finals = {r["name"]: r for k, r in rows.items() if k.endswith("final")}
    lines = [
        "| optimizer | best setting | final training loss | s per epoch | epochs to SGD's loss | "
        "s to Adam's loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in finals.items():
        epochs = first_below(row, finals.get("SGD momentum"), range(1, final + 1))
        spent = first_below(row, finals.get("Adam"), row["seconds"])
        lrs, option, seconds = GRIDS[name]
        setting = f"lr {at(row['lr'], lrs)}, {option} {at(row['second'], seconds)}"
        each = row["seconds"][-1] / len(row["seconds"])
        lines.append(
            f"| {name} | {setting} | {row['losses'][-1]:.2f} | {each:.2f} | {epochs} | {spent} |"
        )
    periods = "/".join(map(str, TRAINED.values()))
    budget = (
        f"Batch {BATCH}, periods {periods} (K-BFGS learns from every step); 12 settings of "
        f"{tuning} epochs each, then {final} epochs with another seed. TNT, KFAC, MBF, EKFAC, "
        f"TKFAC, TEKFAC and TENGraD have `kl_clip={TRUST['kl_clip']}` and momentum before "
        "preconditioning, the others their defaults"
    )
    if not quick:
        figure = path.parent.parent / "optimizer_training.svg"
        training_figure(finals, figure)
        lines += ["", f"![Training losses against epochs and seconds]({figure.name})"]
    table("Optimizers: training", path, lines, quick, budget)


def at(value: float, grid: tuple[float, ...]) -> str:
    """A value, and whether it lies at the end of its grid."""
    return f"{value:g}" + (" (end of its grid)" if value in (grid[0], grid[-1]) else "")


def first_below(row: dict[str, Any], target: dict[str, Any] | None, axis: Any) -> str:
    """Where on the axis the losses first reach the last loss of `target`."""
    if target is None:
        return ""
    found = [
        at for at, loss in zip(axis, row["losses"], strict=False) if loss <= target["losses"][-1]
    ]
    return f"{found[0]:.3g}" if found else "never"


# -- files -----------------------------------------------------------------------------------------
def load(path: Path, quick: bool) -> dict[str, Any]:
    """Finished runs; none for a quick trial."""
    return json.loads(path.read_text())["rows"] if path.exists() and not quick else {}


def save(path: Path, rows: dict[str, Any], quick: bool) -> None:
    """Keep what is finished."""
    if quick:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(
        json.dumps({"settings": {**about, "fisher-lab": fl.__version__}, "rows": rows}, indent=1)
        + "\n"
    )


def table(title: str, path: Path, lines: list[str], quick: bool, about: str) -> None:
    """Print the table and, but for a quick trial, write it beside the results' folder for the
    documentation.
    """
    text = "\n".join(lines) + "\n"
    print(text)
    if not quick:
        page = path.parent.parent / f"{path.stem}.md"
        where = f"{about}; torch {torch.__version__}, {torch.get_num_threads()} threads."
        page.write_text(
            f"# {title}\n\nMNIST autoencoder, 2.8 million parameters.\n\n{text}\n{where}\n"
        )


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
