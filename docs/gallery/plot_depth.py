"""
A deep network: lines along the depth
=====================================

More than eight layers are drawn as lines; the marks at the end are all layers together.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp", widths=(24,) * 8, examples=100, steps=1000, lr=3e-3)
methods = [fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.MiniBlock(), fl.Diagonal()]
comparison = fl.compare(problem.model, problem.likelihood, problem.data, methods, progress=False)
figure = fl.plots.errors(comparison)
