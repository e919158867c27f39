"""
All eigenvalues, relative to the largest of the exact block
===========================================================

Kronecker products follow the large eigenvalues and lose the small ones; a diagonal knows hardly
any.
"""

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp")
data = (problem.model, problem.likelihood, problem.data)
exact = fl.exact_fisher(*data, layers=["2"])["2"]
others = {
    m.label: fl.estimate(m, *data, layers=["2"])["2"]
    for m in (fl.KFAC(), fl.TKFAC(), fl.EKFAC(), fl.Diagonal())
}
figure = fl.plots.spectrum(exact, others)
