"""
Efficiency of the damped step, against damping
==============================================

How much of the best decrease of the quadratic model a step reaches depends on the damping, and so
does the order of the methods.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
comparison = fl.compare(
    problem.model,
    problem.likelihood,
    problem.data,
    [fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.KPSVD(), fl.MiniBlock()],
    errors=["damped_efficiency"],
    dampings=[1e-3, 1e-2, 1e-1, 1.0, 10.0],
    progress=False,
)
figure = fl.plots.damping(comparison, "damped_efficiency")
