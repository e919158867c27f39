"""
Errors along a training
=======================

The same network at several steps; ``steps`` is a setting of the problem.
"""

import fisher_lab as fl
from fisher_lab import problems

methods = [fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.MiniBlock()]
comparisons = {}
for step in (0, 10, 100, 500):
    problem = problems.load("digits_mlp", steps=step)
    comparisons[step] = fl.compare(
        problem.model, problem.likelihood, problem.data, methods, progress=False
    )
figure = fl.plots.training(comparisons)
