"""From which photograph is this patch? Colour patches of scikit-image's and scikit-learn's photos.

Each patch has its mean colour removed, so that the colour alone does not tell. Training patches lie
wholly in the left 75 % of a photo and test patches wholly in the right 25 %: no pixel is in both.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisher_lab._ground.optional import require
from fisher_lab.likelihoods import Categorical
from fisher_lab.problems.data import (
    SPLIT_SEED,
    Dataset,
    fingerprint,
    local_generator,
    standard_torch,
    stratified_order,
)
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, trained_problem

SIDE = 32
TRAIN_EACH = 200
TEST_EACH = 40
LEAST_CONTRAST = 0.02
SCIKIT_IMAGE = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)


@problem
def photo_patches_cnn(
    photos: str = "all",
    channels: tuple[int, ...] = (8, 16),
    examples: int = 100,
    steps: int = 300,
    lr: float = 1e-2,
    batch: int = 50,
    seed: int = 0,
) -> Problem:
    """Plain, depthwise and pointwise convolutions with GroupNorm on 32x32 colour patches: which of
    9 photos is it from?

    Args:
        photos: "all" nine of scikit-image and scikit-learn, or "scikit-learn" for its two.
        channels: of the first convolution and of the pointwise one; even numbers, for GroupNorm has
            two groups.
        examples: number of measuring examples, at most 200 per photo.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples; the patches are always the same.

    Raises:
        ValueError: for other photos or channels, or if a package with photos is not installed.
    """
    check_widths("channels", channels)
    if len(channels) != 2 or channels[0] % 2 or channels[1] % 2:
        raise ValueError(
            f"got channels={channels}, expected two even numbers: write such as (8, 16)"
        )
    names, images = read_photos(photos)
    return trained_problem(
        lambda: network(channels[0], channels[1], len(images)),
        Categorical(),
        patches(images),
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
        classes=names,
    )


def network(first: int, second: int, classes: int) -> nn.Sequential:
    """Patches `[N, 3, 32, 32]` -> logits `[N, classes]`."""
    return nn.Sequential(
        nn.Conv2d(3, first, 5, stride=2, padding=2),
        nn.GroupNorm(2, first),
        nn.ReLU(),
        nn.Conv2d(first, first, 3, stride=2, padding=1, groups=first),
        nn.Conv2d(first, second, 1),
        nn.GroupNorm(2, second),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4 * second, classes),
    )


def read_photos(photos: str) -> tuple[list[str], list[np.ndarray]]:
    """The names and pixels `[height, width, 3]` uint8 of the photos."""
    if photos not in ("all", "scikit-learn"):
        raise ValueError(
            f"got photos={photos!r}, expected 'all' or 'scikit-learn': choose one of these"
        )
    sample = require("sklearn.datasets", "scikit-learn").load_sample_images()
    names = [Path(name).stem for name in sample.filenames]
    images = list(sample.images)
    if photos == "all":
        bundled: Any = require("skimage.data", "scikit-image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # readers of old image files warn about themselves
            for name in SCIKIT_IMAGE:
                read = getattr(bundled, name)
                images.append(read())
        names += SCIKIT_IMAGE
    return names, images


@standard_torch()
def patches(images: list[np.ndarray]) -> Dataset:
    """Training and test patches of photos `[height, width, 3]`.

    They are x `[N, 3, 32, 32]` and y `[N]`, the index of the photo.
    """
    generator = local_generator(SPLIT_SEED)
    parts: list[tuple[Tensor, Tensor]] = []
    for left, each in ((True, TRAIN_EACH), (False, TEST_EACH)):
        xs = []
        ys = []
        for label, image in enumerate(images):
            cut = int(0.75 * image.shape[1])
            side = image[:, :cut] if left else image[:, cut:]
            found = patches_of(side)
            order = torch.randperm(len(found), generator=generator)
            found = found[order[:each]]
            xs.append(found)
            ys.append(torch.full((len(found),), label))
        x = torch.cat(xs)
        y = torch.cat(ys)
        order = stratified_order(y, generator)
        parts.append((x[order], y[order]))
    return Dataset(parts[0], parts[1], fingerprint(*images))


def patches_of(image: np.ndarray) -> Tensor:
    """Half overlapping patches `[n, 3, 32, 32]` of a photo `[height, width, 3]`.

    Flat ones are left out, and mean colours taken off.
    """
    whole = torch.from_numpy(np.ascontiguousarray(image))
    pixels = whole.permute(2, 0, 1).to(torch.float32) / 255
    # a patch at every half of its side: [3, rows, columns, 32, 32]
    found = pixels.unfold(1, SIDE, SIDE // 2).unfold(2, SIDE, SIDE // 2)
    found = found.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIDE, SIDE)
    contrast = found.flatten(1).std(1)
    found = found[contrast > LEAST_CONTRAST]
    return found - found.mean((2, 3), keepdim=True)
