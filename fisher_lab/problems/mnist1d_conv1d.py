"""One-dimensional signals in the manner of MNIST-1D (Greydanus 2020); Conv1d with stride.

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

LENGTH = 40
CLASSES = 10
TRAIN = 3000
TEST = 1000


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
    before = 1
    length = LENGTH
    kernel = 5  # the first one sees more of the signal
    for after in channels:
        convolution = nn.Conv1d(before, after, kernel, stride=2, padding=kernel // 2)
        layers += [convolution, nn.ReLU()]
        before = after
        length = (length + 1) // 2
        kernel = 3
    head = nn.Linear(before * length, CLASSES)
    return nn.Sequential(*layers, nn.Flatten(), head)


@standard_torch()
def signals() -> Dataset:
    """Training and test signals, x `[N, 1, 40]` with mean 0 and variance 1 each, y `[N]`
    classes.
    """
    generator = local_generator(SPLIT_SEED)
    curves = class_curves(generator)
    N = TRAIN + TEST
    y = torch.arange(N) % CLASSES  # any first examples have all classes equally often
    x = distorted(curves[y], generator)
    train = x[:TRAIN], y[:TRAIN]
    test = x[TRAIN:], y[TRAIN:]
    return Dataset(train, test, fingerprint(x, y))


def class_curves(generator: torch.Generator) -> Tensor:
    """One smooth curve per class as Fourier sine coefficients `[10, 5]`."""
    frequency = torch.arange(1, 6)
    # lower frequencies are stronger
    coefficients = torch.randn(CLASSES, 5, generator=generator) / frequency.sqrt()
    return coefficients / coefficients.norm(dim=1, keepdim=True)


def distorted(coefficients: Tensor, generator: torch.Generator) -> Tensor:
    """Signals `[N, 1, 40]`: the curves `[N, 5]` at random places and widths, tilted, with noise."""
    N = len(coefficients)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(N, 1, generator=generator)

    time = torch.arange(LENGTH) / LENGTH
    width = uniform(0.45, 0.75)
    start = uniform(0.0, 1.0) * (1 - width)
    phase = (time - start) / width
    inside = (phase > 0) & (phase < 1)
    frequency = torch.arange(1, 6)
    waves = torch.sin(math.pi * phase.unsqueeze(-1) * frequency)  # [N, 40, 5]
    terms = waves * coefficients.unsqueeze(1)
    curve = terms.sum(-1) * inside
    tilt = uniform(-0.75, 0.75) * (time - 0.5)
    x = uniform(0.8, 1.2) * curve + tilt + smooth_noise(N, generator) * 0.3
    x = x + 0.05 * torch.randn(N, LENGTH, generator=generator)
    centred = x - x.mean(1, keepdim=True)
    x = centred / x.std(1, keepdim=True)
    return x.unsqueeze(1)


def smooth_noise(N: int, generator: torch.Generator) -> Tensor:
    """Noise `[N, 40]` of variance 1 whose neighbours are correlated (a running mean over 5)."""
    white = torch.randn(N, LENGTH + 4, generator=generator)
    return white.unfold(1, 5, 1).mean(-1) * math.sqrt(5)
