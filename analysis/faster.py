"""Does a better approximation train faster? One network, one loop, the same small grid for every
approximation.
"""

import math
from typing import Any

import torch
from scipy.stats import spearmanr

import fisher_lab as fl
from analysis.common import SEED, SMALL, Study, checkpoint, load, numbers
from fisher_lab.plots.style import new_figure, styled, styles

STEPS, BATCH = 150, 100
RATES, DAMPINGS = (0.01, 0.03, 0.1, 0.3), (0.1, 1.0)
QUALITY = 100  # step of Adam at which the approximations are measured
DAMPING = 0.1
METHODS = (
    fl.KFAC(),
    fl.EKFAC(),
    fl.TKFAC(),
    fl.TEKFAC(),
    fl.TN(),
    fl.MiniBlock(),
    fl.KPSVD(),
    fl.LNGD(),
    fl.Diagonal(),
)


def train(make: Any) -> list[float]:
    """Loss over all training examples after every 25 steps; infinite once it is not a number."""
    problem = checkpoint("martens_grosse", 0)
    model, likelihood, (x, y) = problem.model.train(), problem.likelihood, problem.train_data
    generator, losses = torch.Generator().manual_seed(SEED), []
    opt = make(model, likelihood)
    for step in range(STEPS):
        part = torch.randint(len(x), (BATCH,), generator=generator)
        if isinstance(opt, fl.optim.NaturalGradient):
            with opt.observing():
                z = model(x[part])
        else:
            z = model(x[part])
        loss = likelihood.loss(z, y[part])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % 25 == 0:
            with torch.no_grad():
                losses.append(float(likelihood.loss(model(x), y)))
            if not math.isfinite(losses[-1]):
                return [math.inf]
    return losses


def best(runs: dict[str, list[float]]) -> tuple[str, list[float]]:
    """The setting whose last loss is the smallest."""
    return min(runs.items(), key=lambda item: item[1][-1])


def measure() -> Study:
    """Quality of every approximation, and its best training run of the grid."""
    study = Study("faster")
    problem = checkpoint("martens_grosse", QUALITY, examples=500)
    errors = ["frobenius", "damped_efficiency"]
    study.compare(QUALITY, problem, METHODS, layers=SMALL, errors=errors, dampings=[DAMPING])
    options = {"seed": SEED, "observe_every": 1, "refresh_every": 10, "fisher": "mc"}
    for method in METHODS:
        runs = {}
        for lr in RATES:
            for damping in DAMPINGS:
                runs[f"lr {lr:g}, damping {damping:g}"] = train(
                    lambda m, p, method=method, lr=lr, damping=damping: fl.NaturalGradient(
                        m, p, method, lr=lr, damping=damping, **options
                    )
                )
        study.numbers[method.label] = dict(zip(("setting", "losses"), best(runs), strict=True))
    first_order = {
        "Adam": (torch.optim.Adam, (1e-3, 3e-3, 1e-2), {}),
        "SGD": (torch.optim.SGD, RATES, {"momentum": 0.9}),
    }
    for name, (make, rates, extra) in first_order.items():
        runs = {}
        for lr in rates:
            runs[f"lr {lr:g}"] = train(
                lambda m, _, make=make, lr=lr, e=extra: make(m.parameters(), lr=lr, **e)
            )
        study.numbers[name] = dict(zip(("setting", "losses"), best(runs), strict=True))
    study.save()
    return study


def quality(found: Any, name: str) -> list[float]:
    """Frobenius error and efficiency of an approximation."""
    return [
        found.value("(all)", name, "frobenius"),
        found.value("(all)", name, "damped_efficiency", DAMPING),
    ]


@styled
def figure(found: Any, runs: dict[str, Any]) -> Any:
    """Loss against the step, and the last loss against both qualities."""
    drawing = new_figure(11.0, 3.6)
    left, *others = drawing.subplots(1, 3, width_ratios=(1.4, 1, 1))
    for name, style in styles(runs).items():
        losses = runs[name]["losses"]
        steps = range(25, 25 * len(losses) + 1, 25)
        left.semilogy(
            steps,
            losses,
            style.line,
            color=style.color,
            marker=style.marker,
            label=name,
            markeredgecolor="0.15",
        )
        if name in found.approximations:
            for axes, place in zip(others, quality(found, name), strict=True):
                axes.semilogy(
                    [place],
                    losses[-1:],
                    style.marker,
                    color=style.color,
                    markeredgecolor="0.15",
                    markersize=8,
                )
    left.set_xlabel("training step")
    left.set_ylabel("training loss, best setting of the grid")
    others[0].set_xlabel("frobenius error (exact: 0)")
    others[1].set_xlabel(f"damped efficiency at {DAMPING:g} (exact: 1)")
    drawing.legend(loc="outside right upper")
    return drawing


def main() -> None:
    """Measure, save, draw."""
    study = measure()
    found, runs = load("faster")[str(QUALITY)], numbers("faster")
    names = [name for name in runs if name in found.approximations]
    last = [runs[name]["losses"][-1] for name in names]
    ranks = [
        float(spearmanr(column, last)[0])
        for column in zip(*(quality(found, n) for n in names), strict=True)
    ]
    rows = [
        [
            name,
            *(quality(found, name) if name in names else ["", ""]),
            *run["losses"][1::2],
            run["setting"],
        ]
        for name, run in sorted(runs.items(), key=lambda item: item[1]["losses"][-1])
    ]
    rows.append(["rank correlation with the last loss", *ranks, "", "", "", ""])
    steps = [f"loss at step {step}" for step in range(50, STEPS + 1, 50)]
    study.table(["trained with", "Frobenius", "efficiency", *steps, "best of the grid"], rows)
    study.draw(figure(found, runs))


if __name__ == "__main__":
    main()
