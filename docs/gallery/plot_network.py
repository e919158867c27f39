"""
What couples the layers
=======================

The Frobenius norms of the blocks of the whole network's Fisher: on the diagonal the layers' own,
which all approximations keep, beside it what they leave out.
"""

from matplotlib.figure import Figure

import fisher_lab as fl
from fisher_lab import problems

problem = problems.load("digits_mlp", widths=(20, 20, 20), examples=100, lr=3e-3)
F = fl.network(problem.model, problem.likelihood, problem.data)
norms = F.block_norms()
scale = norms.diagonal().sqrt()
figure = Figure(figsize=(4.5, 3.6), layout="constrained")
axes = figure.subplots()
image = axes.imshow(norms / (scale[:, None] * scale), vmin=0, vmax=1, cmap="cividis")
axes.set_xticks(range(len(F.shapes)), F.shapes)
axes.set_yticks(range(len(F.shapes)), F.shapes)
axes.set_xlabel("layer")
axes.set_ylabel("layer")
figure.colorbar(image, label="norm of the block, relative to its layers' own")
