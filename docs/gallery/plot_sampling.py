"""
How many examples are enough
============================

The block of a part of the examples against that of all: the error of sampling falls with the root
of their number, and is soon below that of a structure.
"""

from matplotlib.figure import Figure

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp", examples=800)
data = (problem.model, problem.likelihood, problem.data)
exact = fl.exact_fisher(*data, layers=["2"])["2"]
sizes = [10, 20, 50, 100, 200, 400]
errors = []
for size in sizes:
    part = fl.estimate(fl.TENGraD(batch=size), *data, layers=["2"])["2"]
    errors.append(fl.errors.frobenius(exact, part))
tkfac = fl.estimate(fl.TKFAC(), *data, layers=["2"])["2"]
figure = Figure(figsize=(5.5, 3.4), layout="constrained")
axes = figure.subplots()
axes.loglog(sizes, errors, marker="o", label="block of a part")
axes.axhline(fl.errors.frobenius(exact, tkfac), color="0.4", linestyle="--", label="TKFAC of all")
axes.set_xlabel("examples in the part, of 800")
axes.set_ylabel("relative Frobenius error")
axes.legend()
