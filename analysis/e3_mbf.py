"""E3, Bahamou, Goldfarb & Ren (2022): is the inverse Fisher nearly mini-block diagonal?"""

from typing import Any

import torch

import fisher_lab as fl
from analysis.common import Study, checkpoint, numbers

DAMPING = 0.01


def share(matrix: Any, block: int) -> dict[str, float]:
    """Share of the mini-blocks in the sum of |entries| and in the squared norm, and what an even
    spread would give.
    """
    entries = matrix.dense()
    d = len(entries)
    inside = torch.block_diag(*[torch.ones(block, block)] * (d // block)).bool()
    absolute = float(entries.abs()[inside].sum() / entries.abs().sum())
    return {
        "absolute": absolute,
        "squared": float(entries[inside].square().sum() / entries.square().sum()),
        "even": block / d,
    }


def measure(study: Study, name: str, layer: str, steps: int, fisher: str) -> dict[str, Any]:
    """Exact and mini-block matrices of one layer of a trained network, with the shares of the
    mini-blocks.
    """
    problem = checkpoint(name, steps, examples=500 if name == "martens_grosse" else 200)
    options = {"layers": [layer], "fisher": fisher}
    exact = fl.estimate(fl.Exact(), problem.model, problem.likelihood, problem.data, **options)[
        layer
    ]
    study.compare(
        f"{name} {fisher}",
        problem,
        [fl.MiniBlock(), fl.KFAC(), fl.Diagonal()],
        errors=["frobenius", "damped_cosine"],
        dampings=[DAMPING],
        **options,
    )
    inverse = exact.powered(-1.0, DAMPING * float(exact.trace()) / exact.dim)
    block = exact.shape[1] if name == "martens_grosse" else 9  # a row with its bias; a kernel
    # the mini-blocks of a convolution are its kernels: drop the bias column
    if name != "martens_grosse":
        kept = torch.arange(exact.dim).view(exact.shape)[:, :-1].flatten()
        size = (exact.shape[0], exact.shape[1] - 1)
        exact, inverse = (
            fl.matrices.Dense(m.dense()[kept][:, kept], size) for m in (exact, inverse)
        )
    study.numbers[f"{name} {fisher}"] = {"F": share(exact, block), "inverse": share(inverse, block)}
    return {"exact": exact}


def main() -> None:
    """Measure, save, draw."""
    study = Study("e3_mbf")
    last = measure(study, "martens_grosse", "10", 1000, "empirical")
    measure(study, "martens_grosse", "10", 1000, "true")
    measure(study, "mnist_cnn", "0", 300, "empirical")
    measure(study, "mnist_cnn", "0", 300, "true")
    study.save()
    rows = [
        [key, of, *(shares[k] for k in ("absolute", "squared", "even"))]
        for key, found in numbers("e3_mbf").items()
        for of, shares in found.items()
    ]
    study.table(
        ["layer and Fisher", "of", "share of sum of abs", "share of squares", "if spread evenly"],
        rows,
    )
    study.draw(fl.plots.blocks(last["exact"], {}, inverse_damping=DAMPING))


if __name__ == "__main__":
    main()
