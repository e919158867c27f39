"""E1, Martens & Grosse (2015): which blocks of the Fisher and of its inverse are large, over four
middle layers.
"""

import torch
from torch import Tensor, nn

import fisher_lab as fl
from analysis.common import SEED, Study, checkpoint, numbers

MIDDLE = ("2", "4", "6", "8")
DAMPINGS = (0.001, 0.01, 0.1)


class Middle(nn.Module):
    """The network with the parameters of its middle layers in one block, so that cross-layer terms
    are measured too.
    """

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.before, self.after = model[:2], model[9:]
        self.weights = nn.ParameterList(
            [p for name in MIDDLE for p in model.get_submodule(name).parameters()]
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same function."""
        x = self.before(x)
        for i in range(len(MIDDLE)):
            x = torch.tanh(nn.functional.linear(x, self.weights[2 * i], self.weights[2 * i + 1]))
        return self.after(x)


def blocks(matrix: Tensor) -> Tensor:
    """Root mean square of the entries of each pair of layers `[4, 4]`, scaled to unit diagonal,
    which is left out.
    """
    scale = matrix.diagonal().clamp(min=1e-30).rsqrt()
    size = len(matrix) // len(MIDDLE)
    correlation = matrix * scale[:, None] * scale
    correlation.fill_diagonal_(0.0)
    return (
        correlation.square().unflatten(0, (-1, size)).unflatten(-1, (-1, size)).mean((1, 3)).sqrt()
    )


def by_distance(table: Tensor) -> dict[str, float]:
    """Mean over pairs of layers that lie 0, 1, 2 and 3 apart."""
    return {str(k): float(table.diagonal(k).mean()) for k in range(len(MIDDLE))}


def measure() -> tuple[Study, Tensor]:
    """Errors of each middle block, and the sizes of the cross-layer blocks."""
    study = Study("e1_kfac")
    problem = checkpoint("martens_grosse", 500, examples=500)
    study.compare(500, problem, layers=MIDDLE)
    joined = Middle(problem.model).eval()
    found = fl.exact_fisher(
        joined, problem.likelihood, problem.data, layers=["weights"], seed=SEED
    )["weights"]
    full = found.dense()
    mean = float(found.trace()) / found.dim
    inverses = {f"{damping:g}": found.powered(-1.0, damping * mean).dense() for damping in DAMPINGS}
    study.numbers = {
        "F": by_distance(blocks(full)),
        "inverse": {k: by_distance(blocks(m)) for k, m in inverses.items()},
    }
    study.save()
    return study, full


def main() -> None:
    """Measure, save, draw."""
    study, full = measure()
    found = numbers("e1_kfac")
    rows = [["F", *found["F"].values()]]
    rows += [
        [f"(F + {name} tr F/d I)^-1", *sizes.values()] for name, sizes in found["inverse"].items()
    ]
    study.table(
        [
            "root mean square correlation of two weights in layers that lie",
            "0 apart",
            "1",
            "2",
            "3",
        ],
        rows,
    )
    # one row a layer: lines between layers
    block = fl.matrices.Dense(full, (len(MIDDLE), len(full) // len(MIDDLE)))
    study.draw(fl.plots.blocks(block, {}, inverse_damping=DAMPINGS[1]))


if __name__ == "__main__":
    main()
