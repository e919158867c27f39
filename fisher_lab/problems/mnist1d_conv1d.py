"""One-dimensional signals in the manner of MNIST-1D (Greydanus 2020), from a generator of our own;
Conv1d with stride.

As there, each class is a short curve that is stretched, shifted, tilted and covered with noise. The
curves and the noise are ours: losses cannot be compared with those published for MNIST-1D.
"""

import math

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods import Categorical
from fisher_lab.problems.data import (
    SPLIT_SEED,
    Dataset,
    fingerprint,
    local_generator,
    standard_torch,
)
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, trained_problem

LENGTH, CLASSES, TRAIN, TEST = 40, 10, 3000, 1000


@problem
def mnist1d_conv1d(
    channels: tuple[int, ...] = (8, 12, 12),
    examples: int = 200,
    steps: int = 500,
    lr: float = 3e-3,
    batch: int = 100,
    seed: int = 0,
) -> Problem:
    """Three Conv1d (8, 12 and 12 channels, stride 2, ReLU) and a Linear on generated signals in the
    manner of MNIST-1D.

    Args:
        channels: of the convolutions, at most four of them.
        examples: number of measuring examples, at most 3000.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples; the signals are always the same.

    Raises:
        ValueError: if there are more convolutions than the signal can be halved.
    """
    check_widths("channels", channels)
    if len(channels) > 4:
        raise ValueError(
            f"got channels={channels}, expected at most 4: a signal of 40 can be halved four times"
        )
    return trained_problem(
        lambda: network(channels),
        Categorical(),
        signals(),
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )


def network(channels: tuple[int, ...]) -> nn.Sequential:
    """Signals `[N, 1, 40]` -> logits `[N, 10]`."""
    layers: list[nn.Module] = []
    before, length = 1, LENGTH
    for index, after in enumerate(channels):
        layers += [
            nn.Conv1d(
                before, after, 5 if index == 0 else 3, stride=2, padding=2 if index == 0 else 1
            ),
            nn.ReLU(),
        ]
        before, length = after, (length + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * length, CLASSES))


@standard_torch()
def signals() -> Dataset:
    """Training and test signals, x `[N, 1, 40]` with mean 0 and variance 1 each, y `[N]` class
    indices.
    """
    generator = local_generator(SPLIT_SEED)
    curves = class_curves(generator)
    N = TRAIN + TEST
    y = torch.arange(N) % CLASSES  # any first examples have all classes equally often
    x = distorted(curves[y], generator)
    return Dataset((x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), fingerprint(x, y))


def class_curves(generator: torch.Generator) -> Tensor:
    """One smooth curve per class as Fourier sine coefficients `[10, 5]`, lower frequencies
    stronger.
    """
    coefficients = torch.randn(CLASSES, 5, generator=generator) / torch.arange(1, 6).sqrt()
    return coefficients / coefficients.norm(dim=1, keepdim=True)


def distorted(coefficients: Tensor, generator: torch.Generator) -> Tensor:
    """Signals `[N, 1, 40]` that show the curves `[N, 5]` at random places and widths, tilted, with
    noise.
    """
    N = len(coefficients)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(N, 1, generator=generator)

    time = torch.arange(LENGTH) / LENGTH
    width = uniform(0.45, 0.75)
    start = uniform(0.0, 1.0) * (1 - width)
    phase = (time - start) / width
    inside = (phase > 0) & (phase < 1)
    waves = torch.sin(math.pi * phase.unsqueeze(-1) * torch.arange(1, 6))  # [N, 40, 5]
    curve = (waves * coefficients.unsqueeze(1)).sum(-1) * inside
    tilt = uniform(-0.75, 0.75) * (time - 0.5)
    x = uniform(0.8, 1.2) * curve + tilt + smooth_noise(N, generator) * 0.3
    x = x + 0.05 * torch.randn(N, LENGTH, generator=generator)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x.unsqueeze(1)


def smooth_noise(N: int, generator: torch.Generator) -> Tensor:
    """Noise `[N, 40]` of variance 1 whose neighbours are correlated (a running mean over 5)."""
    white = torch.randn(N, LENGTH + 4, generator=generator)
    return white.unfold(1, 5, 1).mean(-1) * math.sqrt(5)
