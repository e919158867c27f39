"""
The exact block, its approximations, their inverses and spectra
===============================================================

``exact_fisher`` and ``estimate`` give matrices; the figures read them.
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
blocks = fl.plots.blocks(exact, others, inverse_damping=0.01)

# %%
# All eigenvalues, relative to the largest of the exact block:
spectrum = fl.plots.spectrum(exact, others)
