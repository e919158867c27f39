"""
The same as a table in colours
==============================

One cell for each layer and approximation; what is exact is dark.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(problem.model, problem.likelihood, problem.data, progress=False)
figure = fl.plots.heatmap(comparison)
