"""
The exact block, its approximations, and their damped inverses
==============================================================

``exact_fisher`` and ``estimate`` give matrices; ``plots.blocks`` shows the size of their entries.
A step uses the inverses in the second row, where other things matter than in the first.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
data = (problem.model, problem.likelihood, problem.data)
exact = fl.exact_fisher(*data, layers=["2"])["2"]
others = {
    m.label: fl.estimate(m, *data, layers=["2"])["2"]
    for m in (fl.KFAC(), fl.TEKFAC(), fl.MiniBlock())
}
figure = fl.plots.blocks(exact, others, inverse_damping=0.01)
