"""
What the accuracy costs
=======================

Error against the size of what is held and the time it takes; nothing beats those on the line in
both.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(problem.model, problem.likelihood, problem.data, progress=False)
figure = fl.plots.cost(comparison)
