"""
Errors of every approximation, layer by layer
=============================================

Compare on a small problem and look at the result in three ways.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(
    problem.model, problem.likelihood, problem.data, problem=problem.settings, progress=False
)
bars = fl.plots.errors(comparison)

# %%
# The same as a table in colours:
table = fl.plots.heatmap(comparison)

# %%
# What the accuracy costs; nothing beats those on the line in both error and price:
cost = fl.plots.cost(comparison)

# %%
# And the traces, which most approximations keep and KFAC does not:
traces = fl.plots.traces(comparison)
