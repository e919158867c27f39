"""The table layer x approximation x status: every approximation is tried on every adapter.

Run `python docs/support.py` to print it. `table()` gives it as Markdown.
"""

from __future__ import annotations

import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import approximations, layers
from fisher_lab.matrices import FisherMatrix

EXACT = 1e-7  # a relative error that is nothing but rounding
# What is tried: adapter, module, shape of an input, by the word behind the layer's name; words of
# underscores alone, which only tell the keys apart, are not written.
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
    """A row for every adapter and for what changes its structure, a column for every
    approximation.
    """
    methods = []
    for method in approximations.default_approximations():
        # a user's, or a test's, have no column
        if type(method).__module__.startswith("fisher_lab."):
            methods.append(method)
    titles = ["layer"]
    for method in methods:
        titles.append(f"`{method.label}`")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for variant, (adapter, module, shape) in SAMPLES.items():
        cells = [title(adapter, variant)]
        for method in methods:
            cells.append(status(method, module, shape))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def title(adapter: type[layers.Layer], variant: str) -> str:
    """The module types of an adapter, and the variant."""
    names = []
    for kind, known in layers.registry().items():
        if known is adapter:
            names.append(f"`{kind.__name__}`")
    words = [", ".join(names), variant.strip("_")]
    return " ".join(words).strip()


def status(method: fl.Approximation, module: nn.Module, shape: tuple[int, ...]) -> str:
    """What the approximation is on a layer: its structure, "exact", or "refused"."""
    x = _inputs(module, shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        model = model.double().eval()
        model(x)  # the lazy layer finds its size
    try:
        matrix = _block(method, model, x)
    except ValueError:
        return "refused"
    exact = _block(fl.Exact(), model, x)
    if fl.errors.frobenius(exact, matrix) < EXACT:
        return "exact, of its batch" if isinstance(method, fl.TENGraD) else "exact"
    text = structure(matrix)
    if getattr(module, "groups", 1) > 1 and "Kronecker" in text:
        text = text.replace("product", "product per group")
        text = text.replace("eigenbasis", "eigenbasis per group")
    return text


def _inputs(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Random inputs `[40, *shape]`, the same every time."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return torch.randint(0, module.num_embeddings, (40, *shape), generator=draw)
    return torch.randn(40, *shape, generator=draw, dtype=torch.float64)


def _block(method: fl.Approximation, model: nn.Module, x: torch.Tensor) -> FisherMatrix:
    """The method's matrix of the first layer."""
    return fl.estimate(method, model, fl.Categorical(), x, layers=["0"])["0"]


def structure(matrix: FisherMatrix) -> str:
    """The structure in words."""
    parts = getattr(matrix, "parts", None)
    if parts is not None:
        return f"{structure(parts[0])}, bias apart"
    return STRUCTURES.get(type(matrix).__name__, type(matrix).__name__)


if __name__ == "__main__":
    print(table())
