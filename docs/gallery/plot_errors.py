"""
Errors of every approximation, layer by layer
=============================================

Frobenius errors as bars; methods that are one matrix on a layer are drawn once.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(problem.model, problem.likelihood, problem.data, progress=False)
figure = fl.plots.errors(comparison)
