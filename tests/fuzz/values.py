"""Values of arguments: right ones by the argument's name, and odd ones of all kinds.

A new public argument joins by one line in `RIGHT`; `tests/fuzz/test_calls.py` says which is
missing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from fisher_lab.likelihoods import GaussianVariance
from fisher_lab.results import Row
from tests.contracts.matrices import MATRICES
from tests.helpers import random_stats

NAN = math.nan
INF = math.inf


class World:
    """What the values are made from: random choices and a folder of its own.

    Args:
        seed: of the choices.
        folder: where files may be written.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = Random(seed)
        self.folder = folder

    def choose(self, things: Any) -> Any:
        """One of several."""
        return self.random.choice(list(things))


Make = Callable[[World], Any]


# -- right values ----------------------------------------------------------------------------------
def dense_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)).eval()


def inputs(N: int = 6) -> Tensor:
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(1))


def classes(N: int = 6) -> Tensor:
    return torch.arange(N) % 2


def whole(world: World) -> Any:
    return inputs(), classes()


def batches(world: World) -> Any:
    return [(inputs(4), classes(4)), (inputs(4) + 1, classes(4))]


def loader(world: World) -> Any:
    return DataLoader(TensorDataset(inputs(), classes()), batch_size=3)


@functools.cache
def comparison() -> fl.Comparison:
    approximations = [fl.KFAC(), fl.Diagonal(), fl.TN()]
    return fl.compare(
        dense_net(), nn.CrossEntropyLoss(), (inputs(), classes()), approximations, errors="all"
    )


@functools.cache
def network() -> fl.NetworkFisher:
    return fl.network(dense_net(), nn.CrossEntropyLoss(), (inputs(), classes()))


@functools.cache
def blocks() -> dict[str, fl.FisherMatrix]:
    return fl.estimate(fl.KFAC(), dense_net(), nn.CrossEntropyLoss(), (inputs(), classes()))


@functools.cache
def step_budget() -> fl.StepBudget:
    return fl.budget(dense_net(), nn.CrossEntropyLoss(), (inputs(), classes()), fl.KFAC())


def matrix(world: World) -> fl.FisherMatrix:
    name = world.choose(name for name in MATRICES if MATRICES[name]().shape == (3, 4))
    return MATRICES[name]()


def weight(world: World) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def of_network(world: World) -> dict[str, Tensor]:
    found = {}
    for name, shape in network().shapes.items():
        found[name] = torch.ones(shape, dtype=torch.float64)
    return found


def saved_file(world: World) -> Path:
    return comparison().save(world.folder / f"saved{world.choose(['.json', '.csv'])}")


def trainer(world: World) -> torch.optim.Optimizer:
    return fl.optim.KFAC(dense_net(), nn.CrossEntropyLoss(), 0.01)


def figure(world: World) -> Any:
    found = Figure()
    found.subplots()
    return found


def one_of(*things: Any) -> Make:
    """One of these values."""
    return lambda world: world.choose(things)


def made(*makers: Callable[[], Any]) -> Make:
    """What one of these functions gives."""
    return lambda world: world.choose(makers)()


RATE = one_of(0.1, 1e-3, torch.tensor(0.1))
NAMES_OF_LAYERS = one_of(None, ["0"], ("0", "2"), "2")
SHOWN_LAYERS = one_of(None, ["0"], ["0", "2"])
SHOWN = one_of(None, ["KFAC"], ["KFAC", "TN"])

# Right values by the name of the argument.
RIGHT: dict[str, Make] = {
    "model": made(dense_net),
    "likelihood": made(nn.CrossEntropyLoss, fl.Categorical),
    "data": lambda world: world.choose([whole, batches, loader])(world),
    "test_data": lambda world: world.choose([None, whole(world)]),
    "train_data": lambda world: world.choose([None, whole(world)]),
    "approximation": made(fl.KFAC, fl.Diagonal, fl.TN, fl.Exact),
    "approximations": lambda world: world.choose([[fl.KFAC()], {"mine": fl.TN()}, [fl.Diagonal()]]),
    "fisher": one_of("true", "mc", "empirical"),
    "layers": NAMES_OF_LAYERS,
    "errors": one_of("default", "all", ["frobenius"], "trace", ["damped_cosine", "cosine"]),
    "dampings": one_of((0.1,), [0.01, 1.0], 0.1),
    "damping": one_of(0.1, 1.0, 1e-3),
    "exact": one_of("captured", "func"),
    "seed": one_of(0, 1, 7, -3),
    "dtype": one_of(torch.float64, torch.float32),
    "device": one_of(None, "cpu", torch.device("cpu")),
    "memory": one_of(None, 0.5, 2, 1),
    "on_unknown": one_of("error", "skip"),
    "standard_errors": one_of(False, True),
    "progress": one_of(False),
    "resume": one_of(None),
    "problem": one_of(None, {"name": "mine"}, {}),
    "labels": one_of("labels", "y"),
    "output": one_of(None, 0),
    "batch": one_of(None, 2, 4),
    "path": saved_file,
    "check": one_of(True, False),
    "rows": lambda world: comparison().rows,
    "costs": lambda world: comparison().costs,
    "settings": lambda world: comparison().settings,
    "quantities": lambda world: comparison().quantities,
    "covariances": one_of(()),
    "width": one_of(80, 110, 30),
    "layer": one_of("0", "2", "(all)"),
    "error": one_of("frobenius", "trace", "cosine"),
    "a": one_of("KFAC"),
    "b": one_of("TN"),
    "X": weight,
    "approx": matrix,
    "other": matrix,
    "c": one_of(2.0, 0.5, 1, torch.tensor(2.0, dtype=torch.float64)),
    "p": one_of(-1.0, -0.5, 0.5, 1.0, 1),
    "style": one_of("exact"),
    "index": one_of(0),
    "count": one_of(1),
    "gradient": lambda world: world.choose([None, weight(world)]),
    "names": one_of("default", "all", ["trace"]),
    "columns": one_of(None, 1, 2),
    "inverse_damping": one_of(None, 0.1),
    "comparison": lambda world: comparison(),
    "budget": lambda world: step_budget(),
    "figure": figure,
    "prefix": one_of("", "a-"),
    "comparisons": lambda world: world.choose([comparison(), [comparison()]]),
    "variance": one_of(1.0, 0.5),
    "dim": one_of(-1, 1),
    "delta": one_of(1.0, 2.0),
    "precision": one_of(1.0, 2.0),
    "eps": one_of(1e-6, 0.0),
    "log_rate": one_of(True, False),
    "spatial": one_of("expand"),
    "linear": one_of("row", "col"),
    "conv": one_of("kernel", "filter"),
    "match_trace": one_of(True, False),
    "modes": one_of(None, 2),
    "base": made(fl.KFAC, fl.TKFAC),
    "lr": RATE,
    "momentum": one_of(0.9, 0.0),
    "momentum_order": one_of("before", "after"),
    "damping_style": one_of("exact", "factored"),
    "weight_decay": one_of(0.0, 1e-3),
    "decoupled": one_of(True, False),
    "kl_clip": one_of(None, 1e-2),
    "decay": one_of(0.95, 0.0),
    "observe_every": one_of(1, 10),
    "refresh_every": one_of(10, 100),
    "statistics": one_of("per_example"),
    "groups": one_of(None),
    "fallback_lr": one_of(1e-3, 0.1),
    "max_block_bytes": one_of(2**20),
    "optimizer": trainer,
    "epochs": one_of(1, 2),
    "schedule": one_of(None),
    "metrics": lambda world: world.choose([None, world.folder / "run.jsonl"]),
    "checkpoint": lambda world: world.choose([None, world.folder / "run.pt"]),
    "checkpoint_every": one_of(None, 1),
    "callbacks": one_of(()),
    "x": made(inputs),
    "y": made(classes),
    "z": lambda world: torch.randn(6, 2, generator=torch.Generator().manual_seed(3)),
    "every": one_of(1, 2),
    "module": made(nn.CrossEntropyLoss, nn.MSELoss),
    "name": one_of("KFAC", "Adam", "SGD"),
    "matrices": lambda world: blocks(),
    "V": of_network,
    "step": of_network,
    "v": lambda world: network().flatten(of_network(world)),
    "k": one_of(1, 2),
    "factored": one_of(True, False),
    "spec": one_of("digits_mlp", "iris_regression"),
    "optional": one_of(None),
    "generator": lambda world: world.choose([None, torch.Generator().manual_seed(1)]),
    "lrs": one_of((0.1,), (0.1, 1.0)),
    "closure": one_of(None),
    "state_dict": lambda world: trainer(world).state_dict(),
    "kept": one_of(None),
    "most_flops": one_of(1e9),
    "weight_shape": one_of((3, 4)),
    "network": lambda world: network(),
    "params": lambda world: list(dense_net().parameters()),
    "measure_every": one_of(0, 1),
    "shift": one_of(0.1, 1.0),
    "group": one_of(None),
    "refresh": one_of(None, "replicated"),
    "options": one_of(None, {}),
}

# Right values of one callable alone.
OF_ONE: dict[tuple[str, str], Make] = {
    ("Comparison.save", "path"): lambda world: world.folder / world.choose(["a.json", "b.csv"]),
    ("Comparison.value", "approximation"): one_of("KFAC", "TN"),
    ("Comparison.value", "damping"): one_of(None),
    ("Comparison.table", "errors"): one_of(None, ["trace"]),
    ("plots.save", "path"): lambda world: world.folder / world.choose(["a.png", "b.svg"]),
    ("write_report", "path"): lambda world: world.folder / "page.html",
    ("plots.training", "comparisons"): lambda world: {0: comparison(), 10: comparison()},
    ("plots.damping", "error"): one_of("damped_cosine"),
    ("cost", "damping"): one_of(None),
    ("TENGraD", "batch"): one_of(2, 128),
    ("fit", "batch"): one_of(2, 3),
    ("fit", "resume"): one_of(False, True),
    ("fit", "data"): whole,
    ("NetworkFisher.block", "a"): one_of("0", "2"),
    ("NetworkFisher.block", "b"): one_of("0", "2"),
    ("problem", "function"): one_of(lambda: (dense_net(), nn.CrossEntropyLoss(), inputs())),
    ("Problem", "data"): whole,
    ("Problem", "settings"): one_of({}, {"name": "mine"}),
    ("Problem", "name"): one_of("mine"),
    ("TKFAC", "spatial"): one_of("expand", "full"),
    ("train_command", "problem"): lambda world: own_problem(),
    ("tune_command", "problem"): lambda world: own_problem(),
    ("train_command", "optimizer"): one_of("KFAC", "SGD"),
    ("tune_command", "optimizer"): one_of("KFAC", "SGD"),
    ("train_command", "settings"): one_of(None, {}),
    ("tune_command", "settings"): one_of(None, {}),
    ("train_command", "output"): lambda world: world.choose([None, world.folder / "own.jsonl"]),
    ("tune_command", "output"): lambda world: world.choose([None, world.folder / "own.json"]),
}
for shown in ("cost", "damping", "errors", "heatmap", "spectrum", "traces", "training"):
    OF_ONE[f"plots.{shown}", "approximations"] = SHOWN
    OF_ONE[f"plots.{shown}", "layers"] = SHOWN_LAYERS
    if shown != "damping":
        OF_ONE[f"plots.{shown}", "damping"] = one_of(None)
for drawn in ("spectrum", "blocks"):
    OF_ONE[f"plots.{drawn}", "approximations"] = lambda world: {"a": matrix(world)}
    OF_ONE[f"plots.{drawn}", "exact"] = matrix


def own_problem() -> Any:
    return fl.problems.Problem("mine", dense_net(), nn.CrossEntropyLoss(), (inputs(), classes()))


# -- odd values ------------------------------------------------------------------------------------
class Raw:
    """Something that nobody can use."""


def in_training() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()


def with_nan() -> nn.Module:
    model = dense_net()
    next(model.parameters()).data[0, 0] = NAN
    return model


NUMBERS = (0, 1, -1, 2, 0.0, 0.5, -0.5, 1e-300, 1e300, NAN, INF, -INF, 10**30, True, False)
TEXTS = ("", "x", "0", "KFAC", "nan", "../x", "a\0b", "\r", "ü" * 300, "float:1", "\ud800", "true")
THINGS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: b"x",
    list,
    dict,
    lambda: (),
    lambda: set(),
    lambda: [None],
    lambda: [1, 2],
    lambda: ["x", 1],
    lambda: {"x": 1},
    lambda: {1: None},
    lambda: 1j,
    lambda: Raw(),
    lambda: Raw,
    lambda: print,
    lambda: (n for n in range(2)),
    lambda: SimpleNamespace(),
    lambda: Path("x"),
    lambda: Path("/proc/nothing/x.json"),
)
TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: torch.tensor(1.0),
    lambda: torch.tensor(-1.0, dtype=torch.float64),
    lambda: torch.tensor(NAN),
    lambda: torch.tensor([0.1, 0.2]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(1),
    lambda: torch.tensor(True),
    lambda: torch.zeros(3, 4),
    lambda: torch.zeros(3, 4, dtype=torch.float64),
    lambda: torch.zeros(0, 4),
    lambda: torch.full((6, 4), NAN),
    lambda: torch.full((6, 4), INF),
    lambda: torch.ones(6, 4, device="meta"),
    lambda: torch.ones(3, 4, dtype=torch.complex128),
    lambda: torch.ones(3, 4).to_sparse(),
    lambda: torch.ones(2, 3, 4, 5),
    lambda: torch.ones(6, 4).numpy(),
    lambda: torch.arange(6),
)
MODELS: tuple[Callable[[], Any], ...] = (
    dense_net,
    conv_net,
    in_training,
    with_nan,
    nn.Identity,
    nn.Sequential,
    nn.Module,
    lambda: nn.Linear(4, 2),
    lambda: nn.Linear(5, 2),
    lambda: nn.Linear(4, 2, device="meta"),
    lambda: nn.Linear(4, 2).half(),
    lambda: nn.Linear(4, 2, dtype=torch.complex64),
    lambda: nn.LazyLinear(2),
    lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(),
    lambda: nn.LSTM(4, 2),
    lambda: nn.DataParallel(nn.Linear(4, 2)),
    lambda: torch.relu,
)
LOSSES: tuple[Callable[[], Any], ...] = (
    lambda: nn.CrossEntropyLoss,
    lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    lambda: nn.CrossEntropyLoss(weight=torch.ones(2)),
    lambda: nn.CrossEntropyLoss(reduction="none"),
    lambda: nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss,
    nn.L1Loss,
    nn.BCEWithLogitsLoss,
    nn.CTCLoss,
    nn.KLDivLoss,
    fl.Gaussian,
    fl.Bernoulli,
    GaussianVariance,
    lambda: fl.Categorical(dim=5),
    lambda: fl.Likelihood,
    lambda: nn.functional.cross_entropy,
)
DATA: tuple[Callable[[], Any], ...] = (
    inputs,
    lambda: (inputs(), None),
    lambda: (inputs(),),
    lambda: (inputs(), classes(), classes()),
    lambda: (inputs(), classes(5)),
    lambda: (inputs(), classes() + 5),
    lambda: (inputs(), classes() - 1),
    lambda: (inputs(), classes().float()),
    lambda: (inputs(), classes().to("meta")),
    lambda: (inputs(), torch.full((6, 2), NAN)),
    lambda: (inputs(), inputs()),
    lambda: (inputs().to("meta"), classes()),
    lambda: (inputs(0), classes(0)),
    lambda: (inputs() * NAN, classes()),
    lambda: (inputs() * 1e300, classes()),
    lambda: (inputs().numpy(), classes().numpy()),
    lambda: (inputs().tolist(), classes().tolist()),
    lambda: {"x": inputs(), "labels": classes()},
    lambda: {"input": inputs(), "y": classes()},
    list,
    lambda: [inputs(), inputs()],
    lambda: [(inputs(), classes()), (inputs(), None)],
    lambda: [(inputs(), classes()), inputs()],
    lambda: [(inputs(), classes()), (torch.ones(2, 5), classes(2))],
    lambda: iter([(inputs(), classes())]),
    lambda: DataLoader(TensorDataset(inputs(), classes()), batch_size=3, shuffle=True),
    lambda: TensorDataset(inputs(), classes()),
    lambda: inputs(1),
    lambda: (inputs(1), classes(1)),
)
OWN: tuple[Callable[[], Any], ...] = (
    fl.KFAC,
    lambda: fl.KFAC,
    lambda: [fl.KFAC],
    lambda: [fl.KFAC(), fl.KFAC()],
    lambda: {"a": {"0": MATRICES["Kronecker"]()}},
    lambda: {"a": {"0": torch.eye(3)}},
    lambda: {"": fl.KFAC(), "float:1": fl.TN(), "\r": fl.Diagonal()},
    comparison,
    lambda: fl.Comparison(()),
    lambda: fl.Comparison((Row("0", "KFAC", "frobenius", NAN, NAN),)),
    lambda: fl.Comparison((Row("0", "KFAC", "frobenius", INF, 0.0),)),
    lambda: {0: comparison(), "x": comparison()},
    lambda: MATRICES["Kronecker"](),
    lambda: MATRICES["Kronecker, one mode"](),
    lambda: {"a": MATRICES["Kronecker"]()},
    lambda: random_stats(0),
    step_budget,
    network,
    Figure,
    lambda: torch.optim.SGD(dense_net().parameters(), 0.1),
    lambda: [{"layers": ["0"], "lr": 0.1}],
    lambda: [{"layers": ["nothing"]}],
    lambda: [{"lr": 1}],
    lambda: [3],
)


def odd(world: World) -> Any:
    """A value of any kind; most are wrong for a given argument, some are right."""
    things = world.choose([NUMBERS, TEXTS, THINGS, THINGS, TENSORS, MODELS, LOSSES, DATA, OWN])
    thing = world.choose(things)
    if isinstance(things[0], int | str):
        return thing
    return thing()


# What a wrong value of an argument mostly is like.
NEAR: dict[str, tuple[Callable[[], Any], ...]] = {
    "model": MODELS,
    "likelihood": LOSSES,
    "module": LOSSES,
    "data": DATA,
    "test_data": DATA,
    "train_data": DATA,
    "X": TENSORS,
    "x": TENSORS,
    "y": TENSORS,
    "z": TENSORS,
}


def near(name: str, world: World) -> Any:
    """An odd value of the kind that belongs to an argument."""
    if name not in NEAR:
        return odd(world)
    return world.choose(NEAR[name])()
