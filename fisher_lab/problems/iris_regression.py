"""A small regression with a Gaussian likelihood: the petals of an iris flower from its sepals."""

from torch import nn

from fisher_lab.likelihoods import Gaussian
from fisher_lab.problems import data
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, mlp, trained_problem


@problem
def iris_regression(
    widths: tuple[int, ...] = (16, 16),
    examples: int = 120,
    steps: int = 300,
    lr: float = 1e-2,
    batch: int = 30,
    seed: int = 0,
) -> Problem:
    """Tanh network 2-16-16-2 that predicts petal length and width of iris flowers; Gaussian
    likelihood.

    Args:
        widths: of the hidden layers.
        examples: number of measuring examples, at most 120.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples.
    """
    check_widths("widths", widths)
    return trained_problem(
        lambda: mlp((2, *widths, 2), nn.Tanh),
        Gaussian(),
        data.iris_sizes(),
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )
