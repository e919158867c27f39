"""A toy U-Net that finds the discs, and not the boxes, in small noisy images."""

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods import Bernoulli
from fisher_lab.problems.data import (
    SPLIT_SEED,
    Dataset,
    fingerprint,
    local_generator,
    standard_torch,
)
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, trained_problem

SIDE = 16
TRAIN = 1500
TEST = 500
NOISE = 0.3


@problem
def segmentation(
    channels: tuple[int, ...] = (6, 12),
    examples: int = 100,
    steps: int = 400,
    lr: float = 1e-2,
    batch: int = 50,
    seed: int = 0,
) -> Problem:
    """U-Net with one skip connection: which pixels of a generated 16x16 image belong to a disc?
    fisher="mc".

    There is one binary output per pixel, 256 directions for every example: the problem asks for the
    Monte-Carlo Fisher. The likelihood `Bernoulli()` sums over the pixels of an image.

    Args:
        channels: at full and at half resolution.
        examples: number of measuring examples, at most 1500.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples; the images are always the same.

    Raises:
        ValueError: if `channels` are not two numbers.
    """
    check_widths("channels", channels)
    if len(channels) != 2:
        raise ValueError(f"got channels={channels}, expected two numbers: write such as (6, 12)")
    return trained_problem(
        lambda: UNet(channels[0], channels[1]),
        Bernoulli(),
        discs_and_boxes(),
        fisher="mc",
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )


class UNet(nn.Module):
    """Images `[N, 1, 16, 16]` -> logits `[N, 1, 16, 16]`."""

    def __init__(self, wide: int, deep: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, wide, 3, padding=1)
        self.deep1 = nn.Conv2d(wide, deep, 3, padding=1)
        self.deep2 = nn.Conv2d(deep, deep, 3, padding=1)
        self.up = nn.Conv2d(wide + deep, wide, 3, padding=1)
        self.head = nn.Conv2d(wide, 1, 1)
        self.pool = nn.AvgPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 1, 16, 16]` of the pixels of x `[N, 1, 16, 16]`."""
        skip = self.relu(self.down(x))
        half = self.pool(skip)
        deep = self.relu(self.deep1(half))
        deep = self.relu(self.deep2(deep))
        joined = torch.cat([skip, self.upsample(deep)], dim=1)
        return self.head(self.relu(self.up(joined)))


@standard_torch()
def discs_and_boxes() -> Dataset:
    """Images x `[N, 1, 16, 16]` of a disc and a box under noise, and y the pixels of the disc."""
    generator = local_generator(SPLIT_SEED)
    N = TRAIN + TEST

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(N, 1, 1, generator=generator)

    # every draw in this order: another one would be other images
    axis = torch.arange(SIDE)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    radius = uniform(2.0, 4.5)
    down = row - uniform(3, 12)
    right = column - uniform(3, 12)
    disc = down**2 + right**2 < radius**2
    tall = uniform(1.5, 4.0)
    broad = uniform(1.5, 4.0)
    down = row - uniform(3, 12)
    right = column - uniform(3, 12)
    box = (down.abs() < tall) & (right.abs() < broad)
    box = box & ~disc  # the disc is in front
    bright_disc = uniform(0.6, 1.4) * disc
    bright_box = uniform(0.6, 1.4) * box
    noise = NOISE * torch.randn(N, SIDE, SIDE, generator=generator)
    x = bright_disc + bright_box + noise
    x = x.unsqueeze(1)
    y = disc.unsqueeze(1).to(torch.float32)
    train = x[:TRAIN], y[:TRAIN]
    test = x[TRAIN:], y[TRAIN:]
    return Dataset(train, test, fingerprint(x, y))
