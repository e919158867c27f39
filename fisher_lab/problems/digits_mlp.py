"""The quick one: scikit-learn's 8x8 digits and one hidden layer."""

from torch import nn

from fisher_lab.likelihoods import Categorical
from fisher_lab.problems import data
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_widths, mlp, trained_problem


@problem
def digits_mlp(
    widths: tuple[int, ...] = (20,),
    examples: int = 200,
    steps: int = 200,
    lr: float = 1e-2,
    batch: int = 100,
    seed: int = 0,
) -> Problem:
    """Tanh network 64-20-10 on scikit-learn's 8x8 digits: the quick one.

    Args:
        widths: of the hidden layers.
        examples: number of measuring examples, at most 1400.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples.
    """
    check_widths("widths", widths)
    return trained_problem(
        lambda: mlp((64, *widths, 10), nn.Tanh),
        Categorical(),
        data.digits(),
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
    )
