"""The net, the labels and the losses that the tests of compare share."""

import torch
from torch import nn

import fisher_lab as fl

LOSSES = {
    "categorical": (fl.Categorical(), "classes"),
    "gaussian": (fl.Gaussian(0.7), "values"),
    "bernoulli": (fl.Bernoulli(), "binary"),
    "ce mean": (nn.CrossEntropyLoss(), "classes"),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "mse mean": (nn.MSELoss(), "values"),
    "mse sum": (nn.MSELoss(reduction="sum"), "values"),
    "bce mean": (nn.BCEWithLogitsLoss(), "binary"),
    "bce sum": (nn.BCEWithLogitsLoss(reduction="sum"), "binary"),
}
TORCH_LOSSES = [name for name in LOSSES if " " in name]


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(5, 4),
            nn.Tanh(),
            nn.Linear(4, 4, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(4, 3),
        )
    return model.eval()


def labels(kind: str, n: int, c: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "classes":
        return torch.randint(c, (n,), generator=generator)
    values = torch.randn(n, c, generator=generator)
    return (values > 0).float() if kind == "binary" else values


def batch(kind: str = "classes", n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1)), labels(kind, n)
