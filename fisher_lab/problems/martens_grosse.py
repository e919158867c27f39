"""The network of the K-FAC paper's figures 2 and 3 (Martens and Grosse 2015): 16x16 digits, five
tanh layers of 20.
"""

from torch import nn

from fisher_lab.likelihoods import Categorical
from fisher_lab.problems import data
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, mlp, trained_problem


@problem
def martens_grosse(
    widths: tuple[int, ...] = (20, 20, 20, 20, 20),
    examples: int = 1000,
    steps: int = 500,
    lr: float = 3e-3,
    batch: int = 100,
    seed: int = 0,
) -> Problem:
    """Tanh network 256-20-20-20-20-20-10 on MNIST digits shrunk to 16x16, partly trained.

    Args:
        widths: of the hidden layers.
        examples: number of measuring examples, at most 4000.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples.
    """
    check_widths("widths", widths)
    digits = data.mnist(side=16)
    flat = data.Dataset(
        (digits.train[0].flatten(1), digits.train[1]),
        (digits.test[0].flatten(1), digits.test[1]),
        digits.sha256,
    )
    return trained_problem(
        lambda: mlp((256, *widths, 10), nn.Tanh),
        Categorical(),
        flat,
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )
