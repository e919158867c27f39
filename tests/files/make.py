"""Made the files beside it: what a fisher_lab of format 1 saved, and the numbers that it had.

A later version must read these very files, so they are never made anew. What a later version saves
otherwise goes to another folder, made by another script like this one.

    python -m tests.files.make FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisher_lab as fl

LOSS = nn.CrossEntropyLoss()
BEFORE = 8  # steps before saving
AFTER = 3  # steps whose numbers are kept: two observations and a refresh are among them
SETTINGS = (
    "N", "R", "seed", "fisher", "dtype", "problem", "left_out",
    "approximations", "errors", "dampings",
)  # fmt: skip


def numbers(*shape: int, start: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers between -1 and 1, without a random generator, which another torch may change."""
    count = torch.Size(shape).numel()
    k = torch.arange(start, start + count, dtype=torch.float64)
    return torch.sin(k * k + 0.5 * k).view(shape).to(dtype)


def filled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with numbers as its parameters."""
    for index, p in enumerate(model.to(dtype).parameters()):
        p.data = 0.7 * numbers(*p.shape, start=100 * index, dtype=dtype)
    return model


# -- comparisons -----------------------------------------------------------------------------------
class Scale(nn.Module):
    """A module that no adapter knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[N, width]`, scaled."""
        return self.factor * x


class Mixed(nn.Module):
    """Two Linear layers, one with a frozen bias, and between them a module that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 3), Scale(3), nn.Linear(3, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[N, 4]` -> logits `[N, 3]`."""
        return self.last(self.scale(torch.tanh(self.first(x))))


def data(N: int) -> tuple[Tensor, Tensor]:
    """Inputs `[N, 4]` and classes `[N]`."""
    return numbers(N, 4, start=7), torch.arange(N) % 3


def comparisons() -> dict[str, fl.Comparison]:
    """By the names of their files."""
    infinite = infinite_errors()
    return {
        "whole.json": with_standard_errors(),
        "streamed.json": streamed(),
        "infinite.json": infinite,
        "infinite.csv": infinite,
    }


def with_standard_errors() -> fl.Comparison:
    """Damped errors and others, with standard errors; a module and a bias are left out."""
    return fl.compare(
        filled(Mixed()).eval(),
        LOSS,
        data(20),
        [fl.KFAC(), fl.EKFAC(), fl.TENGraD(4), fl.Diagonal()],
        errors=["default", "damped_cosine", "damped_spectral"],
        dampings=[0.01, 1.0],
        on_unknown="skip",
        standard_errors=True,
        problem={"name": "toy", "widths": [4, 3]},
        progress=False,
    )


def streamed() -> fl.Comparison:
    """A budget that the columns do not fit: an approximation and all damped errors are left out."""
    return fl.compare(
        filled(nn.Linear(60, 5)).eval(),
        LOSS,
        (numbers(400, 60), torch.arange(400) % 5),
        [fl.KFAC(), fl.KPSVD(), fl.Diagonal()],
        errors=["trace", "frobenius", "damped_cosine"],
        dampings=[0.1],
        memory=4e-4,
        progress=False,
    )


def infinite_errors() -> fl.Comparison:
    """A Fisher that is zero, as nothing leaves the first layer, and a matrix that is not."""
    net = filled(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))).eval()
    before = fl.estimate(fl.KFAC(), net, LOSS, data(20))
    net[2].weight.data.zero_()
    return fl.compare(
        net,
        LOSS,
        data(20),
        {"of another net": before, "KFAC": fl.KFAC()},
        errors=["trace", "frobenius", "damped_cosine"],
        fisher="mc",
        dampings=[0.1],
        progress=False,
    )


# what the first version wrote of a row
OF_A_ROW = (
    "layer", "approximation", "error", "value", "noise", "damping", "checked", "fisher", "stderr",
)  # fmt: skip


def kept(found: fl.Comparison) -> dict[str, Any]:
    """The numbers of a comparison, infinite ones as text, apart from any format of its files."""
    rows = []
    for row in found.rows:
        entries = [getattr(row, name) for name in OF_A_ROW]
        rows.append([str(entry) if entry == math.inf else entry for entry in entries])
    costs = [[cost.layer, cost.approximation, cost.bytes] for cost in found.costs]
    about = {name: found.settings[name] for name in SETTINGS}
    difference = None
    if found.covariances:
        difference = list(found.difference("first", "KFAC", "Diagonal", "frobenius"))
    return {"rows": rows, "costs": costs, "settings": about, "difference": difference}


# -- checkpoints -----------------------------------------------------------------------------------
PERIODS = {"observe_every": 2, "refresh_every": 5, "damping": 0.3}


def natural(model: nn.Module, approximation: fl.Approximation, **options: Any) -> Any:
    """NaturalGradient with the periods of all others."""
    return fl.NaturalGradient(model, LOSS, approximation, 0.05, **PERIODS, **options)


OPTIMIZERS = {
    "KFAC": lambda model: fl.optim.KFAC(model, LOSS, 0.05, weight_decay=0.01, **PERIODS),
    "EKFAC": lambda model: fl.optim.EKFAC(model, LOSS, 0.05, **PERIODS),
    "TENGraD": lambda model: fl.optim.TENGraD(model, LOSS, 0.05, batch=4, **PERIODS),
    "KBFGS": lambda model: fl.optim.KBFGS(model, LOSS, 0.05),
    "MiniBlock": lambda model: natural(model, fl.MiniBlock(), kl_clip=0.01),
    "KPSVD": lambda model: natural(model, fl.KPSVD()),
    "Corrected": lambda model: natural(model, fl.Corrected(fl.TKFAC())),
}
SINGLE = ("EKFAC", "MiniBlock")  # saved in float32


def dtype_of(name: str) -> torch.dtype:
    """Precision of the net that an optimizer trained."""
    return torch.float32 if name in SINGLE else torch.float64


def net(dtype: torch.dtype) -> nn.Module:
    """A convolution, two Linear layers, and a LayerNorm, which is the fallback's."""
    first = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()]
    rest = [nn.Linear(8, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)]
    return filled(nn.Sequential(*first, *rest), dtype)


def train(opt: Any, model: nn.Module, dtype: torch.dtype, first: int, steps: int) -> list[float]:
    """Losses of some steps, each on examples of its own."""
    losses = []
    for k in range(first, first + steps):
        x = numbers(6, 1, 4, 4, start=1000 + 96 * k, dtype=dtype)
        y = (torch.arange(6) + k) % 3

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            with opt.observing():
                z = model(x)
            loss = LOSS(z, y)
            loss.backward()
            return loss

        losses.append(float(opt.step(closure).detach()))
    return losses


def flat(model: nn.Module) -> list[float]:
    """All parameters in a row."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]).tolist()


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved after some steps, and the numbers of the steps that followed."""
    dtype = dtype_of(name)
    model = net(dtype)
    opt = OPTIMIZERS[name](model)
    train(opt, model, dtype, 0, BEFORE)
    # The next steps write into tensors of the state.
    saved = copied({"model": model.state_dict(), "optimizer": opt.state_dict()})
    losses = train(opt, model, dtype, BEFORE, AFTER)
    return saved, {"losses": losses, "parameters": flat(model)}


def copied(value: Any) -> Any:
    """Containers and tensors of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value


def main(folder: Path) -> None:
    """Write all files."""
    expected: dict[str, Any] = {"comparisons": {}, "checkpoints": {}}
    for file, found in comparisons().items():
        found.save(folder / file)
        expected["comparisons"][file] = kept(found)
    states = {}
    for name in OPTIMIZERS:
        states[name], expected["checkpoints"][name] = checkpoint(name)
    torch.save(states, folder / "checkpoints.pt")
    text = json.dumps(expected, allow_nan=False) + "\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
