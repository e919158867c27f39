"""Optimizers: natural gradient with any approximation, and the methods of the papers."""

from fisher_lab.optim.base import registry as registry
from fisher_lab.optim.groups import ByLayer as ByLayer
from fisher_lab.optim.natural_gradient import NaturalGradient as NaturalGradient

# the order here is the order in lists; every method of the file, so that a new one is written there
# alone
from fisher_lab.optim.methods import *  # noqa: F403  # isort: skip
from fisher_lab.optim.kbfgs import KBFGS as KBFGS  # isort: skip
