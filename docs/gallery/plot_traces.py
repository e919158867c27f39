"""
Traces, which most approximations keep and KFAC does not
========================================================

A trace that is too large makes steps too short, and the other way round.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(problem.model, problem.likelihood, problem.data, progress=False)
figure = fl.plots.traces(comparison)
