"""
From the whole Fisher to the step of a trainer
==============================================

Each compromise on the way, on top of those before: which one to mend first.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
budget = fl.budget(
    problem.model, problem.likelihood, problem.data, fl.TKFAC(), damping=0.1, batch=50
)
figure = fl.plots.waterfall(budget)
