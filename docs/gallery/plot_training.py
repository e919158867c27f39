"""
Along training, and against damping
===================================

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
training = fl.plots.training(comparisons)

# %%
# Errors of the damped step depend on the damping, and so does their order:
damped = fl.compare(
    problem.model,
    problem.likelihood,
    problem.data,
    methods,
    layers=["2"],
    errors=["damped_efficiency"],
    progress=False,
)
damping = fl.plots.damping(damped, "damped_efficiency")
