"""The table layer x approximation x status, written by trying every approximation on every adapter
in the registry.

Run `python docs/support.py` to print it. `table()` gives it as Markdown.
"""

from __future__ import annotations

import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import approximations, layers
from fisher_lab.matrices import FisherMatrix

SAMPLES: dict[str, tuple[type[layers.Layer], nn.Module, tuple[int, ...]]] = {
    "": (layers.LinearLayer, nn.Linear(5, 4), (5,)),
    "at positions": (layers.LinearLayer, nn.Linear(5, 4), (3, 5)),
    "_": (layers.ConvLayer, nn.Conv2d(2, 4, 3), (2, 5, 5)),
    "with groups": (layers.ConvLayer, nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    "__": (layers.EmbeddingLayer, nn.Embedding(6, 4), (3,)),
    "___": (layers.EmbeddingBagLayer, nn.EmbeddingBag(6, 4), (3,)),
    "(gradient form)": (layers.GradientForm, nn.LayerNorm(5), (5,)),
}
STRUCTURES = {
    "Kronecker": "Kronecker product",
    "EigenbasisDiagonal": "diagonal in a Kronecker eigenbasis",
    "BlockDiagonal": "blocks",
    "FactoredRows": "blocks",
    "DiagonalMatrix": "diagonal",
    "LowRank": "columns",
    "Dense": "full block",
}


def table() -> str:
    """A row for every adapter (and for what changes its structure), a column for every
    approximation.
    """
    methods = approximations.default_approximations()
    methods = [method for method in methods if type(method).__module__.startswith("fisher_lab.")]
    lines = ["| layer | " + " | ".join(f"`{method.label}`" for method in methods) + " |"]
    lines.append("| --- |" + " --- |" * len(methods))
    for variant, (adapter, module, shape) in SAMPLES.items():
        cells = [status(method, module, shape) for method in methods]
        lines.append(f"| {title(adapter, variant)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def title(adapter: type[layers.Layer], variant: str) -> str:
    """The module types of an adapter, and the variant."""
    names = [f"`{kind.__name__}`" for kind, known in layers.registry().items() if known is adapter]
    return " ".join([", ".join(names), variant.strip("_")]).strip()


def status(method: fl.Approximation, module: nn.Module, shape: tuple[int, ...]) -> str:
    """What the approximation is on a layer: its structure, "exact", or "refused"."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, *shape, generator=draw, dtype=torch.float64)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        x = torch.randint(0, module.num_embeddings, (40, *shape), generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
        model(x)
    try:
        matrix = fl.estimate(method, model, fl.Categorical(), x, layers=["0"])["0"]
    except ValueError:
        return "refused"
    exact = fl.estimate(fl.Exact(), model, fl.Categorical(), x, layers=["0"])["0"]
    if fl.errors.frobenius(exact, matrix) < 1e-7:
        return "exact, of its batch" if isinstance(method, fl.TENGraD) else "exact"
    text = structure(matrix)
    if getattr(module, "groups", 1) > 1 and "Kronecker" in text:
        text = text.replace("product", "product per group").replace(
            "eigenbasis", "eigenbasis per group"
        )
    return text


def structure(matrix: FisherMatrix) -> str:
    """The structure in words."""
    parts = getattr(matrix, "parts", None)
    if parts is not None:
        return f"{structure(parts[0])}, bias apart"
    return STRUCTURES.get(type(matrix).__name__, type(matrix).__name__)


if __name__ == "__main__":
    print(table())
