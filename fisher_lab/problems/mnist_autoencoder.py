"""Autoencoders of MNIST digits, small by default.

`full=True` is the one of Hinton and Salakhutdinov (2006) that optimizers are compared on.
"""

from itertools import pairwise

from torch import nn

from fisher_lab.likelihoods import Bernoulli
from fisher_lab.problems import data
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, trained_problem

SIDE, WIDTHS = 8, (32, 16, 6)
FULL_SIDE, FULL_WIDTHS = 28, (1000, 500, 250, 30)


@problem
def mnist_autoencoder(
    widths: tuple[int, ...] = WIDTHS,
    side: int = SIDE,
    full: bool = False,
    examples: int = 200,
    steps: int = 500,
    lr: float = 3e-3,
    batch: int = 100,
    seed: int = 0,
) -> Problem:
    """ReLU autoencoder 64-32-16-6-16-32-64 of MNIST digits at 8x8, Bernoulli pixels; full=True:
    784-1000-500-250-30-...

    Hidden layers are ReLU, the code layer is linear, the outputs are logits. The likelihood
    `Bernoulli()` sums over the pixels of an image and its loss is the mean over images, as in the
    papers; torch's `BCEWithLogitsLoss()` would divide by the number of pixels too. The full one has
    784 outputs, so that it asks for the Monte-Carlo Fisher.

    Args:
        widths: from the first hidden layer to the code; the decoder mirrors them.
        side: height and width of the images.
        full: the network 784-1000-500-250-30-250-500-1000-784 on 28x28 images, meant for training.
        examples: number of measuring examples, at most 4000.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples.

    Raises:
        ValueError: if `full` is given together with other widths or another side.
    """
    if full:
        if (tuple(widths), side) not in ((WIDTHS, SIDE), (FULL_WIDTHS, FULL_SIDE)):
            raise ValueError(
                f"got full=True together with widths={widths} and side={side}, expected one or "
                "the other: leave full out, or the others"
            )
        widths, side = FULL_WIDTHS, FULL_SIDE
    check_widths("widths", widths)
    digits = data.mnist(side)
    (x, _), (x_test, _) = digits.train, digits.test
    x, x_test = x.flatten(1), x_test.flatten(1)
    return trained_problem(
        lambda: autoencoder((side * side, *widths)),
        Bernoulli(),
        data.Dataset((x, x), (x_test, x_test), digits.sha256),
        fisher="mc" if full else "true",
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
        widths=widths,
        side=side,
    )


def autoencoder(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers from the first width to the last and back; ReLU after all but the code and the
    output.
    """
    sizes = (*widths, *widths[-2::-1])
    code = len(widths) - 2
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if index not in (code, len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
