"""Optimizers: natural gradient with any approximation, and the methods of the papers with their defaults."""

from fisher_lab.optim.kbfgs import KBFGS as KBFGS
from fisher_lab.optim.natural_gradient import NaturalGradient as NaturalGradient
from fisher_lab.optim.presets import EKFAC as EKFAC
from fisher_lab.optim.presets import KFAC as KFAC
from fisher_lab.optim.presets import MBF as MBF
from fisher_lab.optim.presets import TEKFAC as TEKFAC
from fisher_lab.optim.presets import TKFAC as TKFAC
from fisher_lab.optim.presets import TNT as TNT
from fisher_lab.optim.presets import Shampoo as Shampoo
from fisher_lab.optim.presets import TENGraD as TENGraD
