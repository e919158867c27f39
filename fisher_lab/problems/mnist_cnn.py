"""A small convolutional network on MNIST digits at 14x14."""

from torch import nn

from fisher_lab.likelihoods import Categorical
from fisher_lab.problems import data
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, trained_problem


@problem
def mnist_cnn(
    channels: tuple[int, ...] = (6, 12),
    examples: int = 200,
    steps: int = 300,
    lr: float = 3e-3,
    batch: int = 50,
    seed: int = 0,
) -> Problem:
    """Two 3x3 convolutions (6 and 12 channels, each with ReLU and 2x2 pooling) and a Linear on
    MNIST digits at 14x14.

    Args:
        channels: of the convolutions, at most three of them.
        examples: number of measuring examples, at most 4000.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples.

    Raises:
        ValueError: if there are more convolutions than the image can be halved.
    """
    check_widths("channels", channels)
    if len(channels) > 3:
        raise ValueError(
            f"got channels={channels}, expected at most 3: 14x14 pixels can be halved three times"
        )
    return trained_problem(
        lambda: network(channels),
        Categorical(),
        data.mnist(side=14),
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )


def network(channels: tuple[int, ...]) -> nn.Sequential:
    """Images `[N, 1, 14, 14]` -> logits `[N, 10]`."""
    layers: list[nn.Module] = []
    before, side = 1, 14
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        before, side = after, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side * side, 10))
